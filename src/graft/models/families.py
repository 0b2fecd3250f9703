"""What differs between families of models: where the layers are, and what comes after the output head.

Everything else about an architecture is transformers' business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.config import did_you_mean
from graft.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One kind of model, by transformers' model_type."""

    model_type: str
    layers: str
    """Path of the list of decoder layers from the causal language model."""

    softcap: str = ""
    """Config field of the cap c in c * tanh(logits / c), where logits are capped."""

    multiplier: str = ""
    """Config field that logits are multiplied by."""

    divisor: str = ""
    """Config field that logits are divided by."""

    mixture: bool = False
    """Whether layers hold experts that a router chooses from."""

    blind: bool = False
    """Whether the model builds its masks without looking at position ids, so that they are built for it."""


_LLAMA_LIKE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "smollm3",
    "olmo2",
    "stablelm",
    "starcoder2",
)
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")

FAMILIES: dict[str, Family] = {
    **{name: Family(name, "model.layers") for name in _LLAMA_LIKE},
    **{name: Family(name, "model.layers", mixture=True) for name in _MIXTURES},
    "gpt_oss": Family("gpt_oss", "model.layers", mixture=True, blind=True),
    "granitemoe": Family("granitemoe", "model.layers", divisor="logits_scaling", mixture=True),
    "gemma2": Family("gemma2", "model.layers", softcap="final_logit_softcapping"),
    "gemma3_text": Family("gemma3_text", "model.layers", softcap="final_logit_softcapping"),
    "cohere": Family("cohere", "model.layers", multiplier="logit_scale"),
    "granite": Family("granite", "model.layers", divisor="logits_scaling"),
    "gpt2": Family("gpt2", "transformer.h"),
    "gpt_neox": Family("gpt_neox", "gpt_neox.layers"),
}
"""The families that are tested, by model_type."""

_LAYER = re.compile(
    r"(?:^|\.)(?:"
    + "|".join(sorted({re.escape(family.layers) for family in FAMILIES.values()}))
    + r")\.(\d+)(?:\.|$)"
)


def family_of(model: Any) -> Family:
    """The family of a model.

    Args:
        model: A transformers causal language model, with or without adapters.

    Returns:
        Its record in `FAMILIES`.

    Raises:
        ModelError: The family is not one of them.
    """
    kind = str(model.config.model_type)
    if kind not in FAMILIES:
        raise ModelError(
            f"the family {kind!r} is not among those that graft knows",
            where=type(model).__name__,
            fix=did_you_mean(kind, FAMILIES),
        )
    return FAMILIES[kind]


def layer_index(module_path: str) -> int | None:
    """Which decoder layer a module belongs to, from its path; None outside of the layers.

    Args:
        module_path: Such as "model.layers.3.self_attn.q_proj"; a prefix before it does no harm.
    """
    match = _LAYER.search(module_path)
    return int(match.group(1)) if match else None


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The decoder's output after its final norm, without logits and without a key-value cache.

    Args:
        model: A causal language model of a known family, with or without adapters, dense or quantized.
        input_ids: (B, T) long; rows may hold several documents.
        position_ids: (B, T) long. Where they restart, a new document begins, and it sees nothing of the one
            before it. None counts from 0.

    Returns:
        (B, T, H) in the model's dtype.

    Raises:
        ModelError: The family is not known.
    """
    family = family_of(model)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    masks = {"attention_mask": _masks(model, position_ids)} if family.blind else {}
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **masks)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _masks(model: Any, position_ids: Tensor) -> dict[str, Tensor | None]:
    """One mask for each kind of attention layer; documents are told apart by their position ids."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    shape = (*position_ids.shape, 0)
    facts: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": torch.empty(shape, dtype=model.dtype, device=position_ids.device),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids,
    }
    return {
        "full_attention": create_causal_mask(**facts),
        "sliding_attention": create_sliding_window_causal_mask(**facts),
    }


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits from hidden states, as the model itself makes them.

    Args:
        model: As for `hidden_states`.
        hidden: (..., H); any choice of positions.

    Returns:
        (..., V) in the model's dtype: `head(model, hidden_states(model, ids))` is `model(ids).logits`. Of a
        sequence classifier (..., classes), at every position.

    Raises:
        ModelError: The family is not known.
    """
    family = family_of(model)
    if (classify := getattr(model, "score", None)) is not None:
        scores: Tensor = classify(hidden)
        return scores
    logits: Tensor = model.get_output_embeddings()(hidden)
    if family.multiplier:
        logits = logits * getattr(model.config, family.multiplier)
    if family.divisor:
        logits = logits / getattr(model.config, family.divisor)
    cap = getattr(model.config, family.softcap, None) if family.softcap else None
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
