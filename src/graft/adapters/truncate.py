"""The best approximation of a delta in a given rank: its leading singular triplets (Eckart, Young, 1936)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.adapters.deltas import Delta, Product

NOISE = float(torch.finfo(torch.float32).eps)
"""Singular values below this share of what was summed are what rounding left of zero."""


@dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition: delta = left diag(values) right."""

    left: Tensor
    """(out, n), orthonormal columns."""
    values: Tensor
    """(n,), falling; those that are noise are left out."""
    right: Tensor
    """(n, in), orthonormal rows."""

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps so large a share of ||delta||_F^2; at least 1.

        Args:
            energy: Above 0, at most 1; 1 keeps all that is not noise.
        """
        squares = self.values.square()
        tails = squares.flip(0).cumsum(0).flip(0)  # tails[r] is what rank r loses
        lost = (1 - energy) * float(tails[0]) if len(tails) else 0.0
        return max(int((tails > lost).sum()), 1)

    def truncated(self, rank: int) -> Product:
        """The leading triplets as two factors of the same norm."""
        roots = self.values[:rank].sqrt()
        return Product(roots[:, None] * self.right[:rank], self.left[:, :rank] * roots)


def spectrum(delta: Delta, scale: float) -> Spectrum:
    """Decompose a delta.

    Of a product B A with QR decompositions B = Q_B R_B and A' = Q_A R_A only the core R_B R_A' is decomposed,
    which is as small as the rank. Of a matrix it is the smaller of D D' and D' D, whose eigenvalues are the
    squares; in float64 that tells singular values down to 1e-8 of the largest.

    Args:
        delta: What to decompose, float64.
        scale: Norm of what was summed up in it, which rounding is measured by.

    Cost: 4 n^2 (out + in) and some 20 n^3 operations for a product of n columns; 4 m^2 M and some 9 m^3 for a
    matrix with sides m <= M.
    """
    if isinstance(delta, Product):
        left, core_left = torch.linalg.qr(delta.up)
        right, core_right = torch.linalg.qr(delta.down.mT)
        inner_left, values, inner_right = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
        found = Spectrum(left @ inner_left, values, inner_right @ right.mT)
    elif len(delta) <= delta.shape[1]:
        found = _of_wide(delta)
    else:
        turned = _of_wide(delta.mT)
        found = Spectrum(turned.right.mT, turned.values, turned.left.mT)
    kept = int((found.values > NOISE * scale).sum())
    return Spectrum(found.left[:, :kept], found.values[:kept], found.right[:kept])


def _of_wide(matrix: Tensor) -> Spectrum:
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    left = vectors.flip(1)
    scaled = left.mT @ matrix
    values = torch.linalg.vector_norm(scaled, dim=1)
    order = values.argsort(descending=True, stable=True)
    values = values[order]
    safe = values.clamp(min=torch.finfo(values.dtype).tiny)
    return Spectrum(left[:, order], values, scaled[order] / safe[:, None])


def joined_error(errors: list[float], norms: list[float]) -> float:
    """The relative Frobenius error of all layers together, from that of each."""
    lost = math.hypot(*(error * size for error, size in zip(errors, norms, strict=True)))
    return lost / math.hypot(*norms) if any(norms) else 0.0
