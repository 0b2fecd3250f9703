"""How far the next-token distributions of one model are from those of another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from graft.adapters.probe import Probe
from graft.models.families import FAMILIES, head, hidden_states

_CHUNK = 64
"""Positions that are compared at a time, in float64."""


@dataclass(frozen=True)
class Likeness:
    """Means over the positions of a probe."""

    kl: float
    """Mean Kullback-Leibler divergence KL(live || other), nats a token."""
    flips: float
    """Share of positions where the most likely token is another one."""
    gap: float
    """Largest absolute difference of a logit."""

    def to_dict(self) -> dict[str, float]:
        """As JSON values."""
        return asdict(self)


def probe_logits(model: Any, probe: Probe) -> Tensor:
    """Logits (positions, vocabulary), fp32, on the CPU.

    Args:
        model: A causal language model, with or without adapters.
        probe: What it reads.

    Cost: the logits; of families that graft does not know those of all tokens at once.
    """
    batch = probe.batch.to(model.device)
    chosen = probe.positions.to(model.device)
    with torch.inference_mode():
        if model.config.model_type in FAMILIES:
            logits = head(model, hidden_states(model, batch.input_ids, batch.position_ids)[chosen])
        else:
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[chosen]
    return logits.float().cpu()


def likeness(live: Tensor, other: Tensor) -> Likeness:
    """Compare logits (positions, vocabulary) with those of the live model."""
    kl = gap = flips = 0.0
    for one, two in zip(live.split(_CHUNK), other.split(_CHUNK), strict=True):
        first, second = one.double().log_softmax(-1), two.double().log_softmax(-1)
        kl += float((first.exp() * (first - second)).sum())
        flips += int((one.argmax(-1) != two.argmax(-1)).sum())
        gap = max(gap, float((one - two).abs().max()))
    return Likeness(max(0.0, kl / len(live)), flips / len(live), gap)
