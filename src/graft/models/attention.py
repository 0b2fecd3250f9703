"""The attention that transformers is given for models in halves on a CPU, under a name of its own.

Where graft has kernels for it they run; on a processor without products of halves torch's own works on
float32 copies. Whatever is unusual (dropout, a cache, a bias, caps) goes the way of transformers' `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels.cpu.attention import is_compiled
from graft.kernels.wide import is_wide
from graft.models.lean_attention import lean_attention, takes

ATTENTION = "graft"
"""The name under which transformers knows `attend`."""


def prefer_attention(model: Any, dtype: torch.dtype) -> bool:
    """Let a model's attention be computed by `attend` where that pays, in place of `sdpa`.

    Args:
        model: A transformers model; one whose attention is another one than `sdpa` stays as it is.
        dtype: What it computes in.

    Returns:
        Whether it is.
    """
    config = model.config
    pays = is_wide(dtype, model.device.type) or (
        model.device.type == "cpu" and is_compiled(dtype, _head_dim(config))
    )
    if not pays or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    _register()
    model.set_attn_implementation(ATTENTION)
    return True


def _head_dim(config: Any) -> int:
    given: int | None = getattr(config, "head_dim", None)
    if given:
        return given
    width, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 0)
    return width // heads if heads else 0


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` computes.

    Args:
        module: The attention layer.
        query: (B, heads, T, D).
        key: (B, key heads, S, D).
        value: (B, key heads, S, D).
        attention_mask: As `sdpa` takes it.
        settings: Dropout, scale and what else transformers passes.

    Returns:
        (B, T, heads, D) in query's dtype, and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wide = is_wide(query.dtype, query.device.type)
    ours = wide or (query.device.type == "cpu" and is_compiled(query.dtype, query.shape[-1]))
    if attention_mask is None and not getattr(module, "is_causal", True):
        ours = False  # each token sees all others
    if ours and takes(query, key, value, attention_mask, settings):
        return lean_attention(query, key, value, attention_mask, settings.get("scaling")), None
    if not wide:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return plain
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    floats = (part.float() for part in (query, key, value))
    output, _ = sdpa_attention_forward(module, *floats, attention_mask, **settings)
    return output.to(query.dtype), None
