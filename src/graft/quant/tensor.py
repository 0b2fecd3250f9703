"""A quantized tensor: packed codes, their scales and how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from graft import kernels
from graft.errors import QuantError
from graft.quant.config import QuantizationConfig
from graft.quant.formats import ABSMAX_FORMAT, Blocks, format_of
from graft.quant.hqq import refine
from graft.quant.layout import FLOATS, describe, dtype_name, part_shapes, read_description

PARTS = ("codes", "absmax", "absmax_scale", "absmax_offset", "shift", "shift_scale", "shift_offset")
"""Names of the parts that a quantized tensor may have."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor of N elements in B blocks, stored in few bits; immutable.

    Attributes:
        codes: Packed codes uint8; (rows, row bytes) where rows are whole bytes, else (bytes, 1). Blocks run
            over the flattened tensor, the first code is in the highest bits; nf4 and fp4 have the bytes of
            bitsandbytes.
        absmax: Scales: float32 (B,), or with double quantization their codes, uint8 (B,). The largest
            magnitude of a block; in affine formats the distance from its least to its largest value.
        absmax_scale: With double quantization float32 (ceil(B / 256),), else None.
        absmax_offset: With double quantization float32 (1,), the mean of the scales, else None.
        shape: Shape of the tensor.
        dtype: Its dtype before it was quantized; what `dequantize` gives by default.
        config: How it was quantized.
        shift: In affine formats the least values of the blocks, stored as absmax is; else None.
        shift_scale: As absmax_scale.
        shift_offset: As absmax_offset.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    config: QuantizationConfig
    shift: Tensor | None = None
    shift_scale: Tensor | None = None
    shift_offset: Tensor | None = None

    def scales(self) -> list[Tensor]:
        """The scales as kernels take them: [float32 (B,)], or [codes, scale, offset, map] of theirs."""
        return constants(self.absmax, self.absmax_scale, self.absmax_offset)

    def shifts(self) -> list[Tensor]:
        """The shifts in the same form; empty for symmetric formats."""
        return [] if self.shift is None else constants(self.shift, self.shift_scale, self.shift_offset)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The values: entry times scale, plus shift, in float32, rounded once.

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
        fmt = format_of(self.config.quant_type)
        return fmt.decode(self.codes, self.scales(), self.shifts(), self.config.blocksize, out)

    @property
    def num_elements(self) -> int:
        """N, elements of the tensor that it stands for."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, shifts and their scales."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over elements."""
        return 8 * self.nbytes / self.num_elements

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name, in a fixed order."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in named.items() if part is not None}

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        parts = {name: part.to(device) for name, part in self.parts().items()}
        return replace(self, **parts)  # type: ignore[arg-type]

    def describe(self) -> str:
        """Shape, dtype and format as canonical JSON: with `parts`, all that the tensor is."""
        return describe(self.shape, self.dtype, self.config)

    def state_dict(self) -> dict[str, Tensor]:
        """The parts and "format", the description as uint8: plain tensors for a file."""
        form = torch.tensor(list(self.describe().encode()), dtype=torch.uint8)
        return {**self.parts(), "format": form}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> QuantizedTensor:
        """The inverse of `state_dict`.

        Raises:
            QuantError: A part is missing, or does not fit the description.
        """
        for name in ("format", "codes", "absmax"):
            if name not in state:
                raise QuantError(f"the quantized tensor has no {name!r}", where="state_dict")
        shape, dtype, config = read_description(bytes(state["format"].tolist()))
        parts = {name: state.get(name) for name in PARTS}
        tensor = cls(**parts, shape=shape, dtype=dtype, config=config)  # type: ignore[arg-type]
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
        shape, dtype, config = read_description(data[8:stop])
        parts: dict[str, Tensor | None] = dict.fromkeys(PARTS)
        start = stop
        for name, (part_shape, part_dtype) in part_shapes(shape, config).items():
            stop = start + prod(part_shape) * part_dtype.itemsize
            if stop > len(data):
                raise QuantError(
                    f"the bytes of {name!r} are cut: {len(data)} of at least {stop}", where="from_bytes"
                )
            part = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.uint8)
            parts[name], start = part.view(part_dtype).view(part_shape), stop
        if start != len(data):
            raise QuantError(f"{len(data) - start} bytes too many", where="from_bytes")
        return cls(**parts, shape=shape, dtype=dtype, config=config)  # type: ignore[arg-type]


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
            f"cannot quantize {dtype_name(weight.dtype)}", where=where, fix=f"one of: {', '.join(FLOATS)}"
        )
    if weight.numel() == 0:
        raise QuantError(f"cannot quantize a tensor without elements, {tuple(weight.shape)}", where=where)
    flat, shape = weight.detach().reshape(-1), tuple(weight.shape)
    fmt = format_of(config.quant_type)
    blocks = fmt.encode(flat, config.blocksize)
    _check_finite(blocks.scale, flat, config.blocksize, where)
    if config.hqq:
        blocks = refine(flat, blocks, fmt, config.blocksize)
    if config.double_quant and fmt.bits == 8:
        _keep_zeros(blocks, config.blocksize, fmt.codebook.index(0.0))
    parts: dict[str, Tensor | None] = dict.fromkeys(PARTS)
    parts["codes"] = blocks.codes.view(part_shapes(shape, config)["codes"][0])
    parts |= _stored("absmax", blocks.scale, config, where)
    if blocks.shift is not None:
        parts |= _stored("shift", blocks.shift, config, where)
    return QuantizedTensor(**parts, shape=shape, dtype=weight.dtype, config=config)  # type: ignore[arg-type]


