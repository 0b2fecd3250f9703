"""Attention on the CPU: in C++ where the instruction set has it, else torch's flash attention in float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graft.kernels.cpu import library
from graft.kernels.cpu.address import address_of

ALIGNMENT = 64
"""Bytes; of the memory that a call works in."""

MAX_HEAD_DIM = 256
"""Of the C++ kernels, which want a multiple of 16 too."""


def is_compiled(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether C++ computes attention of this dtype and size here."""
    return (
        dtype == torch.bfloat16
        and head_dim % 16 == 0
        and 0 < head_dim <= MAX_HEAD_DIM
        and not library.problem()
        and library.has_attention()
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """See the reference; weights are rounded to bfloat16 before they meet the values."""
    if not _fits(query, mask):
        return _torch_attention(query, key, value, mask, scale)
    batch, heads, length, head_dim = query.shape
    output = query.new_empty(batch, length, heads, head_dim)
    sums = query.new_empty(batch, heads, length, dtype=torch.float32)
    _run((query, key, value), mask, scale, output, sums, ())
    return output, sums


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    sums: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference; the gradients lie in memory as (B, T, heads, D)."""
    if not _fits(query, mask):
        return _torch_backward(grad, query, key, value, mask, output, sums, scale)
    grads = [
        part.new_empty(part.shape[0], part.shape[2], part.shape[1], part.shape[3]).transpose(1, 2)
        for part in (query, key, value)
    ]
    upper = _dense_rows(grad.to(query.dtype)).transpose(1, 2)
    _run((query, key, value), mask, scale, output, sums.contiguous(), (upper, *grads))
    return grads[0], grads[1], grads[2]


def _fits(query: Tensor, mask: Tensor | None) -> bool:
    return (
        is_compiled(query.dtype, query.shape[-1])
        and (mask is None or mask.dtype == torch.bool)
        and query.numel() > 0
    )


def _run(
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
    output: Tensor,
    sums: Tensor,
    grads: tuple[Tensor, ...],
) -> None:
    """Forward, or backward where there are gradients: of the output first, then where those of q, k, v go."""
    query, key, value = (_dense_rows(part) for part in operands)
    batch, heads, length, head_dim = query.shape
    mask = None if mask is None else _dense_rows(mask)
    parts = (query, key, value, output.transpose(1, 2), *grads)
    described = [_heads(part) for part in parts] + [library.Heads()] * (8 - len(parts))
    call = library.Attention(
        *described,
        address_of(sums),
        None if mask is None else address_of(mask),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        0 if mask is None else mask.stride(2),
        batch,
        heads,
        key.shape[1],
        length,
        head_dim,
        scale,
    )
    backward, threads = int(bool(grads)), torch.get_num_threads()
    needed = library.library().graft_attention_bytes(ctypes.byref(call), backward, threads)
    memory = torch.empty(needed + ALIGNMENT, dtype=torch.uint8, device="cpu")
    place = -(-address_of(memory) // ALIGNMENT) * ALIGNMENT
    library.library().graft_attention(ctypes.byref(call), backward, place, threads)


def _heads(part: Tensor) -> library.Heads:
    return library.Heads(address_of(part), part.stride(0), part.stride(1), part.stride(2))


def _dense_rows(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()


def _torch_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.float(),
        *_for_every_head(query, key, value),
        0.0,
        mask is None,
        attn_mask=_numbers(mask),
        scale=scale,
    )
    return output.transpose(1, 2).to(query.dtype).contiguous(), sums


def _torch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.transpose(1, 2).float(),
        query.float(),
        *_for_every_head(query, key, value),
        output.transpose(1, 2).float(),
        sums,
        0.0,
        mask is None,
        attn_mask=_numbers(mask),
        scale=scale,
    )
    grad_query, grad_key, grad_value = found
    return (
        grad_query.to(query.dtype),
        _over_groups(grad_key, key.shape[1]).to(key.dtype),
        _over_groups(grad_value, key.shape[1]).to(value.dtype),
    )


def _for_every_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    wide = key.float(), value.float()
    if repeats == 1:
        return wide
    return wide[0].repeat_interleave(repeats, 1), wide[1].repeat_interleave(repeats, 1)


def _over_groups(grad: Tensor, num_heads: int) -> Tensor:
    """Gradients of a key head summed over the query heads that it serves."""
    return grad if grad.shape[1] == num_heads else grad.unflatten(1, (num_heads, -1)).sum(2)


def _numbers(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
