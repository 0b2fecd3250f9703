"""The recovery phase: an adapter trained on a quantized base goes on training on the dense base.

The quantized base is rounded, and an adapter learns to make up for it; on the dense base it should not. After
the last step on the quantized base the dense one is read again, the adapter is put on it, both are evaluated,
and a checkpoint of the same step marks the new phase. Whatever the run does from there on follows from that
checkpoint, so that a run killed in either phase, or between them, ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.adapters.attach import install
from graft.adapters.attached import Adapter, all_tensors
from graft.adapters.starts import stored_starts
from graft.adapters.targets import Selection
from graft.errors import ConfigError, TrainingError
from graft.evaluate.loss import evaluate_loss
from graft.models.classifier import is_classifier, labels_of
from graft.models.load import BaseModel
from graft.models.packed import stored_method
from graft.runs import LineLog, RunDirectory, read_lines
from graft.training.checkpoint import (
    Checkpoint,
    Position,
    copy_into,
    load_checkpoint,
    save_checkpoint,
    stored_tensors,
)
from graft.training.choices import adapter_to_train
from graft.training.config import RATES, RunConfig, TrainingConfig
from graft.training.inputs import load_base
from graft.training.job import Job
from graft.training.monitors import Monitor
from graft.training.schedule import Schedule
from graft.training.stopping import BestEval

DEFAULT_SHARE = 0.1
"""Recovery's learning rate over that of the run: the adapter is trained already."""


def check_dense_base(config: RunConfig, path: Path) -> None:
    """Refuse a recovery phase that has no dense base to go to, before anything is loaded.

    Args:
        config: The whole configuration.
        path: Directory of the base.

    Raises:
        ConfigError: The base is stored quantized, or the adapter makes up for its rounding.
    """
    if config.training.recovery_steps and getattr(config.adapter, "init", "") == "loftq":
        raise ConfigError(
            "init 'loftq' makes up for the rounding of the base, which the dense base does not have",
            where="training.recovery_steps",
            fix="leave recovery_steps out, or adapter.init",
        )
    if config.training.recovery_steps and (method := stored_method(path)):
        raise ConfigError(
            f"{config.model.name} is stored quantized by {method}: there is no dense base to recover on",
            where="training.recovery_steps",
            fix="give the dense model with a quantization section, or leave recovery_steps out",
        )


def check_schedule(config: TrainingConfig, peak: float) -> None:
    """Refuse a recovery phase that is too short for its schedule, before anything is trained.

    Args:
        config: The settings of the run.
        peak: Its peak learning rate.
    """
    if config.recovery_steps:
        Schedule.of(*recovery_training(config, peak), config.recovery_steps)


def recovery_training(config: TrainingConfig, peak: float) -> tuple[TrainingConfig, float]:
    """The settings of the recovery phase, and its peak rate: the run's, but for its length and all rates."""
    rate = config.recovery_learning_rate or DEFAULT_SHARE * peak
    of_groups = {name: value * rate / peak for name in RATES if (value := getattr(config, name)) is not None}
    return dataclasses.replace(config, max_steps=config.recovery_steps, learning_rate=rate, **of_groups), rate


def recovery_job(job: Job, position: Position, reasons: dict[str, str]) -> Job:
    """The job of the recovery phase, made from one that stands on the dense base.

    Args:
        job: As the run's settings make it.
        position: Where the phase began or stands.
        reasons: What is derived and why; the learning rate of the phase is put in.
    """
    training, rate = recovery_training(job.config, job.learning_rate)
    first = position.recovery_start
    told = "as asked" if job.config.recovery_learning_rate else "a tenth of the run's"
    reasons["recovery"] = f"{job.config.recovery_steps} steps from step {first} at {rate:g}, {told}"
    return dataclasses.replace(job, config=training, learning_rate=rate, first_step=first)


