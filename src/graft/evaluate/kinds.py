"""Which figures a model is measured by: of written answers, of preferences, or of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.data.config import DataConfig
from graft.data.preferences import ANSWERS
from graft.data.sources import read_rows
from graft.errors import ConfigError
from graft.evaluate import classes, preferences
from graft.evaluate.generate import GenerationConfig
from graft.evaluate.metrics import find_metrics
from graft.evaluate.tasks import Evaluation, evaluate_file
from graft.models.classifier import is_classifier

USUAL = ("loss", "perplexity")
"""Figures where none are named."""


def check_names(names: Sequence[str]) -> None:
    """Refuse names of figures that no kind of model has, before anything is loaded.

    Raises:
        ConfigError: One is unknown; the closest is told.
    """
    others = {*preferences.METRICS, *classes.METRICS}
    if unknown := [name for name in names if name not in others]:
        find_metrics(unknown)


def measure(
    model: nn.Module,
    tokenizer: Any,
    path: str,
    names: Sequence[str],
    *,
    data: DataConfig,
    generation: GenerationConfig | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Compute figures of a model on a file.

    Args:
        model: A language model, or a classifier, with or without adapters.
        tokenizer: Its tokenizer.
        path: The data.
        names: Of figures; where empty those that are usual for the model and the data.
        data: How rows are read and cut.
        generation: How answers are written.
        batch_size: Rows, pairs or texts in one forward pass.

    Raises:
        ConfigError: A figure is unknown or does not go with the model or the data.
        DataError: A row is wrong, or none can be used.
        StorageError: The file cannot be read.
    """
    if is_classifier(model):
        _check(names, classes.METRICS, "a classifier")
        found = classes.evaluate_class_file(model, tokenizer, path, data, batch_size=batch_size)
        wanted = {name: found.metrics[name] for name in names or classes.METRICS}
        return _evaluation(wanted, found.predictions, found.rejected)
    preferring = any(name in preferences.METRICS for name in names)
    if preferring or (not names and _are_preferences(path, data)):
        _check(names, preferences.METRICS, "preferences")
        figures, rows, left = preferences.evaluate_preference_file(
            model, tokenizer, path, data, batch_size=batch_size
        )
        return _evaluation({name: figures[name] for name in names or preferences.METRICS}, rows, left)
    return evaluate_file(
        model,
        tokenizer,
        path,
        list(names or USUAL),
        data=data,
        generation=generation,
        batch_size=batch_size,
    )


def _evaluation(metrics: dict[str, float], predictions: Any, rejected: list[tuple[str, str]]) -> Evaluation:
    return Evaluation(metrics=metrics, num_rows=len(predictions), predictions=predictions, rejected=rejected)


def _check(names: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"the metric {name!r} is not one of {what}",
                where="metrics",
                fix=f"one of: {', '.join(known)}",
            )


def _are_preferences(path: str, data: DataConfig | None) -> bool:
    skips = data is not None and data.skip_invalid
    on_invalid = (lambda error, raw: None) if skips else None
    row = next(
        read_rows(path, split="eval", on_invalid=on_invalid, columns=None if data is None else data.columns),
        None,
    )
    return row is not None and isinstance(row.value, dict) and set(ANSWERS) <= row.value.keys()
