"""Blockwise quantization in plain torch: the backend that is always there and that the others must equal.

A tensor is read flat in row-major order and cut into blocks; the last one may be short. Each block is scaled
by its largest magnitude (absmax) and its elements are rounded to entries of a codebook. Work is done in
chunks, so that memory beyond the result stays at a few MB.

Roundings are those of bitsandbytes 0.50 on CPU, bit for bit, so that the two can read each other's weights:

- 16 entries: the nearest entry, ties to the lower one. A full block is multiplied by 1/absmax, a short last block divided.
- 256 entries: the scaled value is first rounded to a grid of 65536 points on [-1, 1], then to the nearest entry.
  The grid moves 0.15% of the codes to the neighbouring entry, by at most 1.6e-5 of absmax. bitsandbytes on
  CUDA has no such grid: there the same tensor gives a few other codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at once: 1 MB in fp32, which stays in the cache, and a multiple of every blocksize."""

TINY = 1e-38
"""The least absmax that is divided by; its reciprocal is finite."""

GRID_POINTS = 65536
ABSMAX_BLOCKSIZE = 256
"""Scales that share one scale of their own in double quantization (QLoRA, arXiv:2305.14314, sec. 3)."""


def encode_blockwise(flat: Tensor, codebook: Tensor, *, bits: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """Round each block of a tensor to a codebook.

    Args:
        flat: Values (N,), float32, bfloat16 or float16, finite.
        codebook: Entries (2**bits,) float32; 256 entries must be ascending.
        bits: 4 or 8.
        blocksize: Elements that share one absmax.

    Returns:
        Packed codes uint8 (ceil(N * bits / 8),) and absmax float32 (ceil(N / blocksize),).
    """
    encode = _encode_nearest if bits == 4 else _encode_grid
    num_elements = flat.numel()
    packed = torch.empty((num_elements * bits + 7) // 8, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-num_elements // blocksize), dtype=torch.float32, device=flat.device)
    for start, stop in _chunks(num_elements):
        blocks = slice(start // blocksize, -(-stop // blocksize))
        codes = encode(flat[start:stop].float(), codebook, blocksize, absmax[blocks])
        packed[start * bits // 8 : (stop * bits + 7) // 8] = pack_bits(codes, bits)
    return packed, absmax


def decode_blockwise(
    packed: Tensor, absmax: Tensor, codebook: Tensor, *, bits: int, blocksize: int, out: Tensor
) -> Tensor:
    """Turn codes back into values: entry times absmax in fp32, rounded once to the dtype of `out`.

    Args:
        packed: Codes as `encode_blockwise` packs them, uint8, any contiguous shape.
        absmax: Scales float32 (ceil(N / blocksize),).
        codebook: Entries (2**bits,) float32.
        bits: 4 or 8.
        blocksize: Elements that share one absmax.
        out: Where the values go, contiguous, N elements, any floating dtype.

    Returns:
        `out`.
    """
    packed, flat = packed.reshape(-1), out.view(-1)
    table, num_elements = _byte_table(codebook, bits), flat.numel()
    for start, stop in _chunks(num_elements):
        codes = packed[start * bits // 8 : (stop * bits + 7) // 8]
        values = torch.index_select(table, 0, codes.int()).view(torch.float32)[: stop - start]
        _scale_blocks(values, absmax[start // blocksize : -(-stop // blocksize)], blocksize)
        flat[start:stop] = values
    return out


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Put codes into bytes, the first one in the highest bits; the last byte is filled with code zeros.

    Args:
        codes: uint8 (N,), each below 2**bits.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 (ceil(N * bits / 8),).
    """
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if codes.numel() % per_byte:
        codes = torch.cat([codes, codes.new_zeros(per_byte - codes.numel() % per_byte)])
    columns = codes.view(-1, per_byte)
    packed = columns[:, 0].clone()
    for column in range(1, per_byte):
        packed.bitwise_left_shift_(bits).bitwise_or_(columns[:, column])
    return packed


def unpack_bits(packed: Tensor, bits: int, num_elements: int) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8 bytes, any shape.
        bits: 1, 2, 4 or 8.
        num_elements: N, how many codes there are.

    Returns:
        Codes uint8 (N,).
    """
    packed = packed.reshape(-1)
    if bits == 8:
        return packed[:num_elements]
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    codes = packed[:, None].bitwise_right_shift(shifts).bitwise_and_(2**bits - 1)
    return codes.view(-1)[:num_elements]


def encode_absmax(absmax: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves (double quantization, QLoRA sec. 3).

    Args:
        absmax: Scales float32 (B,).
        codebook: The 8-bit map, ascending float32 (256,).

    Returns:
        Codes uint8 (B,), their scales float32 (ceil(B / 256),), and the mean that was taken off, float32 (1,).
    """
    # The mean's last bit depends on the vector width and thread count of the machine (torch sums in
    # lanes). It is stored with the codes, so decoding does not; bitsandbytes takes the mean the same way.
    offset = absmax.mean()
    codes, scale = encode_blockwise(absmax - offset, codebook, bits=8, blocksize=ABSMAX_BLOCKSIZE)
    return codes, scale, offset.view(1)


def decode_absmax(codes: Tensor, scale: Tensor, offset: Tensor, codebook: Tensor) -> Tensor:
    """The inverse of `encode_absmax`.

    Args:
        codes: uint8 (B,).
        scale: float32 (ceil(B / 256),).
        offset: float32 (1,).
        codebook: The 8-bit map, float32 (256,).

    Returns:
        Scales float32 (B,).
    """
    absmax = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    decode_blockwise(codes, scale, codebook, bits=8, blocksize=ABSMAX_BLOCKSIZE, out=absmax)
    return absmax.add_(offset)


def _chunks(num_elements: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_elements, CHUNK_ELEMENTS):
        yield start, min(start + CHUNK_ELEMENTS, num_elements)


def _encode_nearest(values: Tensor, codebook: Tensor, blocksize: int, absmax: Tensor) -> Tensor:
    scaled = torch.empty_like(values)
    num_full = values.numel() // blocksize
    full = values[: num_full * blocksize].view(num_full, blocksize)
    torch.amax(full.abs(), dim=1, out=absmax[:num_full])
    scale = absmax[:num_full].clamp(min=TINY).reciprocal_()
    torch.mul(full, scale[:, None], out=scaled[: full.numel()].view_as(full))
    if full.numel() < values.numel():
        short = values[full.numel() :]
        absmax[num_full] = short.abs().amax().clamp(min=TINY)
        torch.div(short, absmax[num_full], out=scaled[full.numel() :])
    scaled.clamp_(-1, 1)
    if scaled.numel() % 2:
        # The half byte that is left over holds the code of zero.
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    bounds, order = _bounds(tuple(codebook.tolist()))
    index = torch.bucketize(scaled, bounds.to(values.device), out_int32=True)
    return torch.index_select(order.to(values.device), 0, index)


def _encode_grid(values: Tensor, codebook: Tensor, blocksize: int, absmax: Tensor) -> Tensor:
    num_blocks, num_elements = absmax.numel(), values.numel()
    if num_elements < num_blocks * blocksize:
        values = torch.cat([values, values.new_zeros(num_blocks * blocksize - num_elements)])
    blocks = values.view(num_blocks, blocksize)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    scaled = blocks * absmax.clamp(min=TINY).reciprocal_()[:, None]
    index = scaled.clamp_(-1, 1).add_(1).mul_(0.5 * (GRID_POINTS - 1)).add_(0.5).int()
    table = _grid_table(tuple(codebook.tolist())).to(values.device)
    codes = torch.index_select(table, 0, index.view(-1)).view(num_blocks, blocksize)
    # A block of zeros gets code 0, whatever that decodes to: its absmax is 0.
    codes.masked_fill_((absmax == 0)[:, None], 0)
    return codes.view(-1)[:num_elements]


def _scale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> None:
    num_full = values.numel() // blocksize
    values[: num_full * blocksize].view(num_full, blocksize).mul_(absmax[:num_full, None])
    if num_full < absmax.numel():
        values[num_full * blocksize :].mul_(absmax[num_full])


def _byte_table(codebook: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codebook
    # One 8-byte entry per byte of codes: both values are fetched by one look-up.
    pairs = torch.stack([codebook.repeat_interleave(16), codebook.repeat(16)], dim=1)
    return pairs.view(torch.float64).view(-1)


@lru_cache(maxsize=8)
def _bounds(codebook: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Midpoints of the sorted codebook (15,), and the code of each sorted entry (16,)."""
    entries = torch.tensor(codebook, dtype=torch.float32)
    order = torch.argsort(entries, stable=True)
    entries = entries[order]
    return (entries[:-1] + entries[1:]) / 2, order.to(torch.uint8)


@lru_cache(maxsize=8)
def _grid_table(codebook: tuple[float, ...]) -> Tensor:
    """The code nearest to each of the 65536 grid points on [-1, 1]."""
    entries = torch.tensor(codebook, dtype=torch.float32)
    points = torch.arange(GRID_POINTS, dtype=torch.float32).mul_(2).div_(GRID_POINTS - 1).sub_(1)
    return torch.bucketize(points, (entries[:-1] + entries[1:]) / 2).to(torch.uint8)
