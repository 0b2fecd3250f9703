"""Learning rates equal those of transformers' schedules."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from graft.training.schedule import learning_rate_at


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_equals_transformers(shape: str, warmup_steps: int) -> None:
    peak, steps = 3e-4, 40
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    name = "constant_with_warmup" if shape == "constant" else shape
    peer = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    for step in range(steps):
        ours = learning_rate_at(step, peak=peak, num_steps=steps, warmup_steps=warmup_steps, shape=shape)
        if step >= warmup_steps:
            assert ours == pytest.approx(peer.get_last_lr()[0], rel=1e-12, abs=1e-18)
        else:
            # The peer's first step has rate zero; ours moves from the first step on.
            assert ours == pytest.approx(peak * (step + 1) / warmup_steps)
        optimizer.step()
        peer.step()


def test_floor() -> None:
    rates = [
        learning_rate_at(step, peak=1.0, num_steps=10, warmup_steps=0, shape="cosine", min_ratio=0.1)
        for step in range(11)
    ]
    assert rates[0] == 1.0
    assert rates[10] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
