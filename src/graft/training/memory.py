"""Memory of a run: what it will need, and what the model is made into so that its steps need less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from graft.adapters.adapted import SavedModule
from graft.adapters.attached import adapter_modules
from graft.errors import ConfigError
from graft.models.lean import lean
from graft.models.recipes import Kept, Recipes
from graft.planner import Prediction, Step, predict, shapes_of
from graft.training.allocator import (
    FEW_IN_HEAP_BYTES,
    MOST_IN_HEAP_BYTES,
    SHORT_STRIDE_BYTES,
    STRIDE_BYTES,
    TidyKept,
    tensors_in_heap,
)
from graft.training.monitors import memory_bytes
from graft.training.offload import FilePlace, HostPlace, Offloaded
from graft.training.paging import Paging
from graft.training.recompute import every, recomputed

if TYPE_CHECKING:
    from torch import nn

    from graft.training.config import TrainingConfig
    from graft.training.job import Job


def predicted_memory(job: Job, labelled: float, *, packed: bool) -> Prediction:
    """What the steps of a run will need.

    Args:
        job: The run.
        labelled: Share of the tokens that are learned.
        packed: Whether rows hold several samples.
    """
    config = job.config
    step = Step(
        rows=config.batch_size,
        tokens=job.loader.widest(),
        labelled=labelled,
        optimizer=config.optimizer,
        momentum=bool(config.sgd_momentum),
        optimizer_memory=Paging.of(config, job.run.path).memory_bytes,
        accumulation=config.gradient_accumulation_steps,
        recomputed_every=every(config.gradient_checkpointing),
        packed=packed,
        offloaded=bool(config.activation_offload),
        mlp_tile=config.mlp_tile,
    )
    device = next(iter(job.parameters.values())).device
    shapes = shapes_of(job.model, job.parameters)
    return predict(shapes, step, device_type=device.type, held_bytes=memory_bytes())


@contextlib.contextmanager
def prepared(job: Job) -> Iterator[None]:
    """Within the block the model of a run keeps less for its backward pass; afterwards it is as it was.

    Args:
        job: The run; `job.recipes` is what the loop puts around its forward passes.
    """
    job.recipes = Recipes(store_of(job))
    try:
        with (
            lean(job.model, job.recipes, _trained_whole(job.model), job.config.mlp_tile),
            recomputed(job.model, job.config.gradient_checkpointing, job.recipes.store),
        ):
            yield
    finally:
        job.recipes.release()


def check_model(model: nn.Module, config: TrainingConfig) -> None:
    """Refuse settings that the steps of a run could not follow on this model.

    Raises:
        ModelError: A tile is given, and the model has no gated MLP.
    """
    with lean(model, Recipes(), _trained_whole(model), config.mlp_tile):
        pass


def _trained_whole(model: nn.Module) -> list[str]:
    return [path for path, m in adapter_modules(model).items() if isinstance(m, SavedModule)]


def store_of(job: Job) -> Kept:
    """Where the steps of a run keep what their backward passes need.

    Raises:
        ConfigError: A directory is given for a device, whose activations go to the host's memory.
        StorageError: The directory cannot be written.
    """
    where = job.config.activation_offload
    device = next(iter(job.parameters.values())).device
    below = FEW_IN_HEAP_BYTES if where else MOST_IN_HEAP_BYTES
    in_heap = device.type == "cpu" and tensors_in_heap(below=below)
    if not where:
        stride = SHORT_STRIDE_BYTES if every(job.config.gradient_checkpointing) else STRIDE_BYTES
        return TidyKept(stride) if in_heap else Kept()
    lasting = [*job.model.parameters(), *job.model.buffers()]
    if device.type == "cpu":
        return Offloaded(FilePlace(where if isinstance(where, str) else job.run.path), lasting)
    if isinstance(where, str):
        raise ConfigError(
            f"training.activation_offload names the directory {where}, and activations of {device} go to the "
            "host's memory",
            where="training.activation_offload",
            fix="true",
        )
    return Offloaded(HostPlace(device), lasting)
