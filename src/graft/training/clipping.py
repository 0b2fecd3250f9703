"""Clipping: by what each tensor's gradient is multiplied so that norms stay within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from graft.training.groups import Treatment


class Clipping:
    """The bounds of a run.

    Args:
        parameters: What is trained, by name.
        treatments: Of each; their groups are clipped one by one.
        most: Norm of all gradients; 0 for no bound.
        most_of_group: Norm of each group's gradients, which acts first; 0 for no bound.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        treatments: Mapping[str, Treatment],
        most: float,
        most_of_group: float,
    ) -> None:
        self._parameters, self._treatments = parameters, treatments
        self._most, self._most_of_group = most, most_of_group
        self.norms: dict[str, Tensor] = {}

    def norm(self) -> float:
        """Euclidean norm over all gradients, before any clipping; NaN or infinite if any of them is."""
        self.norms = self._by_tensor()  # for whoever shows them
        return _joined(list(self.norms.values()))

    def _by_tensor(self) -> dict[str, Tensor]:
        given = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        return dict(zip(given, torch._foreach_norm(list(given.values())), strict=True))

    def factors(self, norm: float) -> dict[str, float]:
        """Factors by name; those that stay as they are may be left out.

        Args:
            norm: What `norm` returned for these gradients. Groups are measured again.
        """
        if not self._most_of_group:
            if not self._most or norm <= self._most:
                return {}
            return dict.fromkeys(self._parameters, self._most / norm)
        found = self._by_tensor()
        by_group: dict[str, list[Tensor]] = {}
        for name, value in found.items():
            by_group.setdefault(self._treatments[name].group, []).append(value)
        norms = {group: _joined(values) for group, values in by_group.items()}
        scale = {group: min(1.0, self._most_of_group / n) if n else 1.0 for group, n in norms.items()}
        left = math.hypot(*(scale[group] * value for group, value in norms.items()))
        rest = min(1.0, self._most / left) if self._most and left else 1.0
        return {name: scale[self._treatments[name].group] * rest for name in found}


def _joined(norms: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack(norms)))
