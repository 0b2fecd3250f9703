"""Factors that adapters start from, each against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graft.adapters.factorize import (
    OVERSAMPLING,
    gradient_factors,
    leading_columns_factors,
    orthogonal_factors,
    principal_factors,
    randomized_svd,
    rounding_factors,
)
from graft.quant.config import QuantizationConfig
from graft.quant.tensor import QuantizedTensor, quantize

SHAPES = ((24, 40), (40, 24))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(out: int, into: int, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """A matrix with singular values 1, 2^-p, 3^-p, ... and these."""
    side = min(out, into)
    left = torch.linalg.qr(torch.randn(out, side, generator=seeded(1), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(into, side, generator=seeded(2), dtype=torch.float64)).Q
    values = torch.arange(1, side + 1, dtype=torch.float64) ** -power
    return ((left * values) @ right.T).float(), values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [1.0, 0.25, 2.0])
def test_principal_factors_are_the_best_of_their_rank(shape: tuple[int, int], scaling: float) -> None:
    weight, values = decaying(*shape)
    down, up = principal_factors(weight, 5, scaling)
    # Eckart and Young: what is left has the norm of the singular values that were left out.
    left = weight - scaling * up @ down
    assert float(left.norm()) == pytest.approx(float(values[5:].norm()), rel=1e-5)
    assert float(torch.linalg.matrix_norm(left, 2)) == pytest.approx(float(values[5]), rel=1e-5)
    share = (values[:5].float() / scaling).sqrt()
    torch.testing.assert_close(down.norm(dim=1), share, rtol=1e-5, atol=0)
    torch.testing.assert_close(up.norm(dim=0), share, rtol=1e-5, atol=0)


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_a_randomized_svd_keeps_its_bound(iterations: int) -> None:
    """Halko, Martinsson and Tropp, theorem 10.6 and corollary 10.10, for the mean over draws."""
    weight, values = decaying(120, 90, power=0.7)
    rank, over = 10, OVERSAMPLING
    power = 2 * iterations + 1
    tail = values[rank:] ** power
    bound = (1 + math.sqrt(rank / (over - 1))) * float(tail[0])
    bound += math.e * math.sqrt(rank + over) / over * float(tail.norm())
    errors = []
    for seed in range(10):
        left, found, right = randomized_svd(weight, rank + over, iterations, seeded(seed))
        assert found.shape == (rank + over,)
        # Cut to the rank, at most the first value left out comes on top (theorem 9.3).
        kept = (left[:, :rank] * found[:rank]) @ right[:rank]
        errors.append(float(torch.linalg.matrix_norm(weight - kept, 2)))
    best = float(values[rank])
    assert best * (1 - 1e-5) <= min(errors)
    assert sum(errors) / len(errors) <= bound ** (1 / power) + best
    if iterations == 4:
        assert max(errors) <= best * 1.02


def test_a_randomized_svd_comes_from_its_generator_and_nears_the_exact_one() -> None:
    weight, _ = decaying(60, 50)
    torch.manual_seed(5)
    first = principal_factors(weight, 4, 2.0, iterations=8, generator=seeded(3))
    torch.manual_seed(6)
    again = principal_factors(weight, 4, 2.0, iterations=8, generator=seeded(3))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    exact = principal_factors(weight, 4, 2.0)
    torch.testing.assert_close(first[1] @ first[0], exact[1] @ exact[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_columns_are_those_of_the_whole_qr(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=seeded())
    down, up = leading_columns_factors(weight, 6)
    whole = torch.linalg.qr(weight)
    torch.testing.assert_close(up, whole.Q[:, :6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(down, whole.R[:6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((up @ down)[:, :6], weight[:, :6], atol=1e-5, rtol=1e-5)


def test_orthogonal_factors_cancel_and_neither_is_zero() -> None:
    down, up = orthogonal_factors(8, 1024, 768, seeded())
    assert float((up @ down).norm()) < 1e-6 * float(up.norm() * down.norm())
    assert torch.linalg.matrix_rank(down) == torch.linalg.matrix_rank(up) == 4
    # Rows of A mix 4 normal rows with 8 weights whose squares sum to 4, over 10.
    assert float(down.std()) == pytest.approx(math.sqrt(0.5) / 10, rel=0.05)
    assert float(up.std()) == pytest.approx(math.sqrt(0.5) / 10, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_factors_make_the_first_step_the_best_of_twice_their_rank(shape: tuple[int, int]) -> None:
    gradient, values = decaying(*shape)
    rank, scaling, rate = 3, 2.0, 1e-4
    down, up = gradient_factors(gradient, rank)
    size = math.sqrt(shape[0] ** 0.5 / 16)
    torch.testing.assert_close(down @ down.T, size**2 * torch.eye(rank), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(up.T @ up, size**2 * torch.eye(rank), atol=1e-5, rtol=1e-5)
    # One step of SGD on A and B, each with its own gradient of a loss whose gradient by W is G.
    new_down = down - rate * scaling * up.T @ gradient
    new_up = up - rate * scaling * gradient @ down.T
    step = scaling * (new_up @ new_down - up @ down)
    left, found, right = torch.linalg.svd(gradient, full_matrices=False)
    best = (left[:, : 2 * rank] * found[: 2 * rank]) @ right[: 2 * rank]
    expected = -rate * scaling**2 * size**2 * best
    assert float((step - expected).norm() / expected.norm()) < 1e-2  # of second order in the rate
    alignment = -float((step * gradient).sum() / (step.norm() * gradient.norm()))
    assert alignment == pytest.approx(float(values[: 2 * rank].norm() / values.norm()), rel=1e-2)


def rounding(quant_type: str) -> Callable[[Tensor], QuantizedTensor]:
    config = QuantizationConfig(quant_type=quant_type)  # type: ignore[arg-type]
    return lambda weight: quantize(weight, config)


@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_what_rounding_lost_is_made_up_for_whatever_the_scaling(quant_type: str, scaling: float) -> None:
    weight = torch.randn(192, 128, generator=seeded())
    rounded = rounding(quant_type)
    plain = rounded(weight).dequantize()
    before = float((weight - plain).norm() / weight.norm())
    base, (down, up), errors = rounding_factors(weight, rounded, 16, scaling, 5)
    assert float((weight - base.dequantize() - scaling * up @ down).norm() / weight.norm()) == pytest.approx(
        errors[-1]
    )
    assert [before, *errors] == sorted([before, *errors], reverse=True)
    assert errors[-1] < 0.93 * errors[0] < 0.93 * before
    # One round is the plain rounding, and the best that a rank can do on it.
    first, (down, up), (error,) = rounding_factors(weight, rounded, 16, scaling)
    assert torch.equal(first.dequantize(), plain)
    assert error == errors[0]
    # The decomposition is a randomized one, and what rounding loses has a flat spectrum.
    tail = float(torch.linalg.svdvals(weight - plain)[16:].norm() / weight.norm())
    assert tail * (1 - 1e-5) <= error <= tail * 1.001


def test_the_best_round_is_kept_where_errors_rise_again() -> None:
    weight = torch.randn(128, 128, generator=seeded())
    base, (down, up), errors = rounding_factors(weight, rounding("nf2"), 16, 1.0, 8)
    assert errors != sorted(errors, reverse=True), "the case has become one where errors only fall"
    assert float((weight - base.dequantize() - up @ down).norm() / weight.norm()) == pytest.approx(
        min(errors)
    )
