"""Attention of halves with sums in float32 that keeps halves: q, k, v and the output as they come and go.

`torch.nn.functional.scaled_dot_product_attention` over float32 copies would keep the copies, and a mask of
truth values once more per layer as numbers. Here both are made again in the backward pass, which is that of
torch's flash attention for CPUs (FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> bool:
    """Whether `lean_attention` computes this: gradients are wanted, and nothing unusual is.

    Args:
        query: (B, heads, T, D).
        key: (B, key heads, S, D).
        value: (B, key heads, S, D).
        mask: As transformers passes it.
        settings: What else transformers passes.
    """
    return (
        torch.is_grad_enabled()
        and query.device.type == "cpu"
        and not settings.get("dropout")
        and all(settings.get(name) is None for name in ("softcap", "position_bias", "cache", "is_causal"))
        and not settings.get("output_attentions")
        and query.shape[-1] == value.shape[-1]
        and query.shape[2] == key.shape[2] > 1
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.dim() == 4 and not mask.requires_grad))
    )


def lean_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(scale * q k' + mask) v, causal where there is no mask.

    Args:
        query: (B, heads, T, D), bfloat16 or float16.
        key: (B, key heads, T, D); each serves heads / key heads queries in a row.
        value: (B, key heads, T, D).
        mask: (B or 1, 1, T, T), truth values or numbers to add; None for causal attention.
        scale: None for 1 / sqrt(D).

    Returns:
        (B, T, heads, D), contiguous, in the query's dtype.
    """
    result: Tensor = _Attention.apply(query, key, value, mask, scale)
    return result


class _Attention(torch.autograd.Function):
    """Keeps its operands, its output and the logarithms of the softmax's sums."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.float(),
            *_for_every_head(query, key, value),
            0.0,
            mask is None,
            attn_mask=_numbers(mask),
            scale=scale,
        )
        result: Tensor = output.transpose(1, 2).to(query.dtype).contiguous()
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, mask, result, sums)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, result, sums = ctx.saved_tensors
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0].transpose(1, 2).float(),
            query.float(),
            *_for_every_head(query, key, value),
            result.transpose(1, 2).float(),
            sums,
            0.0,
            mask is None,
            attn_mask=_numbers(mask),
            scale=ctx.scale,
        )
        grad_query, *others = found
        shared = [_over_groups(grad, key.shape[1]).to(key.dtype) for grad in others]
        return grad_query.to(query.dtype), *shared, None, None


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
