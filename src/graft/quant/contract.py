"""What every number format promises, as checks that anyone can run on a format of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from graft.errors import QuantError

BLOCKSIZE = 64
SIZES = (1, 2, 63, 64, 65, 640, 1001)
"""Elements tried: less than a block, whole blocks, a short last block, odd counts."""

GRID_ERROR = 2e-5
"""How far from the nearest entry 8 bits may choose, in parts of absmax; see kernels/reference.py."""


class Format(Protocol):
    """The face of a format; `QuantFormat` has it."""

    name: str
    bits: int
    codebook: tuple[float, ...]

    def encode(self, flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        """Values (N,) to packed uint8 (ceil(N * bits / 8),) and absmax float32 (ceil(N / blocksize),)."""

    def decode(self, codes: Tensor, absmax: Tensor, blocksize: int, out: Tensor) -> Tensor:
        """Packed codes and absmax to values in `out`, any floating dtype; returns `out`."""


def check_quant_format(fmt: Format) -> None:
    """Check that a format keeps the promises that quantized tensors and layers build on.

    Its codebook lies on [-1, 1] and has 0 and 1; parts have the documented shapes; values come back as the
    nearest entry; zeros stay zeros; blocks do not touch each other; the same values give the same bytes; what
    was decoded encodes to the same codes; decoding to a narrow dtype rounds once.

    Args:
        fmt: The format: `name`, `bits`, `codebook`, `encode`, `decode`.

    Raises:
        QuantError: The promises that are not kept, all of them.
    """
    findings = {promise: _run(check, fmt) for promise, check in _PROMISES.items()}
    broken = [f"{promise}: {found}" for promise, found in findings.items() if found]
    if broken:
        raise QuantError(
            "; ".join(broken), where=f"format {getattr(fmt, 'name', fmt)!r}", fix="mend the format"
        )


def _run(check: Callable[[Format], Iterator[str]], fmt: Format) -> str:
    """The first thing that a check finds, or "". An error inside the format is a finding too."""
    try:
        return next(check(fmt), "")
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def _codebook(fmt: Format) -> Iterator[str]:
    entries = fmt.codebook
    if fmt.bits not in {4, 8}:
        yield f"bits is {fmt.bits}, not 4 or 8"
    if len(entries) != 2**fmt.bits:
        yield f"{len(entries)} entries, not {2**fmt.bits}"
    if not all(-1 <= entry <= 1 for entry in entries):
        yield "an entry is outside [-1, 1]"
    if 0.0 not in entries or 1.0 not in entries:
        yield "0 or 1 is missing"
    if fmt.bits == 8 and list(entries) != sorted(entries):
        yield "entries of 8 bits are not ascending"


def _shapes(fmt: Format) -> Iterator[str]:
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            codes, absmax = fmt.encode(_values(size).to(dtype), BLOCKSIZE)
            num_bytes, num_blocks = (size * fmt.bits + 7) // 8, -(-size // BLOCKSIZE)
            wanted = (torch.uint8, (num_bytes,), torch.float32, (num_blocks,))
            found = (codes.dtype, tuple(codes.shape), absmax.dtype, tuple(absmax.shape))
            if found != wanted:
                yield f"{size} elements of {dtype} give {found}, not {wanted}"


def _nearest(fmt: Format) -> Iterator[str]:
    entries = torch.tensor(fmt.codebook, dtype=torch.float64)
    slack = 1e-6 if fmt.bits == 4 else GRID_ERROR
    for size in SIZES:
        values = _values(size)
        absmax = fmt.encode(values, BLOCKSIZE)[1].double().repeat_interleave(BLOCKSIZE)[:size]
        error = (_round_trip(fmt, values).double() - values.double()).abs() / absmax
        least = (values.double()[:, None] / absmax[:, None] - entries).abs().amin(1)
        if bool((error > least + slack).any()):
            excess = (error - least).max().item()
            yield f"of {size} values some are off by {excess:.2g} of absmax more than needed"


def _zeros(fmt: Format) -> Iterator[str]:
    for size in SIZES:
        values = _values(size)
        values[: BLOCKSIZE + 3] = 0
        values[-1:] = 0
        if bool((_round_trip(fmt, values)[values == 0] != 0).any()):
            yield f"a zero among {size} elements does not stay zero"


def _blocks(fmt: Format) -> Iterator[str]:
    values = _values(640)
    codes, absmax = fmt.encode(values, BLOCKSIZE)
    outlier = values.clone()
    outlier[:BLOCKSIZE] *= 1e6
    other_codes, other_absmax = fmt.encode(outlier, BLOCKSIZE)
    first = BLOCKSIZE * fmt.bits // 8
    if not (torch.equal(codes[first:], other_codes[first:]) and torch.equal(absmax[1:], other_absmax[1:])):
        yield "an outlier changes other blocks than its own"


def _same(fmt: Format) -> Iterator[str]:
    for size in SIZES:
        first, second = fmt.encode(_values(size), BLOCKSIZE), fmt.encode(_values(size), BLOCKSIZE)
        if not (torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])):
            yield f"{size} values give other bytes the second time"


def _again(fmt: Format) -> Iterator[str]:
    for size in (
        SIZES if -1.0 in fmt.codebook else ()
    ):  # without -1 a negative largest value shrinks its block
        values = _round_trip(fmt, _values(size))
        if not torch.equal(_round_trip(fmt, values), values):
            yield f"{size} decoded values change when they are encoded again"


def _rounds_once(fmt: Format) -> Iterator[str]:
    for dtype in (torch.bfloat16, torch.float16):
        values = _values(1001)
        if not torch.equal(_round_trip(fmt, values, dtype), _round_trip(fmt, values).to(dtype)):
            yield f"decoding to {dtype} is not the float32 value rounded"


_PROMISES: dict[str, Callable[[Format], Iterator[str]]] = {
    "codebook": _codebook,
    "shapes": _shapes,
    "nearest entry": _nearest,
    "zeros": _zeros,
    "independent blocks": _blocks,
    "same bytes": _same,
    "idempotent": _again,
    "one rounding": _rounds_once,
}


def _values(size: int) -> Tensor:
    """Normal values with some large and small ones; the same at every call."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    return values * torch.tensor([1.0, 1e-3, 30.0]).repeat_interleave(100).repeat(size // 300 + 1)[:size]


def _round_trip(fmt: Format, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    codes, absmax = fmt.encode(values, BLOCKSIZE)
    return fmt.decode(codes, absmax, BLOCKSIZE, torch.empty(values.shape, dtype=dtype))
