"""Norm, gate and loss: the reference against float64, the compiled ones against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graft import kernels
from graft.errors import ModelError
from graft.kernels import reference_elementwise as reference
from graft.kernels.cpu import elementwise as compiled

STEP = 2.0**-7
"""From one number of bfloat16 to the next."""


def random(*shape: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def halves(*shape: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    return random(*shape, spread=spread, seed=seed).bfloat16()


def nearly_equal(found: Tensor, wanted: Tensor) -> None:
    """The same but for a few numbers that sums in another order round to the neighbour of the right one."""
    assert found.dtype == wanted.dtype
    off = (found != wanted) & ((found - wanted).abs() > 1e-30)  # an exponential ends at e^88
    assert float(off.float().mean()) < 1e-2
    torch.testing.assert_close(found, wanted, rtol=STEP, atol=1e-6)


def test_the_reference_norm_is_the_formula() -> None:
    x, weight, grad = random(3, 7, 32), random(32, seed=1), random(3, 7, 32, seed=2)
    exact = x.double().requires_grad_()
    wanted = weight.double() * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    (slope,) = torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(
        reference.rms_norm(x, weight, eps=1e-3).double(), wanted.detach(), rtol=1e-5, atol=1e-5
    )
    found = reference.rms_norm_backward(grad, x, weight, eps=1e-3)
    torch.testing.assert_close(found.double(), slope, rtol=1e-5, atol=1e-5)


def test_the_reference_gate_is_the_formula() -> None:
    gate, up, grad = random(5, 9, spread=4), random(5, 9, seed=1), random(5, 9, seed=2)
    exact = [part.double().requires_grad_() for part in (gate, up)]
    wanted = exact[0] / (1 + torch.exp(-exact[0])) * exact[1]
    slopes = torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(
        reference.silu_product(gate, up).double(), wanted.detach(), rtol=1e-5, atol=1e-6
    )
    for one, other in zip(reference.silu_product_backward(grad, gate, up), slopes, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [16, 48, 576, 1040])
@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e4])
def test_compiled_norm(tier: str, width: int, spread: float) -> None:
    x, weight, grad = halves(5, 3, width, spread=spread), halves(width, seed=1), halves(5, 3, width, seed=2)
    nearly_equal(compiled.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5))
    found = compiled.rms_norm_backward(grad, x, weight, eps=1e-5).float()
    wanted = reference.rms_norm_backward(grad, x, weight, eps=1e-5).float()
    assert float((found - wanted).norm() / wanted.norm()) < STEP / 4


@pytest.mark.parametrize("width", [5, 577])
def test_a_width_that_is_no_multiple_of_the_lanes(tier: str, width: int) -> None:
    x, weight = halves(3, width), halves(width, seed=1)
    assert torch.equal(compiled.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5))


@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (33,), (4, 100, 77)])
@pytest.mark.parametrize("spread", [1.0, 30.0, 1e5])
def test_compiled_gate(tier: str, shape: tuple[int, ...], spread: float) -> None:
    gate, up, grad = halves(*shape, spread=spread), halves(*shape, seed=1), halves(*shape, seed=2)
    nearly_equal(compiled.silu_product(gate, up), reference.silu_product(gate, up))
    found = compiled.silu_product_backward(grad, gate, up)
    for one, other in zip(found, reference.silu_product_backward(grad, gate, up), strict=True):
        nearly_equal(one, other)


@pytest.mark.parametrize("vocabulary", [1, 7, 16, 264, 4099])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_compiled_loss(tier: str, vocabulary: int, spread: float) -> None:
    logits = halves(9, vocabulary, spread=spread)
    targets = torch.randint(0, vocabulary, (9,), generator=torch.Generator().manual_seed(1))
    exact = logits.double().requires_grad_()
    wanted = functional.cross_entropy(exact, targets, reduction="none")
    (derivative,) = torch.autograd.grad(wanted.sum(), exact)
    slope = torch.empty_like(logits)
    found = compiled.cross_entropy(logits, targets, slope)
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), derivative, rtol=STEP, atol=1e-7)
    assert torch.equal(compiled.cross_entropy(logits, targets), found)


def test_what_is_not_finite_stays_so(tier: str) -> None:
    for value in (math.nan, math.inf):
        x = halves(4, 32)
        x[1, 20] = value
        weight, targets = halves(32, seed=1), torch.tensor([0, 1, 2, 3])
        assert not torch.isfinite(compiled.rms_norm(x, weight, eps=1e-5)[1]).all()
        assert not torch.isfinite(compiled.rms_norm_backward(x, halves(4, 32), weight, eps=1e-5)[1]).all()
        assert not torch.isfinite(compiled.silu_product(x, halves(4, 32))[1, 20])
        assert not torch.isfinite(compiled.silu_product(halves(4, 32), x)[1, 20])
        slope = torch.empty_like(x)
        losses = compiled.cross_entropy(x, targets, slope)
        assert not torch.isfinite(losses[1])
        assert not torch.isfinite(slope[1]).all()
        assert torch.isfinite(losses[[0, 2, 3]]).all()
        assert torch.isfinite(slope[[0, 2, 3]]).all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = halves(4, 32), halves(32)
    with pytest.raises(ModelError, match=r"weight bfloat16 \(31,\) does not fit x bfloat16 \(4, 32\)"):
        kernels.call("rms_norm", x, weight[:31], eps=1e-5)
    with pytest.raises(ModelError, match="grad"):
        kernels.call("rms_norm_backward", x[:3], x, weight, eps=1e-5)
    with pytest.raises(ModelError, match="gate"):
        kernels.call("silu_product", x, x[:3])
    with pytest.raises(ModelError, match="grad"):
        kernels.call("silu_product_backward", x[:3], x, x)
    for target in (-1, 32):
        with pytest.raises(ModelError, match="not a token from 0 to 31"):
            kernels.call("cross_entropy", x, torch.tensor([0, 1, target, 3]))
    with pytest.raises(ModelError, match="targets"):
        kernels.call("cross_entropy", x, torch.tensor([0, 1]))


def test_gates_as_large_as_they_get(tier: str) -> None:
    gate = torch.tensor([-3e38, -1e30, -200.0, -89.0, 89.0, 200.0, 3e38, math.inf, -math.inf] * 3).bfloat16()
    up, grad = halves(27), halves(27, seed=1)
    for found, wanted in (
        ([compiled.silu_product(gate, up)], [reference.silu_product(gate, up)]),
        (compiled.silu_product_backward(grad, gate, up), reference.silu_product_backward(grad, gate, up)),
    ):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=STEP, atol=1e-30, equal_nan=True)
