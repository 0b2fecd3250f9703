"""From a run's configuration to its objects, through the loop, to its results."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Collection
from typing import Any

import torch

from graft import __version__
from graft.config import Settings, from_dict, to_dict
from graft.data.config import DataConfig
from graft.data.prepare import Dataset
from graft.data.quarantine import Quarantine
from graft.data.sources import IN_MEMORY as ROWS_IN_MEMORY
from graft.data.sources import Source
from graft.errors import CheckpointError, ConfigError, TrainingError
from graft.files import sha256_file
from graft.models.architecture import read_config
from graft.models.classifier import is_classifier
from graft.models.load import BaseModel, load, resolve
from graft.models.packed import stored_method
from graft.models.tokenizer import load_tokenizer
from graft.runs import RunDirectory
from graft.training.changes import allow, configure
from graft.training.checkpoint import newest_checkpoint
from graft.training.choices import (
    adapter_to_train,
    binding_settings,
)
from graft.training.config import RunConfig
from graft.training.inputs import (
    attach_adapter,
    check_labels,
    check_places,
    dated,
    load_base,
    prepare_data,
    rooted,
    within_context,
)
from graft.training.memory import check_model
from graft.training.monitors import Monitor, Silent
from graft.training.phases import IN_MEMORY, run_phases
from graft.training.recovery import (
    check_dense_base,
    go_to_phase,
)
from graft.training.results import Run, finished_run
from graft.training.stopping import stop_at_once
from graft.training.trackers.base import check_names

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
    check_places(config)
    RunDirectory(config.output).check_new()
    with Quarantine() as quarantine:
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
            tokenizer = load_tokenizer(config.model.name, config.model.revision)
            config = dated(config, tokenizer)
            train_data, eval_data = prepare_data(config, monitor, tokenizer, quarantine=quarantine)
            base = load_base(config, monitor, train_data.labels)
            attach_adapter(base, config, train_data, monitor)
        return _run(base, config, train_data, eval_data, monitor, quarantine)


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
    check_places(config)
    with run.lock(), Quarantine() as quarantine:
        with stop_at_once("before it went on; its checkpoints stand", f"graft train --resume {path}"):
            train_data, eval_data = prepare_data(config, monitor, quarantine=quarantine)
            in_memory = record.get("start") == IN_MEMORY
            base = load_base(config, monitor, train_data.labels, in_memory=in_memory)
            checkpoint = newest_checkpoint(run, monitor.say)
            stored = None if checkpoint is None else checkpoint.trained
            attach_adapter(base, config, train_data, monitor, stored)
            identity = _identity(config, base, train_data, eval_data)
            now = binding_settings(config) | identity
            for told in allow(record, checkpoint, now, allow_changes, str(path)):
                monitor.say(told)
            quarantine.save(run.quarantine_path)
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
        return run_phases(base, config, train_data, eval_data, run, monitor, checkpoint, record)


def train(
    base: BaseModel | str,
    *,
    data: Source,
    output: str | os.PathLike[str],
    eval_data: Source | None = None,
    data_config: DataConfig | None = None,
    monitor: Monitor | None = None,
    **training: Any,
) -> Run:
    """Fine-tune a base model: its attached adapter, or all of it where there is none.

    Args:
        base: What `graft.load` returned, or a name to load.
        data: Training data: a file, a directory, "hub:owner/name", or any iterable of dicts (or texts), which
            is read once. A run on rows from Python cannot be resumed: they are in no file.
        output: The run directory to make.
        eval_data: Evaluation data, the same.
        data_config: How the data is read, cut and packed; its `eval` counts where `eval_data` is left out.
        monitor: Who is told; nobody by default.
        **training: Fields of `TrainingConfig`.

    Returns:
        Where the results are.

    Raises:
        ConfigError: An unknown training setting, a value out of range, or data that is named twice.
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
    sources = _sources(data, eval_data, data_config or DataConfig())
    given = {
        name: source
        for name, source in sources.items()
        if _named(source) == ROWS_IN_MEMORY and source is not None
    }
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
            | {name: _named(source) for name, source in sources.items()},
            "training": training,
            "task": "classification" if is_classifier(base.model) else "generation",
            "output": str(output),
        },
        "graft.train",
    )
    config = rooted(config)
    check_names(config.training.trackers)
    check_places(config)
    monitor = monitor or Silent()
    check_dense_base(config, base.path)
    RunDirectory(output).check_new()
    config = within_context(config, base.model.config, monitor)
    with Quarantine() as quarantine:
        with stop_at_once(*BEFORE_TRAINING):
            config = dated(config, base.tokenizer)
            train_set, eval_set = prepare_data(
                config, monitor, base.tokenizer, given=given, quarantine=quarantine
            )
            check_labels(base, train_set, adapter)
        # What the caller made of the model is in no configuration: only a checkpoint can bring it back.
        return _run(base, config, train_set, eval_set, monitor, quarantine, in_memory=True)


def _sources(data: Source, eval_data: Source | None, config: DataConfig) -> dict[str, Source | None]:
    """What is read for each split.

    Raises:
        ConfigError: It is given twice.
    """
    for name, argument, source in (("train", "data", data), ("eval", "eval_data", eval_data)):
        named = getattr(config, name)
        if source is not None and named not in (None, _named(source)):
            raise ConfigError(
                f"{argument}, and data_config names {named}",
                where=f"data_config.{name}",
                fix=f"leave it out there: {argument} says it",
            )
    return {"train": data, "eval": config.eval if eval_data is None else eval_data}


def _named(source: Source | None) -> str | None:
    """What stands for a source in a configuration."""
    if source is None:
        return None
    return os.fspath(source) if isinstance(source, str | os.PathLike) else ROWS_IN_MEMORY


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
    monitor: Monitor,
    quarantine: Quarantine,
    *,
    in_memory: bool = False,
) -> Run:
    check_model(base.model, config.training)  # before there is a run to leave behind
    run = RunDirectory.create(config.output)
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
        quarantine.save(run.quarantine_path)
        quarantine.close()
        return run_phases(base, config, train_data, eval_data, run, monitor, None, record)
