"""Attention of halves with sums in float32 that keeps halves: q, k, v and the output as they come and go.

What torch's `scaled_dot_product_attention` keeps besides, copies for each head of what heads share or a mask
as numbers, is made again in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft import kernels


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> bool:
    """Whether `lean_attention` computes this: nothing unusual is wanted.

    Args:
        query: (B, heads, T, D).
        key: (B, key heads, S, D).
        value: (B, key heads, S, D).
        mask: As transformers passes it.
        settings: What else transformers passes.
    """
    return (
        query.device.type == "cpu"
        and not settings.get("dropout")
        and all(settings.get(name) is None for name in ("softcap", "position_bias", "cache", "is_causal"))
        and not settings.get("output_attentions")
        and query.shape[-1] == value.shape[-1]
        and query.shape[2] == key.shape[2] > 1
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype
        and (mask is None or (_is_plain(query, mask) and not mask.requires_grad))
        and type(query) is Tensor  # no stand-in of a tracing mode
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _is_plain(query: Tensor, mask: Tensor) -> bool:
    batch, _, length, _ = query.shape
    return mask.shape in ((batch, 1, length, length), (1, 1, length, length))


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
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    result: Tensor = _Attention.apply(query, key, value, mask, scale)
    return result


class _Attention(torch.autograd.Function):
    """Keeps its operands, its output and the logarithms of the softmax's sums."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        output, sums = kernels.call("attention", query, key, value, mask, scale=scale)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, mask, output, sums)
        result: Tensor = output
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, sums = ctx.saved_tensors
        found = kernels.call(
            "attention_backward", grads[0], query, key, value, mask, output, sums, scale=ctx.scale
        )
        return *found, None, None
