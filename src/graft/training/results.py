"""What a run leaves: the adapter or model, its facts, run.json and the report page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.adapters.attached import Adapter
from graft.adapters.peft_format import save_adapter
from graft.data.chat.templates import read_template
from graft.errors import CheckpointError
from graft.files import sha256_file
from graft.models.classifier import is_classifier, labels_of
from graft.models.fingerprint import Fingerprint
from graft.models.load import BaseModel
from graft.models.locate import rooted_name
from graft.models.save import save_model
from graft.runs import RunDirectory
from graft.training.checkpoint import Position, copy_into, load_checkpoint, stored_tensors
from graft.training.config import RunConfig, TrainingConfig
from graft.training.finite import check_finite
from graft.training.job import Job
from graft.training.monitors import peak_memory_bytes
from graft.training.recovery import recovery_results
from graft.training.report import write_run_report


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


def use_best(job: Job, position: Position, config: TrainingConfig) -> str:
    """Put back the weights with the lowest evaluation loss where that is asked for; returns what was done."""
    best = position.best
    if result_step(position, config) == position.step:
        return f"result: the weights after step {position.step}"
    checkpoint = load_checkpoint(job.run.checkpoint_path(best.step))
    copy_into(
        stored_tensors(job.model, job.parameters, job.steering), checkpoint.trained, str(checkpoint.path)
    )
    return f"result: the weights after step {best.step}, with the lowest evaluation loss ({best.loss:.4f})"


def result_step(position: Position, config: TrainingConfig) -> int:
    """The step whose weights are the result."""
    wanted = config.load_best_at_end
    if wanted is None:
        wanted = config.early_stopping_patience is not None
    best = position.best
    return best.step if wanted and best.loss is not None else position.step


def write_results(
    base: BaseModel,
    config: RunConfig,
    run: RunDirectory,
    record: dict[str, Any],
    adapter: Adapter | None,
    position: Position,
    steps: int,
    num_trained: int,
) -> Run:
    """Write the adapter or model, then its page, then the record that says that the run is finished.

    Raises:
        StorageError: The disk refused, or the run directory was taken away.
    """
    run.check_present()
    facts = {
        "run": run_id(record),
        "data": record["identity"]["training data"],
        "format": record["format"],
        "chat_template": read_template(config.data.chat_template) if config.data.chat_template else None,
        "steps": position.step,
    }
    recovered = recovery_results(run, position, result_step(position, config.training))
    if recovered:
        facts["recovery"] = {**recovered, "trained_before_on": record["identity"]["base quantization"]}
    if is_classifier(base.model):
        facts["labels"] = list(labels_of(base.model))
    if adapter is not None:
        save_adapter(base.model, run.adapter_path, adapter.name, facts=facts)
    else:
        if facts["chat_template"]:
            base.tokenizer.chat_template = facts["chat_template"]
        check_finite(
            {name: value.detach().to(base.dtype) for name, value in base.model.named_parameters()},
            f"the result of step {position.step}",
        )
        # Replaces what a kill left between these weights and the end of the record.
        saved = save_model(base.model, base.tokenizer, run.model_path, dtype=base.dtype, replace=True)
        _rename(base, run.model_path, saved)
    results = {
        "steps": position.step,
        "planned_steps": steps,
        "stopped_early": position.stopped_early,
        "skipped_steps": position.num_skipped,
        "overflow_steps": position.num_overflows,
        "num_tokens": position.num_tokens,
        "best_eval_loss": position.best.loss,
        "best_eval_step": position.best.step if position.best.loss is not None else None,
        "num_trained": num_trained,
        "peak_memory_bytes": peak_memory_bytes(),
        **recovered,
        "predicted_memory_bytes": record["predicted_memory"]["peak_bytes"],
        "splits": position.splits or None,
    }
    run.check_present()  # also after the weights, which take long and would make the directory anew
    digests = _digests(run.adapter_path if adapter is not None else run.model_path)
    record = {**record, "status": "finished", "results": results, "files": digests}
    write_run_report(run, record)
    run.write_record(record)  # last: a run that says it is finished has everything
    return _outcome(run, results, whole=adapter is None)


def _digests(directory: Path) -> dict[str, str]:
    """Digest of each file of a result; reads it once, about a second per gigabyte."""
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.is_file()}


def _outcome(run: RunDirectory, results: dict[str, Any], *, whole: bool) -> Run:
    return Run(
        directory=run.path,
        adapter=None if whole else run.adapter_path,
        model=run.model_path if whole else None,
        metrics=results,
    )


def finished_run(run: RunDirectory, record: Mapping[str, Any]) -> Run | None:
    """The outcome of a run whose record says that it is finished and whose result is there; else None.

    Raises:
        CheckpointError: run.json lacks what every run writes into it.
    """
    missing = [name for name in ("status", "config", "identity", "results") if name not in record]
    if missing:
        raise CheckpointError(
            f"run.json has no {', '.join(missing)}", where=str(run.record_path), fix="restore the file"
        )
    whole = record["config"].get("adapter") is None
    result = run.model_path if whole else run.adapter_path
    if record["status"] != "finished" or not result.is_dir():
        return None
    found = _digests(result)
    if any(found.get(name) != digest for name, digest in record.get("files", {}).items()):
        return None  # what a power cut took is written again
    return _outcome(run, dict(record["results"]), whole=whole)


def _rename(base: BaseModel, directory: Path, fingerprint: Fingerprint) -> None:
    """What is in memory is another base now: adapters trained on it next must name this one."""
    base.path, base.name, base.revision = directory, rooted_name(directory), None
    base.fingerprint = base.model.graft_fingerprint = fingerprint
    base.model.graft_name, base.model.graft_revision = base.name, None


def run_id(record: Mapping[str, Any]) -> str:
    """A name for a run that is the same wherever it is done: a digest of config, base, data and changes."""
    config = {name: value for name, value in record["config"].items() if name != "output"}
    # Where they lie does not count: the identity has digests of what is in them.
    config["model"] = {name: value for name, value in config["model"].items() if name != "name"}
    places = ("train", "eval", "chat_template")
    config["data"] = {name: value for name, value in config["data"].items() if name not in places}
    changes = [record["changes"]] if record.get("changes") else []
    text = json.dumps([config, record["identity"], *changes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
