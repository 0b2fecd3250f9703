"""The change that an adapter makes to one layer's weight: in float64, as two factors where it has them.

Shapes: delta (out, in) = up (out, n) times down (n, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.adapters.effect import factors
from graft.models.layers import BaseLayer


@dataclass(frozen=True)
class Product:
    """A delta as two factors, float64."""

    down: Tensor
    """(n, in)."""
    up: Tensor
    """(out, n)."""

    @property
    def rank(self) -> int:
        """Rows of down: the rank of the delta, or more."""
        return len(self.down)

    @property
    def is_wide(self) -> bool:
        """Whether the factors are larger than what any matrix of this shape needs."""
        return self.rank > min(len(self.up), self.down.shape[1])


Delta = Product | Tensor
"""Two factors, or the (out, in) matrix."""


def delta_of(layer: Any, base: BaseLayer) -> Delta:
    """The delta of an additive adapter layer.

    Args:
        layer: In float64, on the CPU.
        base: The layer below; its weight is not read.

    Cost: none for a layer of two factors; else memory for the (out, in) matrix.
    """
    with torch.no_grad():
        pair = factors(layer)
        if pair is not None:
            return Product(pair[0], pair[1] * float(getattr(layer, "scaling", 1.0)))
        if hasattr(layer, "update_factors"):
            return Product(*layer.update_factors())
        zeros = torch.zeros(base.out_features, base.in_features, dtype=torch.float64)
        dense: Tensor = layer.merged_weight(base, zeros)
        return dense


def dense(delta: Delta) -> Tensor:
    """The (out, in) matrix."""
    return delta.up @ delta.down if isinstance(delta, Product) else delta


def norm(delta: Delta) -> float:
    """The Frobenius norm; of a product through QR, without the (out, in) matrix."""
    if isinstance(delta, Product):
        right, left = (torch.linalg.qr(x, mode="r").R for x in (delta.down.mT, delta.up))
        delta = left @ right.mT
    return float(torch.linalg.vector_norm(delta))


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """The sum of weight_i * delta_i: factors on top of each other where all are products.

    (B_1 A_1) w_1 + (B_2 A_2) w_2 = [w_1 B_1, w_2 B_2] [A_1; A_2], which has no terms B_1 A_2: the sum of two
    products is not the product of two sums.
    """
    products = [delta for delta in deltas if isinstance(delta, Product)]
    if len(products) == len(deltas):
        return Product(
            torch.cat([one.down for one in products]),
            torch.cat([one.up * weight for one, weight in zip(products, weights, strict=True)], dim=1),
        )
    total = dense(deltas[0]) * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += dense(delta) * weight
    return total
