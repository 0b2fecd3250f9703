"""From a run's configuration to its objects, through the loop, to its results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from graft import __version__
from graft.adapters.attach import attach
from graft.adapters.attached import Adapter, adapter_tensors, adapters_of
from graft.adapters.peft_format import save_adapter
from graft.config import from_dict, to_dict
from graft.data.config import DataConfig
from graft.data.loader import Loader
from graft.data.prepare import Dataset, prepare_splits
from graft.data.templates import read_template
from graft.errors import CheckpointError, ConfigError, TrainingError
from graft.models.load import BaseModel, load, load_tokenizer
from graft.models.save import save_model
from graft.runs import RunDirectory
from graft.training.checkpoint import Checkpoint, Position, copy_into, load_checkpoint, newest_checkpoint
from graft.training.config import RunConfig, TrainingConfig
from graft.training.loop import Job, Training, num_steps
from graft.training.monitors import Monitor, Silent, peak_memory_bytes
from graft.training.report import write_run_report
from graft.training.stopping import StopSignal, stop_before_training

DEFAULT_RATES = {"adapter": 2e-4, "full": 2e-5}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: The run directory.
        adapter: The adapter directory; None after full fine-tuning.
        model: The model directory; None after training an adapter.
        metrics: Final figures by name.
    """

    directory: Path
    adapter: Path | None
    model: Path | None
    metrics: dict[str, Any]


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
        StopRequested: A signal came; what was trained is saved.
    """
    monitor = monitor or Silent()
    RunDirectory(config.output).check_new()
    with stop_before_training():
        train_data, eval_data = _prepare_data(config, monitor)
        base = _load_base(config, monitor)
        if config.adapter is not None:
            attach(base.model, config.adapter, seed=config.training.seed)
    return _run(base, config, train_data, eval_data, RunDirectory.create(config.output), monitor)


def resume(path: str | os.PathLike[str], monitor: Monitor | None = None) -> Run:
    """Go on with a run that was stopped or killed, as if it had never stopped.

    Args:
        path: The run directory.
        monitor: Who is told; nobody by default.

    Returns:
        Where the results are.

    Raises:
        CheckpointError: No run there, or its base or data changed.
        StopRequested: A signal came; what was trained is saved.
    """
    monitor = monitor or Silent()
    run = RunDirectory.open(path)
    record = run.read_record()
    config = from_dict(RunConfig, record["config"], str(run.record_path))
    config = dataclasses.replace(config, output=str(path))
    with run.lock():
        with stop_before_training():
            train_data, eval_data = _prepare_data(config, monitor)
            base = _load_base(config, monitor)
            if config.adapter is not None:
                attach(base.model, config.adapter, seed=config.training.seed)
            _check_unchanged(record, base, train_data, eval_data, run)
            checkpoint = newest_checkpoint(run, monitor.say)
        if checkpoint is None:
            monitor.say("no checkpoint yet: starts from the beginning")
        else:
            monitor.say(f"goes on after step {checkpoint.position.step} ({checkpoint.path.name})")
            if checkpoint.num_threads != torch.get_num_threads():
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
        TrainingError: A quantized base without an adapter.
        StopRequested: A signal came; what was trained is saved.
    """
    base = load(base) if isinstance(base, str) else base
    attached = [adapter for adapter in adapters_of(base.model).values()]
    if not attached and base.quantization is not None:
        raise TrainingError(
            f"{base.name} is quantized and has no adapter: codes cannot be trained",
            fix="graft.attach(base.model, graft.LoraConfig()) first",
        )
    config = from_dict(
        RunConfig,
        {
            "model": {"name": base.name, "dtype": str(base.dtype).removeprefix("torch.")},
            "quantization": None if base.quantization is None else to_dict(base.quantization),
            "adapter": to_dict(attached[-1].config) if attached else None,
            "data": to_dict(data_config or DataConfig())
            | {"train": str(data), "eval": None if eval_data is None else str(eval_data)},
            "training": training,
            "output": str(output),
        },
        "graft.train",
    )
    monitor = monitor or Silent()
    RunDirectory(output).check_new()
    with stop_before_training():
        train_set, eval_set = _prepare_data(config, monitor, base.tokenizer)
    return _run(base, config, train_set, eval_set, RunDirectory.create(output), monitor)