def to_dense_base(base: BaseModel, config: RunConfig, adapter: Adapter, monitor: Monitor) -> None:
    """Put an adapter from a quantized base on the dense one; `base` is that from then on.

    Args:
        base: The base of the run so far. Its model is let go before the dense one is loaded.
        config: The configuration.
        adapter: The adapter that trains; its values go along.
        monitor: Who is told.

    Raises:
        TrainingError: The files hold another base than they did.

    Cost: the dense base is read once.
    """
    values = {name: t.detach().cpu().clone() for name, t in all_tensors(base.model, adapter.name).items()}
    labels: Sequence[str] = labels_of(base.model) if is_classifier(base.model) else ()
    weights, base.model = base.fingerprint.weights, None
    gc.collect()
    training = dataclasses.replace(config.training, recovery_steps=0, recovery_learning_rate=None)
    plain = dataclasses.replace(config, quantization=None, training=training)
    dense = load_base(plain, monitor, labels, in_memory=True)
    if dense.fingerprint.weights != weights:
        raise TrainingError(
            f"the weights of {base.name} are {dense.fingerprint.weights[:12]} now, were {weights[:12]}",
            where=str(dense.path),
            fix="restore the files, then resume the run",
        )
    selection = Selection(adapter.targets, modules_to_save=adapter.saved_modules)
    starts = stored_starts(adapter.config, adapter.targets, values)
    made = install(
        dense.model, adapter.config, selection, adapter.name, seed=None, strict=False, starts=starts
    )
    made.forced_base, made.facts = adapter.forced_base, adapter.facts
    copy_into(all_tensors(dense.model, adapter.name), values, "the quantized phase")
    base.model, base.fingerprint = dense.model, dense.fingerprint
    base.quantization, base.dtype = None, dense.dtype


def go_to_phase(checkpoint: Checkpoint, base: BaseModel, config: RunConfig, monitor: Monitor) -> None:
    """Put a run that goes on in its recovery phase on the dense base."""
    adapter = adapter_to_train(base.model)
    if checkpoint.position.recovering and adapter is not None:
        to_dense_base(base, config, adapter, monitor)


def measured(job: Job) -> float | None:
    """Evaluation loss of a job's model; None without evaluation data."""
    if job.eval_loader is None:
        return None
    batches = job.eval_loader.epoch(0)
    if job.objective is None:
        return evaluate_loss(job.model, batches).loss
    device = next(iter(job.parameters.values())).device
    return job.objective.evaluate(job.model, (batch.to(device) for batch in batches))[0]


def begin_recovery(job: Job, position: Position, quantized: float | None) -> Checkpoint:
    """Note how the adapter does on both bases, and mark the new phase with a checkpoint.

    Args:
        job: Stands on the dense base, the adapter on it.
        position: Where the quantized phase ended.
        quantized: Evaluation loss on the quantized base.

    Returns:
        The checkpoint to go on from: moments and learning rate begin anew.
    """
    dense = measured(job)
    losses = {"eval_loss_quantized": _finite(quantized), "eval_loss_dense": _finite(dense)}
    log = LineLog(job.run.metrics_path, job.run.metrics_path.stat().st_size)
    try:
        log.write({"step": position.step, "recovery": "begins", **losses})
        best = BestEval()
        if dense is not None:
            best.update(dense, position.step, 0.0, job.config.keep_best_checkpoints)
        begun = dataclasses.replace(
            position,
            recovery_start=position.step,
            last_eval_step=position.step,
            stopped_early=False,
            num_skipped_in_row=0,
            metrics_bytes=log.sync(),
            metrics_sha256=log.sha256(),
            best=best,
            recent_losses=[],  # on the other base they were others
        )
    finally:
        log.close()
    values = stored_tensors(job.model, job.parameters, None)  # what steered the first phase has done its work
    path = save_checkpoint(job.run, begun, values, {}, job.config.keep_checkpoints, job.settings)
    shown = "not measured: no evaluation data" if dense is None else f"{quantized:.4f} -> {dense:.4f}"
    job.monitor.say(f"recovery begins; evaluation loss on the quantized base -> on the dense one: {shown}")
    return load_checkpoint(path)


def recovery_results(run: RunDirectory, position: Position, result_step: int) -> dict[str, Any]:
    """What the phase did: where it began, and the evaluation losses before and after; nothing without one.

    Args:
        run: The run.
        position: Where it ended.
        result_step: The step whose weights are the result.
    """
    if not position.recovering:
        return {}
    lines = read_lines(run.metrics_path)
    begun = next(line for line in lines if "recovery" in line)
    after = [line["eval_loss"] for line in lines if line["step"] == result_step and "eval_loss" in line]
    unchanged = result_step == position.recovery_start
    return {
        "recovery_start": position.recovery_start,
        "recovery_steps": position.step - position.recovery_start,
        "eval_loss_quantized": begun["eval_loss_quantized"],
        "eval_loss_dense_before": begun["eval_loss_dense"],
        "eval_loss_dense_after": begun["eval_loss_dense"] if unchanged else (after[-1] if after else None),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
