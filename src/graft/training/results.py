"""What a run leaves: the adapter or model, its facts, run.json and the report page."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.adapters.attached import Adapter
from graft.adapters.peft_format import save_adapter
from graft.data.templates import read_template
from graft.models.load import BaseModel
from graft.models.save import save_model
from graft.runs import RunDirectory
from graft.training.checkpoint import Position, copy_into, load_checkpoint
from graft.training.config import RunConfig, TrainingConfig
from graft.training.loop import Job
from graft.training.monitors import peak_memory_bytes
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
    wanted = config.load_best_at_end
    if wanted is None:
        wanted = config.early_stopping_patience is not None
    best = position.best
    if not wanted or best.loss is None or best.step == position.step:
        return f"result: the weights after step {position.step}"
    checkpoint = load_checkpoint(job.run.checkpoint_path(best.step))
    copy_into(job.parameters, checkpoint.trained, str(checkpoint.path))
    return f"result: the weights after step {best.step}, with the lowest evaluation loss ({best.loss:.4f})"


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
    """Write the adapter or model, then the record that says that the run is finished, then its page."""
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
