"""Whether every trained tensor got a gradient in the first step, where no audit looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from graft.errors import TrainingError


def check_gradients(parameters: Mapping[str, nn.Parameter], experts: Sequence[str]) -> None:
    """Refuse tensors without a gradient.

    Args:
        parameters: The trained tensors by name, after a backward pass.
        experts: Paths of groups of experts: one may wait for its first token, while others have theirs.

    Raises:
        TrainingError: Some have none; the first ones are named.
    """
    starved = [name for name, parameter in parameters.items() if parameter.grad is None]
    if starved:
        homes = {name: _home(name, experts) for name in parameters}
        served = {homes[name] for name, parameter in parameters.items() if parameter.grad is not None}
        starved = [name for name in starved if not homes[name] or homes[name] not in served]
    if starved:
        raise TrainingError(
            f"{len(starved)} of {len(parameters)} trained tensors got no gradient at first",
            where=", ".join(starved[:5]),
            fix="they do not act on the loss; take their modules out of the targets",
        )


def _home(name: str, experts: Sequence[str]) -> str:
    """Path of the experts that a tensor belongs to one of; "" for any other tensor."""
    return next((path for path in experts if name.startswith(f"{path}.")), "")
