"""A run's phases: its objects, the loop over them, a second phase on the dense base, the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graft.adapters.attached import Adapter, num_base_parameters
from graft.data.prepare import Dataset
from graft.models.load import BaseModel
from graft.runs import RunDirectory
from graft.training.changes import carry_over
from graft.training.checkpoint import Checkpoint, Position
from graft.training.choices import (
    adapter_to_train,
    binding_settings,
    learning_rate,
    make_loader,
    objective,
    precision,
    scales_loss,
    trained_tensors,
)
from graft.training.config import RunConfig
from graft.training.determinism import deterministic
from graft.training.job import Job
from graft.training.loop import Training
from graft.training.memory import predicted_memory, prepared
from graft.training.monitors import Monitor
from graft.training.presets import preset_reasons, unusual
from graft.training.recovery import (
    begin_recovery,
    check_schedule,
    measured,
    recovery_job,
    to_dense_base,
)
from graft.training.results import Run, use_best, write_results
from graft.training.stopping import StopSignal, stop_at_once
from graft.training.tracking import conclude, follow

IN_MEMORY = "from a model in memory"
"""Where a run of `train` begins: with what its caller made of a model."""


def run_phases(
    base: BaseModel,
    config: RunConfig,
    train_data: Dataset,
    eval_data: Dataset | None,
    run: RunDirectory,
    monitor: Monitor,
    checkpoint: Checkpoint | None,
    record: dict[str, Any],
) -> Run:
    """Train to the end and write the results.

    Args:
        base: The model, its adapter attached.
        config: The whole configuration.
        train_data: What is learned.
        eval_data: What is measured; None for nothing.
        run: The run directory, locked.
        monitor: Who is told.
        checkpoint: Where to go on; None begins.
        record: run.json so far; filled in and written.

    Raises:
        StopRequested: A signal came; what was trained is saved.
        TrainingError: Nothing was trained, or not what was asked for.
    """
    feeds, monitor = follow(config, run, record, monitor, resumed=checkpoint is not None)
    with feeds.running():
        training, position, adapter, count = _phases(
            base, config, train_data, eval_data, run, monitor, checkpoint, record
        )
    with stop_at_once(
        "while the result was written; what it is made from is saved", f"graft train --resume {run.path}"
    ):
        conclude(record, run, training.figures, feeds)
        monitor.say(use_best(training.job, position, config.training))
        base.model.eval()
        return write_results(base, config, run, record, adapter, position, training.num_steps, count)


def _phases(
    base: BaseModel,
    config: RunConfig,
    train_data: Dataset,
    eval_data: Dataset | None,
    run: RunDirectory,
    monitor: Monitor,
    checkpoint: Checkpoint | None,
    record: dict[str, Any],
) -> tuple[Training, Position, Adapter | None, int]:
    """Train to the end: one phase, or a second one on the dense base; how many numbers train comes last."""
    go_on = f"graft train --resume {run.path}"

    def assembled() -> tuple[Job, dict[str, str], Adapter | None]:
        adapter = adapter_to_train(base.model)
        job, reasons = _job(base, config, adapter, train_data, eval_data, run, monitor)
        job.settings = binding_settings(config) | record["identity"]
        return job, reasons, adapter

    while True:
        save_start = checkpoint is None and record.get("start") == IN_MEMORY
        with stop_at_once(
            "before the next step; what was saved stands",
            f"remove {run.path} and start it again" if save_start else go_on,
        ):
            job, reasons, adapter = assembled()
            job.save_start = save_start
            check_schedule(config.training, job.learning_rate)
            if checkpoint is not None:
                carry_over(checkpoint, job.settings, job.loader)
            if checkpoint is not None and checkpoint.position.recovering:
                job = recovery_job(job, checkpoint.position, reasons)
            training = Training(job, checkpoint)
            if training.optimizer.placement:
                reasons["optimizer"] = training.optimizer.placement
            reasons["steps"] = f"{training.num_steps} optimizer steps"
            reasons["token places"] = f"{job.loader.utilisation():.1%} used, the rest is padding"
            reasons["machine"] = str(training.figures.product_rate)
            reasons |= preset_reasons(config) | unusual(config, training.job.learning_rate)
            record["derived"] = reasons
            learned = train_data.report.num_labelled_tokens / train_data.report.num_tokens
            predicted = predicted_memory(job, learned, packed=config.data.packing)
            record["predicted_memory"] = predicted.to_dict()
            run.write_record(record)
            count = _tell(job, reasons)
            monitor.say(f"memory: {predicted.describe()}")
        with job.stop.listen(), prepared(job), deterministic(config.training.deterministic):
            position = training.run()
        if position.recovering or not config.training.recovery_steps:
            return training, position, adapter, count
        with stop_at_once("between the two phases; what was saved stands", go_on):
            monitor.say(use_best(job, position, config.training))
            quantized = measured(job)
            assert adapter is not None
            del job, training  # they hold the quantized base
            to_dense_base(base, config, adapter, monitor)
            checkpoint = begin_recovery(assembled()[0], position, quantized)


def _tell(job: Job, reasons: Mapping[str, str]) -> int:
    """Say what trains and why so; returns how many numbers."""
    count = sum(p.numel() for p in job.parameters.values())
    total = num_base_parameters(job.model)
    job.monitor.say(f"trains {count:,} numbers in {len(job.parameters)} tensors; the base has {total:,}")
    for name, why in reasons.items():
        job.monitor.say(f"{name}: {why}")
    return count


def _job(
    base: BaseModel,
    config: RunConfig,
    adapter: Adapter | None,
    train_data: Dataset,
    eval_data: Dataset | None,
    run: RunDirectory,
    monitor: Monitor,
) -> tuple[Job, dict[str, str]]:
    """The objects of the loop, and the reasons of what was derived."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base.model.to(device)
    autocast, reasons = precision(base, config, adapter)
    rate, reasons["learning_rate"] = learning_rate(config.training, adapter)
    job = Job(
        model=base.model,
        parameters=trained_tensors(base.model, adapter),
        loader=make_loader(train_data, config, base, train=True),
        eval_loader=None if eval_data is None else make_loader(eval_data, config, base, train=False),
        config=config.training,
        learning_rate=rate,
        run=run,
        monitor=monitor,
        autocast=autocast,
        stop=StopSignal(),
        objective=objective(config, train_data),
        scales_loss=scales_loss(base, autocast, adapter),
    )
    if job.scales_loss:
        reasons["loss scaling"] = "dynamic: products in float16 lose small gradients"
    return job, reasons
