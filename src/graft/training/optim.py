"""AdamW over the trainable tensors, with state that can be stored by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graft.errors import CheckpointError
from graft.training.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) over named tensors, in one fused pass.

    Args:
        parameters: Trainable tensors by name; their order is the order of the state.
        config: Betas, epsilon and weight decay; decay acts on matrices only.

    Cost: two float32 moments per trained number.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: TrainingConfig) -> None:
        self.parameters = dict(parameters)
        self.max_grad_norm = config.max_grad_norm
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    def gradient_norm(self) -> float:
        """Euclidean norm over all gradients; NaN or infinite if any of them is."""
        norms = torch._foreach_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        return float(torch.linalg.vector_norm(torch.stack(list(norms))))

    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip by the given norm, update every tensor once, and clear the gradients.

        Args:
            learning_rate: For this step.
            gradient_norm: What `gradient_norm` returned; must be finite.
        """
        if self.max_grad_norm and gradient_norm > self.max_grad_norm:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, self.max_grad_norm / gradient_norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients and their memory."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Both moments and the update count of every tensor: "<name>|exp_avg" and so on."""
        stored: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for part, value in self._adamw.state.get(parameter, {}).items():
                stored[f"{name}|{part}"] = value
        return stored

    def load_state(self, stored: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit.

        Raises:
            CheckpointError: A tensor is missing or of another shape.
        """
        for name, parameter in self.parameters.items():
            if f"{name}|step" not in stored:
                if any(key.startswith(f"{name}|") for key in stored):
                    raise CheckpointError(
                        f"optimizer state of {name!r} is incomplete", fix="use an older checkpoint"
                    )
                continue
            state: dict[str, Tensor] = {"step": stored[f"{name}|step"].clone()}
            for part in MOMENTS:
                value = stored.get(f"{name}|{part}")
                if value is None or value.shape != parameter.shape:
                    raise CheckpointError(
                        f"optimizer state {name}|{part} is missing or not of shape {tuple(parameter.shape)}",
                        fix="the checkpoint belongs to another configuration; start a new run",
                    )
                state[part] = value.to(parameter.device).clone()
            self._adamw.state[parameter] = state

    @property
    def state_bytes(self) -> int:
        """Bytes that the moments take now."""
        return sum(value.numel() * value.element_size() for value in self.state().values())
