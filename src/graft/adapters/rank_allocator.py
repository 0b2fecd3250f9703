"""Which ranks AdaLoRA takes away, chosen over all layers together while a run goes on.

Source: AdaLoRA, arXiv:2303.10512, sections 3.2 and 3.3, algorithm 1. The penalty is the one of the authors'
code, the mean of norms; the paper writes a sum of their squares, which grows with the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from graft.adapters.adalora import AdaLoraConfig, BudgetSchedule
    from graft.adapters.adalora_layer import AdaLoraLayer


class RankAllocator:
    """The steering of an AdaLoRA adapter; see `graft.adapters.base.Steering`.

    The sensitivity of a number w is |w dL/dw|, about what the loss would change by if w were zero. It is
    smoothed over the steps, and so is its distance from the smoothed value, the uncertainty; the importance
    of w is the product of both. That of a triplet is that of its E and the means over its P and its Q.

    Args:
        layers: By path.
        config: Their settings.
        schedule: The budget.
        settled: Whether the ranks are chosen already and only stay as they are.

    Cost: two float32 numbers for each that trains, and about seven passes over them in each step before the
    last choice; the penalty needs 2 rank^2 (in + out) operations for each layer.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaLoraLayer],
        config: AdaLoraConfig,
        schedule: BudgetSchedule,
        *,
        settled: bool = False,
    ) -> None:
        self.layers = {path: layer for path, layer in layers.items() if len(layer.lora_E)}
        self.schedule, self.settled = schedule, settled
        self._beta1, self._beta2 = config.beta1, config.beta2
        self._weight = config.orthogonal_weight
        self._parameters = {
            f"{path}.{leaf}": tensor
            for path, layer in self.layers.items()
            for leaf, tensor in layer.tensors().items()
        }
        tracked = {} if settled else self._parameters
        self.sensitivity = {name: torch.zeros_like(p.detach()) for name, p in tracked.items()}
        self.uncertainty = {name: torch.zeros_like(p.detach()) for name, p in tracked.items()}
        self._penalty: Tensor | None = None
        self._num_left: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name; a run that goes on copies it back in place."""
        return {
            **{f"{name}.sensitivity": value for name, value in self.sensitivity.items()},
            **{f"{name}.uncertainty": value for name, value in self.uncertainty.items()},
        }

    def regularization(self) -> Tensor | None:
        """The penalty of this step: its weight times the mean of ||P'P - I|| and ||QQ' - I||, differentiable.

        Returns:
            None where it has no weight.
        """
        if not self._weight or not self.layers:
            return None
        norms = []
        for group in self._alike():
            gram = group @ group.mT
            gram = gram - torch.eye(gram.shape[-1], device=gram.device)
            norms.append(torch.linalg.vector_norm(gram, dim=(1, 2)))
        penalty = torch.cat(norms).mean() * self._weight
        self._penalty = penalty.detach()
        return penalty

    def _alike(self) -> Iterator[Tensor]:
        """Q and P' of all layers, (n, rank, width) of one shape at a time."""
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for layer in self.layers.values():
            for matrix in (layer.lora_A, layer.lora_B.t()):
                groups.setdefault((matrix.device, *matrix.shape), []).append(matrix)
        for matrices in groups.values():
            yield torch.stack(matrices)

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Note the sensitivities, with the gradients of the whole step there, not clipped.

        Args:
            step: The step that is being made, from 1.
        """
        if self.settled or step > self.schedule.last_choice:
            return
        given = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        names = list(given)
        values = [self._parameters[name].detach() for name in names]
        now = torch._foreach_mul(values, list(given.values()))
        torch._foreach_abs_(now)
        smooth = [self.sensitivity[name] for name in names]
        torch._foreach_lerp_(smooth, now, 1 - self._beta1)
        torch._foreach_sub_(now, smooth)
        torch._foreach_abs_(now)
        torch._foreach_lerp_([self.uncertainty[name] for name in names], now, 1 - self._beta2)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Choose ranks where that is due, and take the E of those that are not among them.

        Args:
            step: The step that was made, from 1.
        """
        if not self.settled and self.schedule.is_due(step):
            self._choose(self.schedule.budget(step))
        elif not self.settled and step < self.schedule.last_choice:
            return  # until the next choice those without an E may earn one again
        for layer in self.layers.values():
            layer.lora_E.masked_fill_(layer.kept == 0, 0.0)

    def _choose(self, budget: int) -> None:
        """Keep so many triplets, the most important ones; of equals the first."""
        scores = torch.cat([self.importance(path) for path in self.layers])
        best = scores.argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros_like(scores)
        kept[best] = 1
        parts = kept.split([len(layer.kept) for layer in self.layers.values()])
        for layer, part in zip(self.layers.values(), parts, strict=True):
            layer.kept.copy_(part[:, None])
        self._num_left = None

    def importance(self, path: str) -> Tensor:
        """Of each triplet of a layer, (rank,)."""
        scores = {
            leaf: self.sensitivity[f"{path}.{leaf}"] * self.uncertainty[f"{path}.{leaf}"]
            for leaf in ("lora_A", "lora_B", "lora_E")
        }
        return scores["lora_E"].view(-1) + scores["lora_A"].mean(1) + scores["lora_B"].mean(0)

    def figures(self) -> dict[str, float]:
        """For the log: the penalty of the last step, and how many ranks are left."""
        if self._num_left is None:
            self._num_left = sum(int(layer.kept.sum()) for layer in self.layers.values())
        found: dict[str, float] = {"ranks": self._num_left}
        if self._penalty is not None:
            found["regularization"] = float(self._penalty)
        return found
