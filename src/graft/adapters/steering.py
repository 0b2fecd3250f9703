"""The steering of the adapter that trains, where its method has one."""

from __future__ import annotations

from torch import nn

from graft.adapters.attached import active_adapters, adapters_of
from graft.adapters.base import Steering, method_of
from graft.adapters.effect import adapted_layers


def steering_of(model: nn.Module, num_steps: int, *, settled: bool = False) -> Steering | None:
    """What goes on between the steps of a run besides the updates of its optimizer.

    Args:
        model: That trains.
        num_steps: Optimizer steps of the run.
        settled: Whether an earlier phase of the run has done all of it.

    Returns:
        None where no adapter trains whose method has a `steer`.

    Raises:
        ConfigError: The settings do not fit so many steps.
    """
    for name in active_adapters(model):
        known = adapters_of(model)[name]
        steer = getattr(method_of(known.config), "steer", None)
        if steer is not None and known.trainable:
            made: Steering = steer(adapted_layers(model, name), known.config, num_steps, settled=settled)
            return made
    return None
