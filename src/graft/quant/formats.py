"""The number formats: bits, codebook and its derivation; encoding is the kernels' work.

A format is what a `QuantizedTensor` needs to know about its numbers. `check_quant_format` (in `contract`)
tells whether a new one keeps the promises of the others.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from graft import kernels
from graft.config import did_you_mean
from graft.errors import QuantError


@dataclass(frozen=True)
class QuantFormat:
    """A number format for blocks that are scaled to [-1, 1].

    Attributes:
        name: Its key in `FORMATS`.
        bits: Bits of one code, 4 or 8.
        codebook: The value of each code, 2**bits of them; ascending where bits is 8.
        doc: What it is good for, in a line.
    """

    name: str
    bits: int
    codebook: tuple[float, ...]
    doc: str = field(default="", compare=False)

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def table(self, device: torch.device) -> Tensor:
        """The codebook as float32 (2**bits,) on a device."""
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.codebook, dtype=torch.float32, device=device)
        return self._tables[device]

    def encode(self, flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        """Round the blocks of a flat tensor to the codebook.

        Args:
            flat: Finite values (N,), float32, bfloat16 or float16.
            blocksize: Elements that share one absmax.

        Returns:
            Packed codes uint8 (ceil(N * bits / 8),) and absmax float32 (ceil(N / blocksize),).
        """
        table = self.table(flat.device)
        codes, absmax = kernels.call("encode_blockwise", flat, table, bits=self.bits, blocksize=blocksize)
        return codes, absmax

    def decode(self, codes: Tensor, absmax: Tensor, blocksize: int, out: Tensor) -> Tensor:
        """Fill `out`, contiguous, with the values of packed codes; return it."""
        table = self.table(out.device)
        kernels.call("decode_blockwise", codes, absmax, table, bits=self.bits, blocksize=blocksize, out=out)
        return out


def normal_float(bits: int) -> tuple[float, ...]:
    """Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.

    Half the codes are positive quantiles at even steps of probability, one less are negative, one is zero.
    The outermost probability lies between 1 - 1/30 and 1 - 1/32. This is what reproduces the published table;
    the averages in Eq. 4 of the paper do not, and are infinite at the ends.

    Source: QLoRA, arXiv:2305.14314, sec. 3; the generalisation to other bits is LoftQ's, arXiv:2310.08659.
    """
    half = 2 ** (bits - 1)
    outermost = (
        0.9677083  # the mean of 1 - 1/30 and 1 - 1/32, to the digits that the published table was made with
    )
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in _even_steps(outermost, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in _even_steps(outermost, 0.5, half)[:-1]]
    largest = _float32(max(positive))
    return tuple(_float32(_float32(value) / largest) for value in sorted([*negative, 0.0, *positive]))


def float_e2m1_bitsandbytes() -> tuple[float, ...]:
    """A sign bit and three bits of magnitude, in twelfths, in the order of the bits.

    This is the dialect of bitsandbytes, not OCP E2M1: its least magnitude is 1/192 of the largest, not 1/12.
    """
    magnitudes = [_float32(value / 12) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    return (*magnitudes, *(0.0 - value for value in magnitudes))


def linear_int8() -> tuple[float, ...]:
    """Even steps k/127 for k from -127 to 127, zero twice: there are 256 codes and 255 symmetric values."""
    steps = [_float32(step / 127) for step in range(128)]
    return (*(0.0 - step for step in reversed(steps)), *steps)


def dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit map for scales: seven decades, each with twice the codes of the one below, 0 and 1.

    Code i of a decade is the middle of the i-th of 2**d even cells of [0.1, 1], times the decade; both signs.
    There is no -1: the most negative code is -0.993.

    Source: 8-bit optimizers, arXiv:2110.02861, sec. 2, with the constants of bitsandbytes.
    """
    codes = [0.0, 1.0]
    for decade in range(7):
        edges, power = _even_steps(0.1, 1.0, 2**decade + 1), _float32(10.0 ** (decade - 6))
        for low, high in pairwise(edges):
            middle = _float32(power * _float32(_float32(low + high) / 2))
            codes += [middle, -middle]
    return tuple(sorted(codes))


def _even_steps(start: float, stop: float, count: int) -> list[float]:
    """Even steps in float32, counted from both ends, with one rounding each.

    The published tables were made with torch.linspace, whose last bit depends on the machine's vector
    instructions; this is its result where they fuse the multiplication and the addition, on every machine.
    """
    start, stop = _float32(start), _float32(stop)
    step = _float32(_float32(stop - start) / (count - 1))
    rising = [_float32(start + step * index) for index in range(count // 2)]
    return rising + [_float32(stop - step * (count - 1 - index)) for index in range(count // 2, count)]


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


FORMATS: dict[str, QuantFormat] = {
    "nf4": QuantFormat("nf4", 4, normal_float(4), "4 bits for normally distributed weights"),
    "fp4": QuantFormat("fp4", 4, float_e2m1_bitsandbytes(), "4-bit floating point, bitsandbytes' dialect"),
    "int8": QuantFormat("int8", 8, linear_int8(), "8 bits, even steps, symmetric"),
}
"""The formats by quant_type."""

ABSMAX_FORMAT = QuantFormat("dynamic", 8, dynamic_map(), "8 bits over seven decades, for scales")
"""The format of scales in double quantization. Not for weights: a zero comes back as 1.5e-5 of absmax."""


def format_of(quant_type: str) -> QuantFormat:
    """The format of that name.

    Raises:
        QuantError: There is none.
    """
    if quant_type not in FORMATS:
        raise QuantError(f"no quant_type {quant_type!r}", fix=did_you_mean(quant_type, FORMATS))
    return FORMATS[quant_type]
