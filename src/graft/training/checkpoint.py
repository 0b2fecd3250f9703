"""Checkpoints: everything that a run needs to go on as if it had never stopped.

checkpoints/step-000120/
    state.json          where the run stands, its settings; digests of the tensors, the log and itself
    state.safetensors   trained tensors, optimizer moments, random-number state

A checkpoint is written beside its place and renamed, so it is whole or absent; no pickle is involved.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft import files
from graft.adapters.attached import active_fixed_tensors
from graft.adapters.base import Steering
from graft.errors import CheckpointError, StorageError
from graft.runs import RunDirectory
from graft.training.flat_state import Pending
from graft.training.random_state import random_state
from graft.training.scaling import LossScale
from graft.training.state_file import StoredState, write_state
from graft.training.stopping import BestEval

FORMAT = 3
STATE, TENSORS = "state.json", "state.safetensors"


@dataclasses.dataclass
class Position:
    """Where a run stands between two optimizer steps.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        epoch: Epoch of the next batch.
        batch: Index of the next batch in that epoch.
        num_tokens: Real tokens seen.
        num_labelled_tokens: Tokens that counted in the loss.
        num_skipped: Steps not applied because of a NaN or infinite loss or gradient.
        num_skipped_in_row: Of these, the latest ones without a good step between.
        last_eval_step: Step of the latest evaluation.
        stopped_early: Whether early stopping ended the run.
        metrics_bytes: Length of metrics.jsonl.
        metrics_sha256: Digest of it.
        spectra_bytes: Length of spectra.jsonl.
        best: The lowest evaluation loss so far.
        recovery_start: Step at which the recovery phase began; -1 before it.
        splits: [step, rows] from which steps on forward passes had fewer rows, for want of memory.
        num_overflows: Steps not applied because a scaled gradient overflowed, which lowers the scale.
        scale: Of the loss; only used where products are in float16.
        recent_losses: What the next loss is measured against.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    num_tokens: int = 0
    num_labelled_tokens: int = 0
    num_skipped: int = 0
    num_skipped_in_row: int = 0
    last_eval_step: int = -1
    stopped_early: bool = False
    metrics_bytes: int = 0
    metrics_sha256: str = ""
    spectra_bytes: int = 0
    best: BestEval = dataclasses.field(default_factory=BestEval)
    recovery_start: int = -1
    splits: list[list[int]] = dataclasses.field(default_factory=list)
    num_overflows: int = 0
    scale: LossScale = dataclasses.field(default_factory=LossScale)
    recent_losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def recovering(self) -> bool:
        """Whether the run is in its recovery phase."""
        return self.recovery_start >= 0


