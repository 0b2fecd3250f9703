"""The optimizer equals AdamW as the paper writes it, and its state comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from graft.errors import CheckpointError
from graft.training.config import TrainingConfig
from graft.training.optim import Optimizer


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "b": (3,), "c": (2, 5)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def set_gradients(params: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equals_the_formula() -> None:
    config = TrainingConfig(weight_decay=0.1, max_grad_norm=1.0, adam_beta2=0.99)
    params = parameters()
    expected = {name: p.detach().double().clone() for name, p in params.items()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    optimizer = Optimizer(params, config)
    for step in range(1, 6):
        set_gradients(params, step)
        gradients = {name: p.grad.double().clone() for name, p in params.items()}
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert optimizer.gradient_norm() == pytest.approx(float(norm), rel=1e-6)
        optimizer.step(1e-2, optimizer.gradient_norm())
        for name, p in expected.items():
            g = gradients[name] * min(1.0, 1.0 / float(norm))
            decay = 0.1 if p.ndim >= 2 else 0.0
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g * g
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            expected[name] = p * (1 - 1e-2 * decay) - 1e-2 * update
            assert torch.allclose(params[name].detach().double(), expected[name], atol=1e-6)
        assert all(p.grad is None for p in params.values())


def test_state_comes_back_bit_for_bit() -> None:
    config = TrainingConfig()
    straight, resumed = parameters(), parameters()
    one, two = Optimizer(straight, config), Optimizer(resumed, config)
    for step in range(3):
        for params, optimizer in ((straight, one), (resumed, two)):
            set_gradients(params, step)
            optimizer.step(1e-2, optimizer.gradient_norm())
    fresh = {name: torch.nn.Parameter(p.detach().clone()) for name, p in resumed.items()}
    three = Optimizer(fresh, config)
    three.load_state(dict(two.state()))
    for step in range(3, 6):
        for params, optimizer in ((straight, one), (fresh, three)):
            set_gradients(params, step)
            optimizer.step(1e-2, optimizer.gradient_norm())
    for name in straight:
        assert torch.equal(straight[name], fresh[name])


def test_incomplete_state_is_refused() -> None:
    params = parameters()
    optimizer = Optimizer(params, TrainingConfig())
    set_gradients(params, 0)
    optimizer.step(1e-2, 1.0)
    stored = dict(optimizer.state())
    del stored["a|exp_avg_sq"]
    with pytest.raises(CheckpointError, match=r"a\|exp_avg_sq"):
        Optimizer(parameters(), TrainingConfig()).load_state(stored)


def test_gradient_norm_shows_nan() -> None:
    params = parameters()
    set_gradients(params, 0)
    params["b"].grad[1] = torch.nan
    assert not torch.isfinite(torch.tensor(Optimizer(params, TrainingConfig()).gradient_norm()))
