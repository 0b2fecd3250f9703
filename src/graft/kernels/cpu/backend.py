"""The ops of the table in C++, for tensors on the CPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graft.kernels import reference_decode
from graft.kernels.cpu import attention, elementwise, library
from graft.kernels.cpu.address import address_of
from graft.kernels.reference import Rounding
from graft.kernels.reference_linear import take_scratch
from graft.kernels.sizes import ABSMAX_BLOCKSIZE
from graft.kernels.table import Backend, OpTable
from graft.kernels.wide import FillPart, is_wide, wide_linear, wide_linear_backward

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of the dtypes in source/graft.h."""

WIDE = {torch.bfloat16: 3, torch.float16: 4}
"""Of floats that hold what these dtypes can."""

MAX_FUSED_ROWS = {"avx512": 32, "avx2": 64}
"""Rows of x up to which decoding inside the product beats decoding first; 32 with other instruction sets."""

PART_ELEMENTS = 1 << 22
MAX_ROWS_IN_PARTS = 512
"""Some hundreds of rows are multiplied with a large weight part by part, which stays in the cache between
decoding and product; with more rows one large product is faster."""

MAX_FUSED_BLOCKS = 2040
"""Blocks in four rows of W that the fused product has room for (kRun in the sources)."""


def add_to(table: OpTable) -> None:
    """Announce the backend, whether it was compiled or not, and register its ops."""
    table.add_backend(Backend("cpu", ("cpu",), library.problem, note))
    for fn in (
        encode_blockwise,
        encode_affine,
        decode_blockwise,
        encode_absmax,
        decode_absmax,
        quantized_linear,
        quantized_linear_backward,
        attention.attention,
        attention.attention_backward,
        elementwise.rms_norm,
        elementwise.rms_norm_backward,
        elementwise.silu_product,
        elementwise.silu_product_backward,
        elementwise.cross_entropy,
    ):
        table.register(fn.__name__, "cpu", fn)


def note() -> str:
    """What was compiled and runs here."""
    threads = "torch's threads" if library.shares_threads() else "threads of its own"
    return f"C++ for {library.tier()}, on {threads}"


def encode_blockwise(
    flat: Tensor, codebook: Tensor, *, bits: int, blocksize: int, rounding: Rounding = "nearest"
) -> tuple[Tensor, Tensor]:
    """See the reference; the same bytes."""
    codes, absmax, _ = _encode(flat, codebook, bits, blocksize, affine=False, grid=rounding == "grid")
    return codes, absmax


