"""The declared ops with the checks of their arguments, and the registration of the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graft.errors import QuantError
from graft.kernels import bits as reference_bits
from graft.kernels import reference, reference_linear
from graft.kernels.sizes import ABSMAX_BLOCKSIZE, BLOCKSIZES
from graft.kernels.table import REFERENCE, Backend, OpSpec, OpTable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _require(fits: bool, what: str, where: str) -> None:
    if not fits:
        raise QuantError(what, where=where)


def _check_format(codebook: Tensor, bits: int, blocksize: int, where: str) -> None:
    _require(bits in {4, 8}, f"bits is {bits}, not 4 or 8", where)
    _require(blocksize in BLOCKSIZES, f"blocksize {blocksize} is not a power of two from 32 to 4096", where)
    fits = codebook.dtype == torch.float32 and codebook.shape == (2**bits,)
    _require(fits, f"codebook {_show(codebook)} is not float32 ({2**bits},)", where)


def _check_encode(flat: Tensor, codebook: Tensor, *, bits: int, blocksize: int) -> None:
    where = "encode_blockwise"
    _check_format(codebook, bits, blocksize, where)
    _require(flat.dtype in FLOATS, f"values are {flat.dtype}, not float32, bfloat16 or float16", where)
    _require(flat.ndim == 1 and flat.is_contiguous(), f"values {_show(flat)} are not flat", where)


def _check_codes(
    packed: Tensor, absmax: Tensor, codebook: Tensor, bits: int, blocksize: int, num_elements: int, where: str
) -> None:
    _check_format(codebook, bits, blocksize, where)
    num_bytes, num_blocks = (num_elements * bits + 7) // 8, -(-num_elements // blocksize)
    fits = packed.dtype == torch.uint8 and packed.numel() == num_bytes
    _require(fits, f"codes {_show(packed)} are not the {num_bytes} uint8 of {num_elements} elements", where)
    fits = absmax.dtype == torch.float32 and absmax.shape == (num_blocks,)
    _require(fits, f"absmax {_show(absmax)} is not float32 ({num_blocks},)", where)


def _check_decode(
    packed: Tensor, absmax: Tensor, codebook: Tensor, *, bits: int, blocksize: int, out: Tensor
) -> None:
    where = "decode_blockwise"
    _check_codes(packed, absmax, codebook, bits, blocksize, out.numel(), where)
    fits = out.is_floating_point() and out.is_contiguous()
    _require(fits, f"out {_show(out)} is not a contiguous tensor of floats", where)


def _check_pack(codes: Tensor, bits: int) -> None:
    _require(bits in {1, 2, 4, 8}, f"bits is {bits}, not 1, 2, 4 or 8", "pack_bits")
    fits = codes.dtype == torch.uint8 and codes.ndim == 1
    _require(fits, f"codes {_show(codes)} are not flat uint8", "pack_bits")


def _check_unpack(packed: Tensor, bits: int, num_elements: int) -> None:
    _require(bits in {1, 2, 4, 8}, f"bits is {bits}, not 1, 2, 4 or 8", "unpack_bits")
    fits = packed.dtype == torch.uint8 and packed.numel() == (num_elements * bits + 7) // 8
    _require(fits, f"bytes {_show(packed)} do not hold {num_elements} codes of {bits} bits", "unpack_bits")


def _check_encode_absmax(absmax: Tensor, codebook: Tensor) -> None:
    _check_format(codebook, 8, ABSMAX_BLOCKSIZE, "encode_absmax")
    fits = absmax.dtype == torch.float32 and absmax.ndim == 1
    _require(fits, f"absmax {_show(absmax)} is not flat float32", "encode_absmax")


def _check_decode_absmax(codes: Tensor, scale: Tensor, offset: Tensor, codebook: Tensor) -> None:
    where = "decode_absmax"
    _check_codes(codes, scale, codebook, 8, ABSMAX_BLOCKSIZE, codes.numel(), where)
    fits = offset.dtype == torch.float32 and offset.shape == (1,)
    _require(fits, f"offset {_show(offset)} is not float32 (1,)", where)


def _check_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    blocksize: int,
    out_features: int,
) -> None:
    where = "quantized_linear"
    _check_codes(packed, absmax, codebook, bits, blocksize, out_features * x.shape[-1], where)
    fits = bias is None or (bias.shape == (out_features,) and bias.dtype == x.dtype)
    _require(fits, f"bias is not {x.dtype} ({out_features},)", where)


def _check_linear_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    *,
    bits: int,
    blocksize: int,
    in_features: int,
) -> None:
    where = "quantized_linear_backward"
    _check_codes(packed, absmax, codebook, bits, blocksize, grad.shape[-1] * in_features, where)


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def fill(table: OpTable) -> None:
    """Declare every op in a table and register the reference for each."""
    table.add_backend(Backend(REFERENCE))
    for name, doc, check, fn in _OPS:
        table.define(OpSpec(name, doc, check))
        table.register(name, REFERENCE, fn)


_OPS: tuple[tuple[str, str, Callable[..., None], Callable[..., Any]], ...] = (
    ("encode_blockwise", "values to packed codes and absmax", _check_encode, reference.encode_blockwise),
    ("decode_blockwise", "packed codes and absmax to values", _check_decode, reference.decode_blockwise),
    ("pack_bits", "codes to bytes, the first highest", _check_pack, reference_bits.pack_bits),
    ("unpack_bits", "bytes to codes", _check_unpack, reference_bits.unpack_bits),
    ("encode_absmax", "double quantization of absmax", _check_encode_absmax, reference.encode_absmax),
    ("decode_absmax", "absmax from its 8-bit codes", _check_decode_absmax, reference.decode_absmax),
    ("quantized_linear", "x W' + bias, W from its codes", _check_linear, reference_linear.quantized_linear),
    (
        "quantized_linear_backward",
        "dL/dy W, W from its codes",
        _check_linear_backward,
        reference_linear.quantized_linear_backward,
    ),
)

TABLE = OpTable()
"""The table of this process."""

fill(TABLE)

call = TABLE.call
select = TABLE.select
explain = TABLE.explain
register = TABLE.register
add_backend = TABLE.add_backend
remove_backend = TABLE.remove_backend