def plain_constants(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same values with scales and shifts in float32, without double quantization."""
    if not tensor.config.double_quant:
        return tensor
    decoded: dict[str, Tensor | None] = {}
    for name, parts in (("absmax", tensor.scales()), ("shift", tensor.shifts())):
        decoded[name] = kernels.call("decode_absmax", *parts) if parts else None
        decoded |= {f"{name}_scale": None, f"{name}_offset": None}
    config = replace(tensor.config, double_quant=False)
    return replace(tensor, **decoded, config=config)  # type: ignore[arg-type]


def shifted(tensor: QuantizedTensor, added: Tensor) -> QuantizedTensor:
    """A tensor to all of whose weights of each block a number is added: its codes and scales stay.

    Args:
        tensor: Of an affine format.
        added: float32 (B,), for each block.

    Returns:
        The tensor with its constants in float32.
    """
    plain = plain_constants(tensor)
    assert plain.shift is not None, "only affine formats have a shift"
    return replace(plain, shift=plain.shift + added.to(plain.shift))


def constants(values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
    """Scales or shifts as kernels take them: their values, or in double quantization their parts."""
    if scale is None or offset is None:
        return [values]
    return [values, scale, offset, ABSMAX_FORMAT.table(values.device)]


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
            is_, wanted = f"{dtype_name(part.dtype)} {tuple(part.shape)}", f"{dtype_name(dtype)} {shape}"
            raise QuantError(f"{name} is {is_}, not {wanted}", where=where)


def _stored(name: str, values: Tensor, config: QuantizationConfig, where: str) -> dict[str, Tensor | None]:
    """Scales or shifts as parts, quantized themselves where the config wants it.

    Raises:
        QuantError: Their mean overflows.
    """
    if not config.double_quant:
        return {name: values}
    codes, scale, offset = kernels.call("encode_absmax", values, ABSMAX_FORMAT.table(values.device))
    if not bool(torch.isfinite(offset).all() and torch.isfinite(scale).all()):
        raise QuantError("the mean of the scales overflows", where=where, fix="set double_quant to false")
    return {name: codes, f"{name}_scale": scale, f"{name}_offset": offset}


def _keep_zeros(blocks: Blocks, blocksize: int, zero: int) -> None:
    """Give blocks of zeros the code of zero: theirs stands for -1, zero only while absmax is exactly 0."""
    codes, absmax = blocks.codes, blocks.scale
    num_full = codes.numel() // blocksize
    codes[: num_full * blocksize].view(num_full, blocksize)[absmax[:num_full] == 0] = zero
    if num_full < absmax.numel() and absmax[num_full] == 0:
        codes[num_full * blocksize :] = zero


def _check_finite(scale: Tensor, flat: Tensor, blocksize: int, where: str) -> None:
    # A NaN or an infinity anywhere in a block is in its scale too.
    bad = torch.isfinite(scale).logical_not_()
    if not bool(bad.any()):
        return
    start = int(bad.nonzero()[0]) * blocksize
    block = flat[start : start + blocksize]
    wrong = torch.isfinite(block).logical_not().nonzero()
    if not len(wrong):
        raise QuantError(
            f"the weight has values from {block.min().item():.3g} to {block.max().item():.3g} in a block: "
            "their distance overflows",
            where=where,
            fix="take a symmetric quant_type, such as nf4",
        )
    index = start + int(wrong[0])
    raise QuantError(
        f"element {index:,} of the weight is {flat[index].item()}, "
        f"and {int(bad.sum()):,} of its {bad.numel():,} blocks are not finite",
        where=where,
        fix="the model file is damaged or diverged; take another one",
    )
