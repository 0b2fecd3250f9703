"""From a run's configuration to its objects, through the loop, to its results."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Collection, Mapping
from typing import Any

import torch

from graft import __version__
from graft.adapters.attached import Adapter, num_base_parameters
from graft.config import Settings, from_dict, to_dict
from graft.data.config import DataConfig
from graft.data.prepare import Dataset
from graft.errors import CheckpointError, TrainingError
from graft.files import sha256_file
from graft.models.architecture import read_config
from graft.models.classifier import is_classifier
from graft.models.load import BaseModel, load, resolve
from graft.models.packed import stored_method
from graft.runs import RunDirectory
from graft.training.changes import allow, carry_over, configure
from graft.training.checkpoint import Checkpoint, Position, newest_checkpoint
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
from graft.training.inputs import (
    attach_adapter,
    check_labels,
    load_base,
    prepare_data,
    rooted,
    within_context,
)
from graft.training.loop import Job, Training
from graft.training.memory import predicted_memory, prepared
from graft.training.monitors import Monitor, Silent
from graft.training.presets import preset_reasons, unusual
from graft.training.recovery import (
    begin_recovery,
    check_dense_base,
    check_schedule,
    go_to_phase,
    measured,
    recovery_job,
    to_dense_base,
)
from graft.training.results import Run, finished_run, use_best, write_results
from graft.training.stopping import StopSignal, stop_at_once
from graft.training.trackers.base import check_names
from graft.training.tracking import conclude, follow

IN_MEMORY = "from a model in memory"
"""Where a run of `train` begins: with what its caller made of a model."""

BEFORE_TRAINING = ("before the first step; nothing was trained", "start it again")
"""What a signal during loading is answered with, and how to go on."""

__all__ = ["Run", "resume", "run_from_config", "train"]


def run_from_config(config: RunConfig, monitor: Monitor | None = None) -> Run:
    """Run a configuration from nothing: data first, then the model, then training.

    Args:
        config: The whole configuration; `data.train` is required.
        monitor: Who is told; nobody by default.

    Returns:
        Where the results are.

    Raises:
        ConfigError: The configuration cannot be run.
        DataError: The data has nothing to learn; found before the model is loaded.
        TrainingError: A base that is stored quantized, without an adapter.
        StopRequested: A signal came; what was trained is saved.
    """
    monitor = monitor or Silent()
    config = rooted(config)
    check_names(config.training.trackers)
    RunDirectory(config.output).check_new()
    with stop_at_once(*BEFORE_TRAINING):
        path = resolve(config.model.name, config.model.revision)
        if config.adapter is None and (method := stored_method(path)):
            raise TrainingError(
                f"{config.model.name} is stored quantized by {method}: codes cannot be trained",
                where="adapter",
                fix="train an adapter on it (--method lora), or give the dense model",
            )
        check_dense_base(config, path)
        model_config = read_config(path)
        config = within_context(config, model_config, monitor)
        train_data, eval_data = prepare_data(config, monitor)
        base = load_base(config, monitor, train_data.labels)
        attach_adapter(base, config)
    return _run(base, config, train_data, eval_data, RunDirectory.create(config.output), monitor)


def resume(
    path: str | os.PathLike[str],
    monitor: Monitor | None = None,
    *,
    settings: Settings | None = None,
    allow_changes: Collection[str] = (),
) -> Run:
    """Go on with a run that was stopped or killed, as if it had never stopped.

    Args:
        path: The run directory.
        monitor: Who is told; nobody by default.
        settings: Fields with other values than before; those that change the result must be named.
        allow_changes: What may change: fields ("training.learning_rate") and names of `changes.IDENTITY`.
            Each change is recorded in run.json. A finished run goes on under them.

    Returns:
        Where the results are.

    Raises:
        CheckpointError: No run there, or its base, data or settings changed and the change was not named.
        ConfigError: A setting that was not named, or a name that nothing has.
        StopRequested: A signal came; what was trained is saved.
    """
    monitor = monitor or Silent()
    run = RunDirectory.open(path)
    record = run.read_record()
    done = finished_run(run, record)
    config = configure(record, settings or Settings(), allow_changes, str(path))
    if done and not allow_changes:
        monitor.say("this run is finished; nothing is left to do")
        return done
    config = dataclasses.replace(rooted(config), output=str(path))
    check_names(config.training.trackers)
    with run.lock():
        with stop_at_once("before it went on; its checkpoints stand", f"graft train --resume {path}"):
            train_data, eval_data = prepare_data(config, monitor)
            in_memory = record.get("start") == IN_MEMORY
            base = load_base(config, monitor, train_data.labels, in_memory=in_memory)
            attach_adapter(base, config)
            checkpoint = newest_checkpoint(run, monitor.say)
            identity = _identity(config, base, train_data, eval_data)
            now = binding_settings(config) | identity
            for told in allow(record, checkpoint, now, allow_changes, str(path)):
                monitor.say(told)
            record |= {"config": to_dict(config), "identity": identity, "status": "running"}
            if checkpoint is not None:
                go_to_phase(checkpoint, base, config, monitor)
        if checkpoint is None and record.get("start") == IN_MEMORY:
            raise CheckpointError(
                "began with a model in memory and has no checkpoint: that start cannot be made again",
                where=str(run.path),
                fix="start a new run from the program that made it",
            )
        if checkpoint is None:
            monitor.say("no checkpoint yet: starts from the beginning")
        else:
            monitor.say(f"goes on after step {checkpoint.position.step} ({checkpoint.path.name})")
            if checkpoint.num_threads != torch.get_num_threads():
                if config.training.deterministic:
                    raise CheckpointError(
                        f"{torch.get_num_threads()} threads now, {checkpoint.num_threads} before: "
                        "sums would round differently",
                        where="training.deterministic",
                        fix=f"OMP_NUM_THREADS={checkpoint.num_threads} graft train --resume {path}",
                    )
                monitor.say(
                    f"{torch.get_num_threads()} threads now, {checkpoint.num_threads} before: sums may round "
                    f"differently (set OMP_NUM_THREADS={checkpoint.num_threads} for the same bits)"
                )
        return _train(base, config, train_data, eval_data, run, monitor, checkpoint, record)


def train(
    base: BaseModel | str,
    *,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None = None,
    data_config: DataConfig | None = None,
    monitor: Monitor | None = None,
    **training: Any,
) -> Run:
    """Fine-tune a base model: its attached adapter, or all of it where there is none.

    Args:
        base: What `graft.load` returned, or a name to load.
        data: Training data: jsonl, json, csv or txt.
        output: The run directory to make.
        eval_data: Evaluation data.
        data_config: How the data is read, cut and packed.
        monitor: Who is told; nobody by default.
        **training: Fields of `TrainingConfig`.

    Returns:
        Where the results are.

    Raises:
        ConfigError: An unknown training setting, or a value out of range.
        DataError: The data has nothing to learn.
        TrainingError: A quantized base without an adapter, or not exactly one adapter that acts and trains.
        StopRequested: A signal came; what was trained is saved.
    """
    base = load(base) if isinstance(base, str) else base
    adapter = adapter_to_train(base.model)
    if adapter is None and base.quantization is not None:
        raise TrainingError(
            f"{base.name} is quantized and has no adapter: codes cannot be trained",
            fix="graft.attach(base.model, graft.LoraConfig()) first",
        )
    config = from_dict(
        RunConfig,
        {
            "model": {
                "name": base.name,
                "revision": base.revision,
                "dtype": str(base.dtype).removeprefix("torch."),
            },
            "quantization": None if base.quantization is None else to_dict(base.quantization),
            "adapter": None if adapter is None else to_dict(adapter.config),
            "data": to_dict(data_config or DataConfig())
            | {"train": str(data), "eval": None if eval_data is None else str(eval_data)},
            "training": training,
            "task": "classification" if is_classifier(base.model) else "generation",
            "output": str(output),
        },
        "graft.train",
    )
    config = rooted(config)
    check_names(config.training.trackers)
    monitor = monitor or Silent()
    check_dense_base(config, base.path)
    RunDirectory(output).check_new()
    config = within_context(config, base.model.config, monitor)
    with stop_at_once(*BEFORE_TRAINING):
        train_set, eval_set = prepare_data(config, monitor, base.tokenizer)
        check_labels(base, train_set, adapter)
    # What the caller made of the model is in no configuration: only a checkpoint can bring it back.
    return _run(base, config, train_set, eval_set, RunDirectory.create(output), monitor, in_memory=True)


def _identity(
    config: RunConfig, base: BaseModel, train_data: Dataset, eval_data: Dataset | None
) -> dict[str, str | None]:
    template = config.data.chat_template
    return {
        **{f"base {name}": value for name, value in base.fingerprint.to_dict().items()},
        "training data": train_data.digest,
        "evaluation data": None if eval_data is None else eval_data.digest,
        "chat template file": sha256_file(template) if template else None,
    }


def _run(
    base: BaseModel,
    config: RunConfig,
    train_data: Dataset,
    eval_data: Dataset | None,
    run: RunDirectory,
    monitor: Monitor,
    *,
    in_memory: bool = False,
) -> Run:
    record = {
        "status": "running",
        "config": to_dict(config),
        "derived": {},
        "start": IN_MEMORY if in_memory else "from the configuration",
        "identity": _identity(config, base, train_data, eval_data),
        "format": train_data.report.format,
        "versions": {
            "graft": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "results": {},
    }
    with run.lock():
        run.write_record(record)
        return _train(base, config, train_data, eval_data, run, monitor, None, record)


def _train(
    base: BaseModel,
    config: RunConfig,
    train_data: Dataset,
    eval_data: Dataset | None,
    run: RunDirectory,
    monitor: Monitor,
    checkpoint: Checkpoint | None,
    record: dict[str, Any],
) -> Run:
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
