"""Adapters as plain LoRA over their original base, which is what files hold.

Source: the conversion of PiSSA, arXiv:2404.02948, appendix C.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor, nn

from graft.adapters.attached import Adapter, adapter_tensors, start_tensors
from graft.adapters.effect import adapted_layers
from graft.adapters.settings import pair, without_start


def plain_form(model: nn.Module, known: Adapter) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter that starts at zero with the same update, and its tensors.

    Updates that are measured from a start, s (B A - B0 A0), are those of [A; A0] and [B, -B0], of twice the
    rank, with an alpha that keeps s. An adapter without a start is given as it is.

    Args:
        model: The model that carries it.
        known: The adapter.

    Returns:
        The adapter with the settings of the plain form, and tensors by the keys of `adapter_tensors`.
    """
    tensors: dict[str, Tensor] = dict(adapter_tensors(model, known.name))
    if not start_tensors(model, known.name):
        return known, tensors
    for path, layer in adapted_layers(model, known.name).items():
        down, up = layer.factors
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    return dataclasses.replace(known, config=of_twice_the_rank(known.config)), tensors


def of_twice_the_rank(config: Any) -> Any:
    """Settings with twice the rank everywhere, the scaling of each layer unchanged, without a start.

    Args:
        config: Settings of LoRA.
    """
    factor = math.sqrt(2) if config.use_rslora else 2.0
    ranks = [pair(item, "adapter.rank_pattern") for item in config.rank_pattern]
    alphas = [pair(item, "adapter.alpha_pattern") for item in config.alpha_pattern]
    return dataclasses.replace(
        without_start(config),
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern=tuple(f"{pattern}={2 * int(rank)}" for pattern, rank in ranks),
        alpha_pattern=tuple(f"{pattern}={factor * alpha!r}" for pattern, alpha in alphas),
    )
