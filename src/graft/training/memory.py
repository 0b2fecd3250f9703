"""Memory of a run: what it will need, and what the model is made into so that its steps need less."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graft.adapters.adapted import SavedModule
from graft.adapters.attached import adapter_modules
from graft.models.lean import lean
from graft.models.recipes import Recipes
from graft.planner import Prediction, Step, predict, shapes_of
from graft.training.monitors import memory_bytes
from graft.training.paging import Paging
from graft.training.recompute import every, recomputed

if TYPE_CHECKING:
    from graft.training.loop import Job


MMAP_THRESHOLD_BYTES = 1 << 20
"""Tensors from this size on are given back to the system as soon as they are free."""


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
    )
    device = next(iter(job.parameters.values())).device
    shapes = shapes_of(job.model, job.parameters)
    return predict(shapes, step, device_type=device.type, held_bytes=memory_bytes())


def keep_allocator_tidy() -> bool:
    """Let large tensors have pages of their own, which go back to the system when they are freed.

    glibc raises the size from which it does so to that of the largest tensor freed so far, up to 32 MiB; what
    is smaller then shares a heap, whose holes do not fit aligned blocks of their own size again: the resident
    set of a step was measured at four times what it holds, and grows. Lasts for the process.

    Returns:
        Whether it was done; not where the C library has no such setting or MALLOC_MMAP_THRESHOLD_ sets it.

    Cost: the system clears pages for every passing tensor; docs/LOG.md has what that takes.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    m_mmap_threshold = -3  # its number in malloc.h
    return mallopt is not None and bool(mallopt(m_mmap_threshold, MMAP_THRESHOLD_BYTES))


@contextlib.contextmanager
def prepared(job: Job) -> Iterator[None]:
    """Within the block the model of a run keeps less for its backward pass; afterwards it is as it was.

    Args:
        job: The run; `job.recipes` is what the loop puts around its forward passes.
    """
    if next(iter(job.parameters.values())).device.type == "cpu":
        keep_allocator_tidy()
    saved = [path for path, m in adapter_modules(job.model).items() if isinstance(m, SavedModule)]
    job.recipes = Recipes()
    with (
        lean(job.model, job.recipes, saved),
        recomputed(job.model, job.config.gradient_checkpointing, job.recipes.store),
    ):
        yield