def encode_affine(
    flat: Tensor, codebook: Tensor, *, bits: int, blocksize: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference; the same bytes."""
    codes, scale, shift = _encode(flat, codebook, bits, blocksize, affine=True, grid=False)
    assert shift is not None
    return codes, scale, shift


def decode_blockwise(
    codes: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    codebook: Tensor,
    *,
    bits: int,
    blocksize: int,
    out: Tensor,
) -> Tensor:
    """See the reference; the same bytes."""
    if out.dtype not in DTYPES:
        return reference_decode.decode_blockwise(
            codes, scales, shifts, codebook, bits=bits, blocksize=blocksize, out=out
        )
    weight, _held = _weight(codes, scales, shifts, codebook, bits, blocksize, out.numel())
    _decode(weight, 0, out.numel(), out, past_cache=True)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # autograd shall see that it was written
    return out


def encode_absmax(absmax: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference; the same bytes."""
    offset = absmax.mean()
    codes, scale = encode_blockwise(
        absmax - offset, codebook, bits=8, blocksize=ABSMAX_BLOCKSIZE, rounding="grid"
    )
    return codes, scale, offset.view(1)


def decode_absmax(codes: Tensor, scale: Tensor, offset: Tensor, codebook: Tensor) -> Tensor:
    """See the reference; the same bytes."""
    absmax = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    decode_blockwise(codes, [scale], [], codebook, bits=8, blocksize=ABSMAX_BLOCKSIZE, out=absmax)
    return absmax.add_(offset)


def quantized_linear(  # noqa: PLR0913 - what one weight is made of
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    codebook: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    blocksize: int,
    out_features: int,
) -> Tensor:
    """See the reference. Few rows are multiplied as the weight is decoded, in another order of summation.

    Raises:
        MemoryError: There is none left for a copy of x in float32.
    """
    in_features = x.shape[-1]
    if x.dtype not in DTYPES or not in_features * out_features:
        dense = _dense(x, codes, scales, shifts, codebook, bits, blocksize, (out_features, in_features))
        return torch.nn.functional.linear(x, dense, bias)
    weight, _held = _weight(codes, scales, shifts, codebook, bits, blocksize, in_features * out_features)
    rows = x.numel() // in_features
    fits = in_features % 32 == 0 and 4 * in_features <= MAX_FUSED_BLOCKS * blocksize
    wide = is_wide(x.dtype, "cpu")
    tier = library.tier()
    plain = (x.dtype != torch.float16 or tier != "avx512") and not (bits == 8 and shifts)
    if 0 < rows <= MAX_FUSED_ROWS.get(tier, 32) and fits and plain:
        return _fused_product(x.contiguous(), weight, bias, rows)
    if wide:
        fill = _filler(weight, in_features, x.dtype)
        return wide_linear(x, out_features, fill, bias, _rows_to_whole_blocks(in_features, blocksize))
    return _product_in_parts(x, weight, bias, _rows_of_part(rows, in_features, out_features, blocksize))


def _fused_product(x: Tensor, weight: library.Weight, bias: Tensor | None, rows: int) -> Tensor:
    in_features = x.shape[-1]
    out_features = weight.num_elements // in_features
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    product = library.Product(
        weight,
        address_of(x),
        None if bias is None else address_of(bias),
        address_of(y),
        rows,
        in_features,
        out_features,
        DTYPES[x.dtype],
    )
    if not library.library().graft_product(ctypes.byref(product), torch.get_num_threads()):
        raise MemoryError(f"no memory for {rows} rows of {in_features} floats")
    return y


def quantized_linear_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    codebook: Tensor,
    *,
    bits: int,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """See the reference."""
    shape = (grad.shape[-1], in_features)
    if is_wide(grad.dtype, "cpu"):
        stored, _held = _weight(codes, scales, shifts, codebook, bits, blocksize, shape[0] * in_features)
        fill = _filler(stored, in_features, grad.dtype)
        return wide_linear_backward(grad, in_features, fill, _rows_to_whole_blocks(in_features, blocksize))
    weight = _dense(grad, codes, scales, shifts, codebook, bits, blocksize, shape)
    return torch.matmul(grad, weight)


def _rows_of_part(rows: int, in_features: int, out_features: int, blocksize: int) -> int:
    """Rows of W that are decoded at once: all, or equal parts of about `PART_ELEMENTS` in whole blocks."""
    if rows > MAX_ROWS_IN_PARTS:
        return out_features
    num_parts = max(1, round(in_features * out_features / PART_ELEMENTS))
    return max(1, -(-out_features // num_parts // blocksize)) * blocksize


def _product_in_parts(x: Tensor, weight: library.Weight, bias: Tensor | None, part: int) -> Tensor:
    in_features = x.shape[-1]
    out_features = weight.num_elements // in_features
    products = []
    for start in range(0, out_features, part):
        stop = min(start + part, out_features)
        dense = take_scratch((stop - start, in_features), x)
        _decode(weight, start * in_features, stop * in_features, dense)
        products.append(torch.nn.functional.linear(x, dense, None if bias is None else bias[start:stop]))
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _rows_to_whole_blocks(in_features: int, blocksize: int) -> int:
    return blocksize // math.gcd(in_features, blocksize)


def _filler(weight: library.Weight, in_features: int, dtype: torch.dtype) -> FillPart:
    """Decodes rows of a weight into floats that hold what this dtype can."""
    decode = library.library().graft_decode

    def fill(start: int, stop: int, out: Tensor) -> None:
        begin, end = start * in_features, stop * in_features
        decode(ctypes.byref(weight), begin, end, address_of(out), WIDE[dtype], False, torch.get_num_threads())

    return fill


def _decode(weight: library.Weight, begin: int, end: int, out: Tensor, *, past_cache: bool = False) -> None:
    decode, threads = library.library().graft_decode, torch.get_num_threads()
    decode(ctypes.byref(weight), begin, end, address_of(out), DTYPES[out.dtype], past_cache, threads)


def _dense(
    like: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    codebook: Tensor,
    bits: int,
    blocksize: int,
    shape: tuple[int, int],
) -> Tensor:
    out = take_scratch(shape, like)
    if like.dtype not in DTYPES:
        return reference_decode.decode_blockwise(
            codes, scales, shifts, codebook, bits=bits, blocksize=blocksize, out=out
        )
    weight, _held = _weight(codes, scales, shifts, codebook, bits, blocksize, out.numel())
    _decode(weight, 0, out.numel(), out)
    return out


def _encode(
    flat: Tensor, codebook: Tensor, bits: int, blocksize: int, *, affine: bool, grid: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    num_elements = flat.numel()
    num_blocks = -(-num_elements // blocksize)
    codes = torch.empty((num_elements * bits + 7) // 8, dtype=torch.uint8, device=flat.device)
    scale = torch.empty(num_blocks, dtype=torch.float32, device=flat.device)
    shift = torch.empty_like(scale) if affine else None
    codebook = codebook.contiguous()
    encoding = library.Encoding(
        address_of(flat),
        address_of(scale),
        None if shift is None else address_of(shift),
        address_of(codes),
        address_of(codebook),
        num_elements,
        DTYPES[flat.dtype],
        bits,
        blocksize,
        grid,
    )
    library.library().graft_encode(ctypes.byref(encoding), torch.get_num_threads())
    return codes, scale, shift


def _weight(
    codes: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    codebook: Tensor,
    bits: int,
    blocksize: int,
    num_elements: int,
) -> tuple[library.Weight, list[Tensor]]:
    """The argument, and tensors that must live while it is used."""
    held: list[Tensor] = []

    def address(tensor: Tensor) -> int:
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        held.append(whole)
        return address_of(whole)

    def per_block(parts: Sequence[Tensor]) -> library.PerBlock:
        if len(parts) < 4:
            return library.PerBlock(*(address(part) for part in parts))
        values, scale, offset, table = parts
        return library.PerBlock(address(values), address(table), address(scale), address(offset))

    weight = library.Weight(
        address(codes),
        per_block(scales),
        per_block(shifts),
        address(codebook),
        num_elements,
        bits,
        blocksize,
    )
    return weight, held
