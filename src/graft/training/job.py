"""What the training loop is given: everything a run needs, ready made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graft.adapters.base import Steering
from graft.data.loader import Loader
from graft.models.recipes import Recipes
from graft.runs import RunDirectory
from graft.training.config import TrainingConfig
from graft.training.monitors import Monitor
from graft.training.objectives import Objective
from graft.training.stopping import StopSignal


@dataclass
class Job:
    """Everything one run needs, ready made.

    Attributes:
        model: The model, on its device, adapters attached.
        parameters: What is trained, by name.
        loader: Training batches.
        eval_loader: Evaluation batches; None for no evaluation.
        config: The training settings.
        learning_rate: The peak, resolved.
        run: Where logs and checkpoints go.
        monitor: Who is told.
        autocast: Type that matrix products run in when it is not the tensors' own; None for no autocast.
        stop: Set by a signal.
        save_start: Whether to save before the first step: for a start that no configuration describes.
        settings: What a resumed run must have as this one has it, by name.
        objective: What is learned in place of the labelled tokens; None for these.
        first_step: Steps that an earlier phase of the run took.
        recipes: How the backward pass gets what it needs; see `memory.prepared`.
        scales_loss: Whether gradients are made larger on their way, for float16.
        steering: What the adapter's method does between steps; the loop makes it, which knows their number.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    loader: Loader
    eval_loader: Loader | None
    config: TrainingConfig
    learning_rate: float
    run: RunDirectory
    monitor: Monitor
    autocast: torch.dtype | None = None
    stop: StopSignal = field(default_factory=StopSignal)
    save_start: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective | None = None
    first_step: int = 0
    recipes: Recipes = field(default_factory=Recipes)
    scales_loss: bool = False
    steering: Steering | None = None


MOST_COUNTED = 100
"""Epochs whose batches are counted where they differ; more are as long as these on average."""


def num_steps(loader: Loader, config: TrainingConfig) -> int:
    """Optimizer steps of a whole run; a part of an epoch is rounded up to whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    whole, part = divmod(config.num_epochs, 1)
    size = config.gradient_accumulation_steps
    if loader.is_even:
        per_epoch = math.ceil(loader.num_batches() / size)
        return max(1, per_epoch * int(whole) + math.ceil(per_epoch * part))
    counted = range(min(math.ceil(config.num_epochs), MOST_COUNTED))
    steps = [math.ceil(loader.num_batches(epoch) / size) for epoch in counted]
    average = sum(steps[: int(whole)] or steps) / len(steps[: int(whole)] or steps)
    return max(1, round(average * int(whole)) + math.ceil(steps[-1] * part))
