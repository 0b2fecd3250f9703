"""What a low-rank update looks like, from its factors alone: singular values, ranks, energy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def triangles(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """R_A and R_B of the QR decompositions of A' and of B, in float64.

    B A = Q_B (R_B R_A') Q_A' where Q_B and Q_A have orthonormal columns, so the core in the middle, of size
    rank by rank, has the singular values of the product; R_A has the norm of A, R_B that of B.

    Args:
        down: A, (..., rank, in).
        up: B, (..., out, rank).

    Returns:
        (..., min(rank, in), rank) and (..., min(rank, out), rank).

    Cost: 2 rank^2 (in + out) operations and a copy of the factors in float64; the (out, in) product is never
    made.
    """
    return tuple(torch.linalg.qr(x.double(), mode="r").R for x in (down.mT, up))


def singular_values(triangle_down: Tensor, triangle_up: Tensor) -> Tensor:
    """Singular values of B A from its `triangles`: (..., min(rank, in, out)), falling, float64."""
    return torch.linalg.svdvals(triangle_up @ triangle_down.mT)


def product_values(down: Tensor, up: Tensor) -> Tensor:
    """Singular values of B A for A (rank, in) and B (out, rank), without making it; falling, float64."""
    return singular_values(*triangles(down, up))


def effective_rank(values: Sequence[float]) -> float | None:
    """The exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007).

    1 where one direction does all, the number of values where all are alike; None where all are zero.
    """
    total = math.fsum(values)
    if not total > 0:
        return None
    shares = [value / total for value in values if value > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


def stable_rank(values: Sequence[float]) -> float | None:
    """||M||_F^2 / ||M||_2^2 from the singular values of M, falling; None where all are zero.

    It is 1 where one direction has all the energy, and small directions hardly count in it.
    """
    if not values or not values[0] > 0:
        return None
    return math.fsum((value / values[0]) ** 2 for value in values)


def energy(values: Sequence[float]) -> list[float]:
    """The share of ||M||_F^2 that the first 1, 2, ... singular values hold; empty where all are zero."""
    if stable_rank(values) is None:
        return []
    squares = [(value / values[0]) ** 2 for value in values]
    total = math.fsum(squares)
    return [min(1.0, part / total) for part in itertools.accumulate(squares)]


def rank_for(share: float, values: Sequence[float]) -> int | None:
    """The fewest directions that hold a share of the energy; None where all values are zero.

    Args:
        share: Of ||M||_F^2, up to 1.
        values: Singular values of M, falling.
    """
    held = energy(values)
    # Rounding must not ask for one direction more where a share is met exactly.
    return next((place for place, part in enumerate(held, 1) if part >= share - 1e-12), len(held) or None)