def _prepare_data(
    config: RunConfig, monitor: Monitor, tokenizer: Any = None
) -> tuple[Dataset, Dataset | None]:
    if not config.data.train:
        raise ConfigError(
            "no training data", where="data.train", fix="--data FILE, or data.train in the config"
        )
    tokenizer = tokenizer or load_tokenizer(config.model.name, config.model.revision)
    train_data, eval_data = prepare_splits(tokenizer, config.data, seed=config.training.seed)
    for name, data in (("training", train_data), ("evaluation", eval_data)):
        if data is not None:
            monitor.say(_describe_data(name, data))
    for sample in train_data.report.preview:
        monitor.say(f"  {shorten(sample, 600, placeholder=' ...')}")
    return train_data, eval_data


def _describe_data(name: str, data: Dataset) -> str:
    report = data.report
    lines = [
        f"{name} data {report.path}: {report.format} ({report.reason}); {report.num_used:,} of "
        f"{report.num_rows:,} rows, {report.num_samples:,} samples, {report.num_tokens:,} tokens, "
        f"{report.num_labelled_tokens:,} of them learned"
    ]
    return "\n".join([*lines, *(f"  {note}" for note in report.notes)])


def _load_base(config: RunConfig, monitor: Monitor) -> BaseModel:
    base = load(
        config.model.name,
        quantization=config.quantization,
        dtype=None if config.adapter is None else config.model.dtype,
        revision=config.model.revision,
    )
    monitor.say(f"base {base.name}: {_describe(base)}")
    return base


def _describe(base: BaseModel) -> str:
    stored = {id(t): t for t in [*base.model.parameters(), *base.model.buffers()]}.values()
    size = sum(t.numel() * t.element_size() for t in stored)
    kind = "dense" if base.quantization is None else base.quantization.quant_type
    return f"{kind}, {base.dtype}, {size / 2**20:,.1f} MiB, fingerprint {base.fingerprint.short}"


def _check_unchanged(
    record: Mapping[str, Any],
    base: BaseModel,
    train_data: Dataset,
    eval_data: Dataset | None,
    run: RunDirectory,
) -> None:
    now = _identity(base, train_data, eval_data)
    changed = [
        f"{name} was {str(then)[:12]}, is {str(now.get(name))[:12]}"
        for name, then in record["identity"].items()
        if now.get(name) != then
    ]
    if changed:
        raise CheckpointError(
            "what the run was started with has changed: " + "; ".join(changed),
            where=str(run.record_path),
            fix="restore it, or start a new run",
        )


def _identity(base: BaseModel, train_data: Dataset, eval_data: Dataset | None) -> dict[str, str | None]:
    return {
        **{f"base {name}": value for name, value in base.fingerprint.to_dict().items()},
        "training data": train_data.digest,
        "evaluation data": None if eval_data is None else eval_data.digest,
    }


