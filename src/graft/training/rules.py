"""Update rules with state in the tensors' own type: AdamW and SGD by torch's fused kernels, and Lion."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.training.config import TrainingConfig
from graft.training.pages import Part, Work

VECTOR = 16
"""A multiple of the numbers in a vector of any processor."""

IN_CACHE, AT_ONCE = 1 << 18, 1 << 23
"""Numbers updated together on a CPU: in several passes, so that they stay in its cache; in one."""


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) in one fused pass; two moments."""

    parts = (Part("exp_avg"), Part("exp_avg_sq"))
    block, numbers = VECTOR, AT_ONCE
    counts = True

    def __init__(self, config: TrainingConfig) -> None:
        self._betas = (config.adam_beta1, config.adam_beta2)
        self._epsilon = config.adam_epsilon

    def update(self, work: Work) -> None:
        """One step; bit for bit that of torch.optim.AdamW(fused=True)."""
        device = work.values[0].device
        steps = {n: torch.tensor(float(n), dtype=torch.float32, device=device) for n in set(work.counts)}
        torch._fused_adamw_(
            work.values,
            work.gradients,
            work.pieces["exp_avg"],
            work.pieces["exp_avg_sq"],
            [],
            [steps[count] for count in work.counts],
            lr=work.rate,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=work.weight_decay,
            eps=self._epsilon,
            amsgrad=False,
            maximize=False,
        )


class SGD:
    """Gradient descent with momentum and decoupled decay (SGDW, arXiv:1711.05101), fused."""

    block, numbers = VECTOR, AT_ONCE
    counts = False

    def __init__(self, config: TrainingConfig) -> None:
        self._momentum = config.sgd_momentum
        self.parts = (Part("momentum_buffer"),) if self._momentum else ()

    def update(self, work: Work) -> None:
        """One step. The momentum begins at zero, so that the first sum is the gradient."""
        # Here and not by torch, whose SGD adds the decay to the gradient and so to the momentum.
        _decay(work)
        torch._fused_sgd_(
            work.values,
            work.gradients,
            work.pieces.get("momentum_buffer", []),
            weight_decay=0.0,
            momentum=self._momentum,
            lr=work.rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


class Lion:
    """The sign of a mean of momentum and gradient (Chen et al., arXiv:2302.06675); one moment."""

    parts = (Part("exp_avg"),)
    block, numbers = VECTOR, IN_CACHE
    counts = False

    def __init__(self, config: TrainingConfig) -> None:
        self._betas = (config.lion_beta1, config.lion_beta2)

    def update(self, work: Work) -> None:
        """One step."""
        first, second = self._betas
        momenta: list[Tensor] = work.pieces["exp_avg"]
        _decay(work)
        direction = torch._foreach_mul(momenta, first)
        torch._foreach_add_(direction, work.gradients, alpha=1.0 - first)
        torch._foreach_sign_(direction)
        torch._foreach_add_(work.values, direction, alpha=-work.rate)
        torch._foreach_mul_(momenta, second)
        torch._foreach_add_(momenta, work.gradients, alpha=1.0 - second)


def _decay(work: Work) -> None:
    if work.weight_decay:
        torch._foreach_mul_(work.values, 1.0 - work.rate * work.weight_decay)
