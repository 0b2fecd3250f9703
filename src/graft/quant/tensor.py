"""A quantized tensor: packed codes, their scales and how to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from graft import kernels
from graft.errors import QuantError
from graft.kernels.sizes import ABSMAX_BLOCKSIZE
from graft.quant.config import QuantizationConfig
from graft.quant.formats import ABSMAX_FORMAT, format_of

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor of N elements in B blocks, stored in few bits; immutable.

    Attributes:
        codes: Packed codes uint8; (rows, row bytes) where rows are whole bytes, else (bytes, 1). The same
            bytes as bitsandbytes: blocks over the flattened tensor, first code in the high half of a byte.
        absmax: Scales: float32 (B,), or with double quantization their codes, uint8 (B,).
        absmax_scale: With double quantization float32 (ceil(B / 256),), else None.
        absmax_offset: With double quantization float32 (1,), the mean of the scales, else None.
        shape: Shape of the tensor.
        dtype: Its dtype before it was quantized; what `dequantize` gives by default.
        config: How it was quantized.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    config: QuantizationConfig

    def scales(self) -> Tensor:
        """The scale of every block, float32 (B,)."""
        if self.absmax_scale is None or self.absmax_offset is None:
            return self.absmax
        table = ABSMAX_FORMAT.table(self.codes.device)
        scales: Tensor = kernels.call(
            "decode_absmax", self.absmax, self.absmax_scale, self.absmax_offset, table
        )
        return scales

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The values: entry times scale in float32, rounded once.

        Args:
            dtype: Of the result; the original dtype by default.
            out: Contiguous tensor of N elements to fill; overrides dtype.

        Returns:
            The tensor in its shape, or `out`.

        Raises:
            QuantError: `out` does not fit.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.codes.device)
        elif out.numel() != self.num_elements:
            raise QuantError(f"out has {out.numel()} elements, not {self.num_elements}", where="dequantize")
        return format_of(self.config.quant_type).decode(self.codes, self.scales(), self.config.blocksize, out)

    @property
    def num_elements(self) -> int:
        """N, elements of the tensor that it stands for."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and their scales."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over elements."""
        return 8 * self.nbytes / self.num_elements

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name, in a fixed order."""
        named = {
            "codes": self.codes,
            "absmax": self.absmax,
            "absmax_scale": self.absmax_scale,
            "absmax_offset": self.absmax_offset,
        }
        return {name: part for name, part in named.items() if part is not None}

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        parts = {name: part.to(device) for name, part in self.parts().items()}
        return replace(self, **parts)  # type: ignore[arg-type]

    def describe(self) -> str:
        """Shape, dtype and format as canonical JSON: with `parts`, all that the tensor is."""
        return describe(self.shape, self.dtype, self.config)

    def state_dict(self) -> dict[str, Tensor]:
        """`parts` and the description, as uint8 JSON bytes under "format"; safetensors can hold it."""
        return {**self.parts(), "format": torch.tensor(list(self.describe().encode()), dtype=torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> QuantizedTensor:
        """The inverse of `state_dict`.

        Raises:
            QuantError: A part is missing, has another shape or dtype, or the description cannot be read.
        """
        for name in ("format", "codes", "absmax"):
            if name not in state:
                raise QuantError(f"the quantized tensor has no {name!r}", where="state_dict")
        shape, dtype, config = _read_description(bytes(state["format"].tolist()))
        absmax_parts = (state.get("absmax_scale"), state.get("absmax_offset"))
        tensor = cls(state["codes"], state["absmax"], *absmax_parts, shape=shape, dtype=dtype, config=config)
        check_parts(tensor)
        return tensor

    def to_bytes(self) -> bytes:
        """All of it as bytes, equal for equal tensors on every machine: the description, then the parts.

        Little-endian; the description is preceded by its length in 8 bytes.
        """
        head = self.describe().encode()
        bodies = [part.detach().cpu().contiguous().view(torch.uint8) for part in self.parts().values()]
        return b"".join([len(head).to_bytes(8, "little"), head, *(body.numpy().tobytes() for body in bodies)])

    @classmethod
    def from_bytes(cls, data: bytes) -> QuantizedTensor:
        """The inverse of `to_bytes`.

        Raises:
            QuantError: The bytes are cut, too long, or describe no quantized tensor.
        """
        stop = 8 + int.from_bytes(data[:8], "little")
        shape, dtype, config = _read_description(data[8:stop])
        state, start = {}, stop
        for name, (part_shape, part_dtype) in part_shapes(shape, config).items():
            stop = start + prod(part_shape) * part_dtype.itemsize
            if stop > len(data):
                raise QuantError(
                    f"the bytes of {name!r} are cut: {len(data)} of at least {stop}", where="from_bytes"
                )
            part = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.uint8)
            state[name], start = part.view(part_dtype).view(part_shape), stop
        if start != len(data):
            raise QuantError(f"{len(data) - start} bytes too many", where="from_bytes")
        scale, offset = state.get("absmax_scale"), state.get("absmax_offset")
        return cls(state["codes"], state["absmax"], scale, offset, shape=shape, dtype=dtype, config=config)


def quantize(weight: Tensor, config: QuantizationConfig, *, where: str = "") -> QuantizedTensor:
    """Store a tensor in few bits.

    Args:
        weight: Any shape, N > 0 elements, float32, bfloat16 or float16, finite.
        config: Format, blocksize, double quantization.
        where: Name of the tensor, for errors.

    Returns:
        The quantized tensor on the weight's device. Memory beyond it and a contiguous weight: a few MB.

    Raises:
        QuantError: A NaN or an infinity in the weight, no elements, or another dtype.
    """
    if weight.dtype not in FLOATS.values():
        raise QuantError(
            f"cannot quantize {_name(weight.dtype)}", where=where, fix=f"one of: {', '.join(FLOATS)}"
        )
    if weight.numel() == 0:
        raise QuantError(f"cannot quantize a tensor without elements, {tuple(weight.shape)}", where=where)
    flat = weight.detach().reshape(-1)
    fmt = format_of(config.quant_type)
    codes, absmax = fmt.encode(flat, config.blocksize)
    _check_finite(absmax, flat, config.blocksize, where)
    if config.double_quant and fmt.bits == 8:
        _keep_zeros(codes, absmax, config.blocksize, fmt.codebook.index(0.0))
    codes = codes.view(_codes_shape(tuple(weight.shape), config.bits))
    scale = offset = None
    if config.double_quant:
        absmax, scale, offset = kernels.call("encode_absmax", absmax, ABSMAX_FORMAT.table(weight.device))
        if not bool(torch.isfinite(offset).all() and torch.isfinite(scale).all()):
            raise QuantError("the mean of the scales overflows", where=where, fix="set double_quant to false")
    return QuantizedTensor(codes, absmax, scale, offset, tuple(weight.shape), weight.dtype, config)


def describe(shape: tuple[int, ...], dtype: torch.dtype, config: QuantizationConfig) -> str:
    """What a reader of the parts must know, as canonical JSON: shape, dtype and format."""
    facts = {"shape": list(shape), "dtype": _name(dtype), **config.to_dict()}
    del facts["skip_modules"]  # says which modules are quantized, not how
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def part_shapes(
    shape: tuple[int, ...], config: QuantizationConfig
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of a quantized tensor by name, in the order of `parts`."""
    num_blocks = -(-prod(shape) // config.blocksize)
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": (_codes_shape(shape, config.bits), torch.uint8),
        "absmax": ((num_blocks,), torch.uint8 if config.double_quant else torch.float32),
    }
    if config.double_quant:
        parts["absmax_scale"] = ((-(-num_blocks // ABSMAX_BLOCKSIZE),), torch.float32)
        parts["absmax_offset"] = ((1,), torch.float32)
    return parts


def check_parts(tensor: QuantizedTensor, where: str = "") -> None:
    """Refuse a tensor whose parts do not fit its shape and config.

    Raises:
        QuantError: A part is missing, is too many, or has another shape or dtype.
    """
    expected, found = part_shapes(tensor.shape, tensor.config), tensor.parts()
    if set(expected) != set(found):
        raise QuantError(f"the parts are {sorted(found)}, not {sorted(expected)}", where=where)
    for name, (shape, dtype) in expected.items():
        part = found[name]
        if tuple(part.shape) != shape or part.dtype != dtype:
            is_, wanted = f"{_name(part.dtype)} {tuple(part.shape)}", f"{_name(dtype)} {shape}"
            raise QuantError(f"{name} is {is_}, not {wanted}", where=where)


def _codes_shape(shape: tuple[int, ...], bits: int) -> tuple[int, int]:
    """2-D by rows where every row is whole bytes, so that rows can be cut apart; else one column."""
    row = shape[-1] if len(shape) == 2 else 0
    if row and row * bits % 8 == 0:
        return shape[0], row * bits // 8
    return (prod(shape) * bits + 7) // 8, 1


def _keep_zeros(codes: Tensor, absmax: Tensor, blocksize: int, zero: int) -> None:
    """Give blocks of zeros the code of zero: theirs stands for -1, zero only while absmax is exactly 0."""
    num_full = codes.numel() // blocksize
    codes[: num_full * blocksize].view(num_full, blocksize)[absmax[:num_full] == 0] = zero
    if num_full < absmax.numel() and absmax[num_full] == 0:
        codes[num_full * blocksize :] = zero


def _check_finite(absmax: Tensor, flat: Tensor, blocksize: int, where: str) -> None:
    # A NaN or an infinity anywhere in a block is in its largest magnitude too.
    bad = torch.isfinite(absmax).logical_not_()
    if not bool(bad.any()):
        return
    start = int(bad.nonzero()[0]) * blocksize
    block = flat[start : start + blocksize]
    index = start + int(torch.isfinite(block).logical_not().nonzero()[0])
    raise QuantError(
        f"element {index:,} of the weight is {flat[index].item()}, "
        f"and {int(bad.sum()):,} of its {bad.numel():,} blocks are not finite",
        where=where,
        fix="the model file is damaged or diverged; take another one",
    )


def _read_description(data: bytes) -> tuple[tuple[int, ...], torch.dtype, QuantizationConfig]:
    try:
        facts: dict[str, Any] = json.loads(data)
        shape = tuple(int(size) for size in facts.pop("shape"))
        dtype = FLOATS[facts.pop("dtype")]
        return shape, dtype, QuantizationConfig(**facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantError(f"the description of a quantized tensor cannot be read: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
