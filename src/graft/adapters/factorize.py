"""Matrices to two factors of low rank: what adapters can start from. Functions of tensors alone.

Shapes: a weight or gradient is (out, in), lora_A (rank, in), lora_B (out, rank). Factors are float32, on the
device of what they are made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from graft.quant.tensor import QuantizedTensor

OVERSAMPLING = 8
"""Directions beyond the rank that a randomized SVD looks at."""

SHARP = 8
"""Power iterations of a randomized SVD that stands for the exact one where that would take hours."""

STABLE_GAMMA = 16.0
"""The constant gamma of LoRA-GA's scale (arXiv:2407.05000, sec. 3)."""

Factors = tuple[Tensor, Tensor]
"""lora_A and lora_B."""


def principal_factors(
    weight: Tensor,
    rank: int,
    scaling: float,
    *,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """The best approximation of a weight of a rank, as scaling * B A with the singular values shared evenly.

    With W = U S V': A = sqrt(S_r / scaling) V_r', B = U_r sqrt(S_r / scaling).

    Args:
        weight: W.
        rank: At most the smaller side of W.
        scaling: The adapter's factor on B A.
        iterations: Power iterations of a randomized SVD; None for the exact one.
        generator: What a randomized SVD draws from, on the CPU.

    Cost: the exact SVD takes some 10 out in min(out, in) operations; see `randomized_svd` for the other.

    Source: PiSSA, arXiv:2404.02948, sec. 3.
    """
    weight = weight.float()
    if iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = randomized_svd(weight, rank, iterations, generator)
    shares = (values[:rank] / scaling).sqrt()
    return shares[:, None] * right[:rank], left[:, :rank] * shares


def randomized_svd(
    matrix: Tensor, rank: int, iterations: int = SHARP, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a matrix from its products with few random vectors.

    Args:
        matrix: (out, in), float32 or float64.
        rank: How many triplets.
        iterations: Each sharpens the decay of the singular values by their square.
        generator: Where the vectors come from, on the CPU; None takes the same ones every time.

    Returns:
        U (out, k), S (k,), V' (k, in) with k = rank, or the smaller side of the matrix if that is less.

    Cost: 4 (iterations + 1) out in rank operations.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, alg. 4.4 and 5.1.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    width = min(rank + OVERSAMPLING, *matrix.shape)
    probes = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ probes).Q
    for _ in range(iterations):  # orthonormal each time: powers alone would lose the small directions
        basis = torch.linalg.qr(matrix.t() @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    inner, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ inner)[:, :rank], values[:rank], right[:rank]


def leading_columns_factors(weight: Tensor, rank: int) -> Factors:
    """The first `rank` columns of Q and rows of R of W = Q R: lora_B and lora_A.

    Only the first columns of W decide these columns of Q, so nothing else is decomposed.

    Args:
        weight: W.
        rank: At most the smaller side of W.

    Cost: 4 out in rank operations.

    Source: OLoRA, arXiv:2406.01775, sec. 3.
    """
    weight = weight.float()
    basis = torch.linalg.qr(weight[:, :rank]).Q
    return basis.t() @ weight, basis


def gradient_factors(gradient: Tensor, rank: int) -> Factors:
    """Factors along which a first step follows the gradient of the whole weight.

    With G = U S V': A = c V_{1..r}', B = c U_{r+1..2r} with c = out^(1/4) / sqrt(16).

    Args:
        gradient: dL/dW, of any scale.
        rank: At most half the smaller side of W.

    Cost: a randomized SVD of twice the rank.

    Source: LoRA-GA, arXiv:2407.05000, sec. 3.
    """
    left, _, right = randomized_svd(gradient.float(), 2 * rank)
    scale = gradient.shape[0] ** 0.25 / math.sqrt(STABLE_GAMMA)
    return scale * right[:rank], scale * left[:, rank : 2 * rank]


def orthogonal_factors(
    rank: int, in_features: int, out_features: int, generator: torch.Generator | None
) -> Factors:
    """Two random factors that are not zero, and whose product is.

    The rows of A and the columns of B lie in two halves of an orthogonal basis of rank-space.

    Args:
        rank: Even.
        in_features: Columns of A.
        out_features: Rows of B.
        generator: Where they come from, on the CPU.

    Source: the `orthogonal` start of PEFT, whose scale of 1/10 this has.
    """
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    half = rank // 2
    down = basis[:, :half] @ torch.randn(half, in_features, generator=generator)
    up = torch.randn(out_features, half, generator=generator) @ basis[:, half:].t()
    return down / 10, up / 10


def rounding_factors(
    weight: Tensor,
    rounded: Callable[[Tensor], QuantizedTensor],
    rank: int,
    scaling: float,
    iterations: int = 1,
) -> tuple[QuantizedTensor, Factors, list[float]]:
    """A rounded weight and factors that make up for its rounding: W is near Q + scaling * B A.

    In turn Q is W - scaling * B A rounded, and scaling * B A the best approximation of W - Q. With few bits
    the error may rise again; the best of all rounds is what is returned.

    Args:
        weight: W before it was rounded.
        rounded: Quantizes a weight.
        rank: At most the smaller side of W.
        scaling: The adapter's factor on B A.
        iterations: Rounds. With one, Q is the plain rounding of W.

    Returns:
        Q; lora_A and lora_B; the error ||W - Q - scaling * B A|| / ||W|| after each round.

    Cost: a randomized SVD for each round.

    Source: LoftQ, arXiv:2310.08659, alg. 1, which has no scaling; here the factors are divided by its root.
    """
    weight = weight.float()
    update, best, errors = torch.zeros_like(weight), None, list[float]()
    for _ in range(iterations):
        base = rounded(weight - update)
        lost = weight - base.dequantize(torch.float32)
        factors = principal_factors(lost, rank, scaling, iterations=SHARP)
        update = scaling * (factors[1] @ factors[0])
        errors.append(float((lost - update).norm() / weight.norm().clamp(min=1e-30)))
        if errors[-1] == min(errors):
            best = base, factors
    assert best is not None, "at least one round"
    return *best, errors
