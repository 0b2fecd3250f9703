"""Deltas thinned out and combined number by number: magnitude pruning, DARE, TIES.

All of it on true deltas (out, in): a mask on factors would thin their product in whole rows and columns, and
sums of factors have terms that belong to no adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Majority = Literal["total", "frequency"]
"""What elects a sign: the sum of the values, or the number of those of each sign."""


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the largest magnitudes, set the rest to zero.

    Args:
        delta: Any shape.
        density: Share that is kept, rounded down to a whole number of at least one; those that are as large
            as the smallest kept one stay too.

    Source: TIES, arXiv:2306.01708, sec. 4.1, per layer.
    """
    count = max(int(density * delta.numel()), 1)
    sizes = delta.abs()
    least = sizes.flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(sizes >= least, delta, 0.0)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each number with probability density and divide it by that: the mean over seeds is the delta.

    Source: DARE, arXiv:2311.03099, sec. 3.2 (its drop rate is 1 - density).
    """
    keep = torch.rand(delta.shape, generator=generator) < density
    return torch.where(keep, delta / density, 0.0)


def elect(deltas: Sequence[Tensor], weights: Sequence[float], majority: Majority) -> Tensor:
    """The mean over those deltas that agree with the elected sign, number by number.

    The sign is that of the sum of the deltas ("total") or of their signs ("frequency"), plus where that is
    zero; weights act on what agrees, whose number divides.

    Args:
        deltas: Of one shape, thinned out.
        weights: One for each.
        majority: What elects.

    Returns:
        sum of weight_i * delta_i over those that agree, divided by how many they are.

    Source: TIES, arXiv:2306.01708, sec. 4.2 and 4.3.
    """
    votes = torch.zeros_like(deltas[0])
    for delta in deltas:
        votes += delta if majority == "total" else delta.sign()
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign() == elected
        total += torch.where(agrees, delta * weight, 0.0)
        count += agrees
    return total / count.clamp(min=1)