def _run(
    base: BaseModel,
    config: RunConfig,
    train_data: Dataset,
    eval_data: Dataset | None,
    run: RunDirectory,
    monitor: Monitor,
) -> Run:
    record = {
        "status": "running",
        "config": to_dict(config),
        "derived": {},
        "identity": _identity(base, train_data, eval_data),
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base.model.to(device)
    adapter = next(reversed(adapters_of(base.model).values()), None)
    autocast, reasons = _precision(base, config, adapter)
    rate, reason = _learning_rate(config.training, adapter)
    reasons["learning_rate"] = reason
    parameters = _trained(base.model, adapter)
    job = Job(
        model=base.model,
        parameters=parameters,
        loader=_loader(train_data, config, base, train=True),
        eval_loader=None if eval_data is None else _loader(eval_data, config, base, train=False),
        config=config.training,
        learning_rate=rate,
        run=run,
        monitor=monitor,
        autocast=autocast,
        stop=StopSignal(),
    )
    steps = num_steps(job.loader, config.training)
    reasons["steps"] = f"{steps} optimizer steps"
    record["derived"] = reasons
    run.write_record(record)
    count = sum(p.numel() for p in parameters.values())
    total = sum(p.numel() for p in base.model.parameters())
    monitor.say(f"trains {count:,} numbers in {len(parameters)} tensors; the model has {total:,}")
    for name, why in reasons.items():
        monitor.say(f"{name}: {why}")
    if config.training.gradient_checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
    with job.stop.listen():
        position = Training(job, checkpoint).run()
    monitor.say(_use_best(job, position, config.training))
    base.model.eval()
    return _write_results(base, config, run, record, adapter, position, steps, count)


def _trained(model: nn.Module, adapter: Adapter | None) -> dict[str, nn.Parameter]:
    """What is trained, by name, in a fixed order; all of it in float32."""
    if adapter is not None:
        found = adapter_tensors(model, adapter.name)
        return {name: found[name] for name in sorted(found)}
    model.float()
    model.requires_grad_(True)
    return dict(model.named_parameters())


def _precision(
    base: BaseModel, config: RunConfig, adapter: Adapter | None
) -> tuple[torch.dtype | None, dict[str, str]]:
    """Tensors that train are float32; the rest computes in the base's dtype.

    Raises:
        ConfigError: float16, whose small range loses gradients.
    """
    asked = config.model.dtype
    if "float16" in (asked, str(base.dtype).removeprefix("torch.")):
        raise ConfigError(
            "training in float16 overflows without loss scaling, which graft does not do",
            where="model.dtype",
            fix="bfloat16 or float32",
        )
    if adapter is not None:
        return None, {"precision": f"adapter in float32, base and activations in {base.dtype}"}
    compute = getattr(torch, asked) if asked else base.dtype
    if compute == torch.float32:
        return None, {"precision": "weights and activations in float32"}
    return compute, {"precision": f"weights in float32, matrix products in {compute}"}


def _learning_rate(config: TrainingConfig, adapter: Adapter | None) -> tuple[float, str]:
    if config.learning_rate is not None:
        return config.learning_rate, f"{config.learning_rate:g}, as asked"
    rate = DEFAULT_RATES["full" if adapter is None else "adapter"]
    return rate, f"{rate:g}: " + (
        "full fine-tuning wants about a tenth of an adapter's" if adapter is None else "usual for adapters"
    )


def _loader(data: Dataset, config: RunConfig, base: BaseModel, *, train: bool) -> Loader:
    tokenizer = base.tokenizer
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    return Loader(
        data.samples,
        batch_size=config.training.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        seed=config.training.seed,
        shuffle=train and config.data.shuffle,
        pad_id=pad_id,
    )


def _use_best(job: Job, position: Position, config: TrainingConfig) -> str:
    wanted = config.load_best_at_end
    if wanted is None:
        wanted = config.early_stopping_patience is not None
    best = position.best
    if not wanted or best.loss is None or best.step == position.step:
        return f"result: the weights after step {position.step}"
    checkpoint = load_checkpoint(job.run.checkpoint_path(best.step))
    copy_into(job.parameters, checkpoint.trained, str(checkpoint.path))
    return f"result: the weights after step {best.step}, with the lowest evaluation loss ({best.loss:.4f})"


def _write_results(
    base: BaseModel,
    config: RunConfig,
    run: RunDirectory,
    record: dict[str, Any],
    adapter: Adapter | None,
    position: Position,
    steps: int,
    num_trained: int,
) -> Run:
    facts = {
        "run": run_id(record),
        "data": record["identity"]["training data"],
        "format": record["format"],
        "chat_template": read_template(config.data.chat_template) if config.data.chat_template else None,
        "steps": position.step,
    }
    if adapter is not None:
        save_adapter(base.model, run.adapter_path, adapter.name, facts=facts)
    else:
        if facts["chat_template"]:
            base.tokenizer.chat_template = facts["chat_template"]
        if run.model_path.exists():  # a kill came between these weights and the end of the record
            shutil.rmtree(run.model_path)
        save_model(base.model, base.tokenizer, run.model_path, dtype=base.dtype)
    results = {
        "steps": position.step,
        "planned_steps": steps,
        "stopped_early": position.stopped_early,
        "skipped_steps": position.num_skipped,
        "num_tokens": position.num_tokens,
        "best_eval_loss": position.best.loss,
        "best_eval_step": position.best.step if position.best.loss is not None else None,
        "num_trained": num_trained,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    record = {**record, "status": "finished", "results": results}
    run.write_record(record)
    write_run_report(run, record)
    return Run(
        directory=run.path,
        adapter=run.adapter_path if adapter is not None else None,
        model=run.model_path if adapter is None else None,
        metrics=results,
    )


def run_id(record: Mapping[str, Any]) -> str:
    """A name for a run that is the same wherever it is done: a digest of its config, base and data."""
    config = {name: value for name, value in record["config"].items() if name != "output"}
    text = json.dumps([config, record["identity"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
