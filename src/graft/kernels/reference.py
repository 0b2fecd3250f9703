"""Blockwise quantization in plain torch: the backend that is always there and that the others must equal.

A tensor is read flat in row-major order and cut into blocks; the last one may be short. Each block is scaled
by its largest magnitude (absmax) and its elements are rounded to entries of a codebook. Work is done in
chunks, so that memory beyond the result stays at a few MB.

The rounding is that of bitsandbytes 0.50 on CPU, bit for bit, so that each reads what the other wrote:

- 16 entries: the nearest entry, ties to the lower one. A full block is multiplied by 1/absmax, a short last
  one is divided by absmax.
- 256 entries: a scaled value is rounded to a grid of 65536 points on [-1, 1], then to the nearest entry. The
  grid moves some codes (0.15% on normal values) to the neighbouring entry, where the two were equally near to
  1.6e-5 of absmax. bitsandbytes has no such grid on CUDA: there the same tensor gives a few other codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graft.kernels.bits import pack_bits
from graft.kernels.rounding import grid_codes, nearest_codes
from graft.kernels.sizes import ABSMAX_BLOCKSIZE

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at once: 1 MB in fp32, which stays in the cache, and a multiple of every blocksize."""

TINY = 1e-38
"""The least absmax that 4-bit codes are divided by; its reciprocal is finite."""


def encode_blockwise(flat: Tensor, codebook: Tensor, *, bits: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """Round each block of a tensor to a codebook.

    Args:
        flat: Values (N,), float32, bfloat16 or float16, finite.
        codebook: Entries (2**bits,) float32; 256 entries must be ascending.
        bits: 4 or 8.
        blocksize: Elements that share one absmax.

    Returns:
        Packed codes uint8 (ceil(N * bits / 8),) and absmax float32 (ceil(N / blocksize),). A NaN or an
        infinity shows in the absmax of its block.
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
        packed: Codes as `encode_blockwise` packs them, uint8, any shape.
        absmax: Scales float32 (ceil(N / blocksize),).
        codebook: Entries (2**bits,) float32.
        bits: 4 or 8.
        blocksize: Elements that share one absmax.
        out: Where the values go, contiguous, N elements, any floating dtype.

    Returns:
        `out`.
    """
    packed, flat = packed.reshape(-1), out.view(-1)
    table = _byte_table(codebook, bits)
    for start, stop in _chunks(flat.numel()):
        codes = packed[start * bits // 8 : (stop * bits + 7) // 8]
        values = torch.index_select(table, 0, codes.int()).view(torch.float32)[: stop - start]
        _scale_blocks(values, absmax[start // blocksize : -(-stop // blocksize)], blocksize)
        flat[start:stop] = values
    return out


def encode_absmax(absmax: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves (double quantization, QLoRA sec. 3).

    Args:
        absmax: Scales float32 (B,).
        codebook: The 8-bit map, ascending float32 (256,).

    Returns:
        Codes uint8 (B,), their scales float32 (ceil(B / 256),), the mean that was taken off float32 (1,).
    """
    # The mean's last bit depends on the vector width and thread count of the machine (torch sums in
    # lanes), as in bitsandbytes. It is stored with the codes, so that decoding does not depend on it.
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
    """Codes of 4 bits (N,), an even number of them; fills absmax (B,)."""
    num_elements = values.numel()
    num_full = num_elements // blocksize
    # An odd element shares its byte with the code of zero, as in bitsandbytes.
    scaled = values.new_zeros(num_elements + num_elements % 2)
    full, short = values[: num_full * blocksize].view(num_full, blocksize), values[num_full * blocksize :]
    torch.amax(full.abs(), dim=1, out=absmax[:num_full])
    scale = absmax[:num_full].clamp(min=TINY).reciprocal_()
    torch.mul(full, scale[:, None], out=scaled[: full.numel()].view(num_full, blocksize))
    if short.numel():
        absmax[num_full] = short.abs().amax().clamp(min=TINY)
        torch.div(short, absmax[num_full], out=scaled[full.numel() : num_elements])
    return nearest_codes(_within_one(scaled), codebook)


def _encode_grid(values: Tensor, codebook: Tensor, blocksize: int, absmax: Tensor) -> Tensor:
    """Codes of 8 bits (N,), fills absmax (B,)."""
    num_blocks, num_elements = absmax.numel(), values.numel()
    if num_elements < num_blocks * blocksize:
        values = torch.cat([values, values.new_zeros(num_blocks * blocksize - num_elements)])
    blocks = values.view(num_blocks, blocksize)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    # Where 1/absmax overflows, the signs of the values are what is left of them.
    scaled = blocks * absmax.reciprocal()[:, None]
    codes = grid_codes(_within_one(scaled.view(-1)), codebook).view(num_blocks, blocksize)
    # A block of zeros has code 0 whatever that stands for: its absmax is 0.
    codes.masked_fill_((absmax == 0)[:, None], 0)
    return codes.view(-1)[:num_elements]


def _within_one(scaled: Tensor) -> Tensor:
    # NaN has no place in a table. It comes from 0/0, or from a NaN that shows in absmax.
    return scaled.nan_to_num_(nan=0.0).clamp_(-1, 1)


def _scale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> None:
    num_full = values.numel() // blocksize
    values[: num_full * blocksize].view(num_full, blocksize).mul_(absmax[:num_full, None])
    if num_full < absmax.numel():
        values[num_full * blocksize :].mul_(absmax[num_full])


def _byte_table(codebook: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codebook
    # One 8-byte entry for each byte: both values are fetched by one look-up.
    pairs = torch.stack([codebook.repeat_interleave(16), codebook.repeat(16)], dim=1)
    return pairs.view(torch.float64).view(-1)