def save_checkpoint(
    run: RunDirectory,
    position: Position,
    trained: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor | Pending],
    keep: int,
    settings: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `keep`, never the best ones.

    Args:
        run: Where to.
        position: Where the run stands.
        trained: The trained tensors by name.
        optimizer_state: What the optimizer's `pending_state` gave: made and written one by one.
        keep: Newest checkpoints to keep.
        settings: What the run must have the same when it goes on, by name.

    Returns:
        The checkpoint's directory.

    Raises:
        StorageError: It could not be written; the earlier checkpoints stand.
    """
    path = run.checkpoint_path(position.step)
    tensors: dict[str, Tensor | Pending] = {f"trained|{name}": value for name, value in trained.items()}
    tensors |= {f"optimizer|{name}": value for name, value in optimizer_state.items()}
    tensors |= {f"random|{name}": value for name, value in random_state().items()}
    try:
        _write(path, tensors, position, settings)
    except StorageError as error:
        fix = f"free some space, then `graft train --resume {run.path}`; the earlier checkpoints stand"
        raise StorageError(f"the checkpoint {error.what}", where=str(path), fix=fix) from error
    _rotate(run, keep, position)
    return path


def _write(
    path: Path, tensors: Mapping[str, Tensor | Pending], position: Position, settings: Mapping[str, Any]
) -> None:
    state = {
        "format": FORMAT,
        "position": dataclasses.asdict(position),
        "sha256": "",
        "num_threads": torch.get_num_threads(),
        "settings": dict(settings),
    }
    # Names and shapes of tensors take some hundred bytes each in a file's header.
    size = sum(math.prod(value.shape) * value.dtype.itemsize + 300 for value in tensors.values())
    with files.new_directory(path, replace=True, needed_bytes=size + len(json.dumps(state))) as partial:
        write_state(tensors, partial / TENSORS)
        state["sha256"] = files.sha256_file(partial / TENSORS)
        files.write_json(partial / STATE, {**state, "state_sha256": files.sha256_json(state)})


def _rotate(run: RunDirectory, keep: int, position: Position) -> None:
    # Later ones are damaged and were passed over: they do not count, or they would drive out the whole ones.
    found = run.checkpoints()
    until_now = found[: found.index(run.checkpoint_path(position.step)) + 1]
    good = {run.checkpoint_path(step) for step in position.best.steps()}
    for path in until_now[:-keep]:
        if path not in good:
            files.remove_directory(path)


@dataclasses.dataclass
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        path: Its directory.
        position: Where the run stood.
        trained: The trained tensors.
        optimizer: The optimizer's state, read from the file tensor by tensor.
        random: States of the random-number streams by name.
        num_threads: Threads of the process that wrote it.
        settings: What the run had, by name.
    """

    path: Path
    position: Position
    trained: dict[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: dict[str, Tensor]
    num_threads: int
    settings: dict[str, Any]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: A file is missing or its digest is another one.
    """
    from safetensors import SafetensorError

    try:
        state: dict[str, Any] = files.read_json(path / STATE)
        if state["format"] != FORMAT:
            raise CheckpointError(f"is of format {state['format']}, not {FORMAT}", where=str(path))
        if state.pop("state_sha256") != files.sha256_json(state):
            raise CheckpointError(f"{STATE} does not have the digest that it says", where=str(path))
        digest = files.sha256_file(path / TENSORS)
        if digest != state["sha256"]:
            raise CheckpointError(
                f"{TENSORS} has digest {digest[:12]}, the checkpoint says {state['sha256'][:12]}",
                where=str(path),
            )
        position = state["position"]
        position |= {"best": BestEval(**position["best"]), "scale": LossScale(**position["scale"])}
        return Checkpoint(
            path,
            Position(**position),
            dict(StoredState(path / TENSORS, "trained|")),
            StoredState(path / TENSORS, "optimizer|"),
            dict(StoredState(path / TENSORS, "random|")),
            int(state["num_threads"]),
            dict(state["settings"]),
        )
    except (StorageError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"is damaged: {error}", where=str(path), fix="use an older checkpoint"
        ) from error


def newest_checkpoint(run: RunDirectory, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where a run stopped before its first one.

    Args:
        run: The run.
        say: Told about each checkpoint that had to be passed over.

    Raises:
        CheckpointError: There are checkpoints but none is whole.
    """
    files.remove_partials(run.checkpoints_path)
    files.remove_partials(run.path)
    paths = run.checkpoints()
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
            _check_log(run, checkpoint.position)
            return checkpoint
        except CheckpointError as error:
            say(f"passed over {path.name}: {error.what}")
    if paths:
        raise CheckpointError(
            "has no whole checkpoint", where=str(run.checkpoints_path), fix="start a new run"
        )
    return None


def _check_log(run: RunDirectory, position: Position) -> None:
    try:
        digest = files.sha256_file(run.metrics_path, position.metrics_bytes)
    except StorageError as error:
        raise CheckpointError(f"{run.metrics_path.name} {error.what}", where=error.where) from error
    if digest != position.metrics_sha256:
        raise CheckpointError(
            f"{run.metrics_path.name} is not what it was then in its first {position.metrics_bytes:,} bytes",
            where=str(run.metrics_path),
        )


def stored_tensors(
    model: torch.nn.Module, parameters: Mapping[str, Tensor], steering: Steering | None
) -> dict[str, Tensor]:
    """What a checkpoint holds: what trains, what of the adapter no gradient changes, what steers it.

    Args:
        model: That trains.
        parameters: What trains, by name.
        steering: Of the run; None for none.
    """
    return {**parameters, **active_fixed_tensors(model), **(steering.tensors() if steering else {})}


def copy_into(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: str) -> None:
    """Put stored values into the trained tensors.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    missing, extra = sorted(parameters.keys() - stored.keys()), sorted(stored.keys() - parameters.keys())
    if missing or extra:
        raise CheckpointError(
            f"trains other tensors: {missing[:3]} not in it, {extra[:3]} only in it",
            where=where,
            fix="the configuration changed; start a new run",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != stored[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(stored[name].shape)} there, {tuple(parameter.shape)} here",
                    where=where,
                    fix="the configuration changed; start a new run",
                )
            parameter.copy_(stored[name])
