"""A model on a task: the metrics that were named, over all rows, with what the model made of each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from graft.data.chat.templates import read_template
from graft.data.columns import check_used
from graft.data.config import DataConfig
from graft.data.formats import Detected, Example, detect, to_example
from graft.data.sources import Row, read_rows
from graft.errors import ConfigError, DataError
from graft.evaluate.generate import GenerationConfig
from graft.evaluate.metrics import Need, Prediction, find_metrics
from graft.evaluate.passes import ChoicePass, LossPass, Pass, Task, TextPass
from graft.files import write_text


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model did on a task."""

    metrics: dict[str, float]
    num_rows: int
    """Rows that every metric counts."""
    predictions: list[Prediction]
    """One for each of these rows, in their order."""
    rejected: list[tuple[str, str]]
    """Rows that could not be used: where, and why."""


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[Example],
    metrics: Sequence[str],
    *,
    data: DataConfig | None = None,
    generation: GenerationConfig | None = None,
    batch_size: int = 8,
    choices: Sequence[str] = (),
) -> Evaluation:
    """Compute metrics of a model on examples.

    The prompt of a conversation is all of it up to its last assistant turn. Rows that cannot be used (no
    answer, a prompt that fills the context) count in no metric and are listed.

    Args:
        model: A causal language model of transformers, with or without adapters, dense or quantized.
        tokenizer: Its tokenizer, a fast one.
        examples: What `graft.data.formats.to_example` makes of rows.
        metrics: Names from `graft.evaluate.metrics.METRICS`.
        data: Its max_length, on_overlong, loss_on, chat_template and skip_invalid act here.
        generation: How answers are written; greedy by default.
        batch_size: Rows (for accuracy: choices) that go through the model at a time.
        choices: The answers that accuracy chooses from; by default the different answers in the data.

    Returns:
        The metrics by name, and the predictions.

    Raises:
        ConfigError: A metric is unknown, or does not fit the data.
        DataError: A row is wrong, or none can be used.
    """
    wanted = find_metrics(metrics)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}", where="batch_size", fix="use 1 or more")
    data = data or DataConfig()
    task = Task(
        model=model,
        tokenizer=tokenizer,
        examples=list(examples),
        data=data,
        template=read_template(data.chat_template) if data.chat_template else None,
        batch_size=batch_size,
    )
    make: dict[Need, Callable[[], Pass]] = {
        "loss": lambda: LossPass(task),
        "text": lambda: TextPass(task, generation or GenerationConfig()),
        "choice": lambda: ChoicePass(task, choices),
    }
    passes = [make[need]() for need in dict.fromkeys(metric.need for metric in wanted)]
    for each in passes:
        each.prepare()
    if not task.used:
        where, reason = next(iter(task.rejected.values()), ("", "there are no rows"))
        raise DataError(f"no row can be evaluated: {reason}", where=where, fix="check the data")
    for each in passes:
        each.run()
    predictions = [task.predictions[place] for place in task.used]
    return Evaluation(
        metrics={metric.name: metric.compute(predictions) for metric in wanted},
        num_rows=len(predictions),
        predictions=predictions,
        rejected=list(task.rejected.values()),
    )


def evaluate_file(
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike[str],
    metrics: Sequence[str],
    *,
    data: DataConfig | None = None,
    generation: GenerationConfig | None = None,
    batch_size: int = 8,
    choices: Sequence[str] = (),
) -> Evaluation:
    """Compute metrics of a model on the rows of a file, as `evaluate` does on examples.

    Args:
        path: A data file, or a directory with an evaluation file.
        data: Also its format and limit act here.

    Raises:
        ConfigError: A metric is unknown, or does not fit the data.
        DataError: A row is wrong, or none can be used.
        StorageError: The file cannot be read.
    """
    find_metrics(metrics)
    data = data or DataConfig()
    refused: list[DataError] = []
    refuse = refused.append if data.skip_invalid else None
    on_invalid = (lambda error, _: refused.append(error)) if data.skip_invalid else None
    reading = read_rows(path, split="eval", on_invalid=on_invalid, columns=data.columns)
    rows = list(islice(reading, data.limit))
    if not rows:
        raise DataError("no row can be evaluated: there are no rows", where=str(path), fix="check the file")
    chat = bool(data.chat_template or tokenizer.chat_template)
    detected = detect(rows, data.format, data.prompt_template)
    check_used(data.columns, detected.unused(rows[0]), detected.format, str(path))
    examples = list(_examples(rows, detected, chat, refuse))
    found = evaluate(
        model,
        tokenizer,
        examples,
        metrics,
        data=data,
        generation=generation,
        batch_size=batch_size,
        choices=choices,
    )
    found.rejected[:0] = [(error.where, error.what) for error in refused]
    return found


def _examples(
    rows: Sequence[Row], detected: Detected, chat: bool, refuse: Callable[[DataError], None] | None
) -> Iterator[Example]:
    for row in rows:
        try:
            yield to_example(row, detected, chat=chat)
        except DataError as error:
            if refuse is None:
                raise
            refuse(error)


def write_predictions(path: str | os.PathLike[str], predictions: Sequence[Prediction]) -> None:
    """Write what a model made of each row, as JSON lines.

    Raises:
        StorageError: The file cannot be written.
    """
    lines = (json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in predictions)
    write_text(path, "".join(lines))
