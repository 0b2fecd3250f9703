"""Checkpoints: everything that a run needs to go on as if it had never stopped.

checkpoints/step-000120/
    state.json          where the run stands, its settings; digest of the tensors
    state.safetensors   trained tensors, optimizer moments, random-number state

A checkpoint is written beside its place and renamed, so it is whole or absent; no pickle is involved.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft import files
from graft.errors import CheckpointError, StorageError
from graft.runs import RunDirectory
from graft.training.flat_state import Pending
from graft.training.state_file import StoredState, write_state
from graft.training.stopping import BestEval

FORMAT = 2
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
        spectra_bytes: Length of spectra.jsonl.
        best: The lowest evaluation loss so far.
        recovery_start: Step at which the recovery phase began; -1 before it.
        splits: [step, rows] from which steps on forward passes had fewer rows, for want of memory.
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
    spectra_bytes: int = 0
    best: BestEval = dataclasses.field(default_factory=BestEval)
    recovery_start: int = -1
    splits: list[list[int]] = dataclasses.field(default_factory=list)

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
    tensors["random|torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random|cuda"] = torch.cuda.get_rng_state()
    with files.new_directory(path, replace=True) as partial:
        try:
            write_state(tensors, partial / TENSORS)
        except StorageError as error:
            raise StorageError(
                f"the checkpoint {error.what}",
                where=str(path),
                fix=f"free some space, then `graft train --resume {run.path}`; the earlier checkpoints stand",
            ) from error
        state = {
            "format": FORMAT,
            "position": dataclasses.asdict(position),
            "sha256": files.sha256_file(partial / TENSORS),
            "num_threads": torch.get_num_threads(),
            "settings": dict(settings),
        }
        files.write_json(partial / STATE, state)
    _rotate(run, keep, position)
    return path


def _rotate(run: RunDirectory, keep: int, position: Position) -> None:
    # Later ones are damaged and were passed over: they do not count, or they would drive out the whole ones.
    found = run.checkpoints()
    until_now = found[: found.index(run.checkpoint_path(position.step)) + 1]
    good = {run.checkpoint_path(step) for step in position.best.steps()}
    for path in until_now[:-keep]:
        if path not in good:
            # Renamed first, so that a kill in the middle leaves no half checkpoint under a good name.
            doomed = path.with_name(f".{path.name}{files.PARTIAL}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


@dataclasses.dataclass
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        path: Its directory.
        position: Where the run stood.
        trained: The trained tensors.
        optimizer: The optimizer's state, read from the file tensor by tensor.
        random: Random-number states by device type.
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
        digest = files.sha256_file(path / TENSORS)
        if digest != state["sha256"]:
            raise CheckpointError(
                f"{TENSORS} has digest {digest[:12]}, the checkpoint says {state['sha256'][:12]}",
                where=str(path),
            )
        position = state["position"]
        position["best"] = BestEval(**position["best"])
        return Checkpoint(
            path,
            Position(**position),
            dict(StoredState(path / TENSORS, "trained|")),
            StoredState(path / TENSORS, "optimizer|"),
            dict(StoredState(path / TENSORS, "random|")),
            int(state["num_threads"]),
            dict(state["settings"]),
        )
    except (StorageError, SafetensorError, KeyError, TypeError) as error:
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
            return load_checkpoint(path)
        except CheckpointError as error:
            say(f"passed over {path.name}: {error.what}")
    if paths:
        raise CheckpointError(
            "has no whole checkpoint", where=str(run.checkpoints_path), fix="start a new run"
        )
    return None


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Refuse to go on under other settings: the run would end with what neither of them makes.

    Args:
        checkpoint: Where the run stands.
        settings: What the run's record says now, by name.
        where: The record.

    Raises:
        CheckpointError: A setting differs, came or went; each is named with both values.
    """
    then, now = checkpoint.settings, dict(settings)
    changed = [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"the settings changed since {checkpoint.path.name}: " + "; ".join(changed),
            where=where,
            fix="put them back, or start a new run",
        )


def restore_random_state(checkpoint: Checkpoint) -> None:
    """Continue the random-number streams where the checkpoint left them."""
    torch.set_rng_state(checkpoint.random["torch"])
    if torch.cuda.is_available() and "cuda" in checkpoint.random:
        torch.cuda.set_rng_state(checkpoint.random["cuda"])


def copy_into(parameters: Mapping[str, torch.nn.Parameter], stored: Mapping[str, Tensor], where: str) -> None:
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
