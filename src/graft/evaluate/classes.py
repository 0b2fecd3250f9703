"""Classes of texts: the loss of a classifier, its accuracy and its macro-averaged F1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.data.classes import ClassReader
from graft.data.config import DataConfig
from graft.data.loader import Batch, Loader
from graft.data.masking import IGNORED
from graft.errors import DataError
from graft.evaluate.decoding import context_length, evaluating
from graft.evaluate.metrics import Prediction
from graft.models.classifier import labels_of
from graft.models.families import head, hidden_states


def class_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of each text of a batch, taken at its last token, and its class.

    Args:
        model: A classifier, with or without adapters.
        batch: Of a loader of kind "class", packed or padded, on the model's device.

    Returns:
        (texts, classes) fp32 and (texts,) long, in the order of `batch.sample_ids`.
    """
    hidden = hidden_states(model, batch.input_ids, batch.position_ids)
    kept = batch.labels != IGNORED
    return head(model, hidden[kept]).float(), batch.labels[kept]


class ClassTally:
    """Sums over texts: losses, and how often which class was taken for which.

    Args:
        num_classes: How many there are.
    """

    def __init__(self, num_classes: int) -> None:
        self.loss = 0.0
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)

    def add(self, losses: Tensor, logits: Tensor, classes: Tensor) -> None:
        """Count texts: losses (texts,), logits (texts, classes), true classes (texts,)."""
        self.loss += float(losses.detach().double().sum())
        taken = logits.detach().argmax(-1)
        size = len(self.confusion)
        found = torch.bincount((classes * size + taken).cpu(), minlength=size * size)
        self.confusion += found.view(size, size)

    @property
    def num_texts(self) -> int:
        """How many were counted."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of texts whose likeliest class is theirs."""
        return int(self.confusion.diagonal().sum()) / self.num_texts

    @property
    def macro_f1(self) -> float:
        """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur, in the data or as an answer."""
        right = self.confusion.diagonal().double()
        either = (self.confusion.sum(0) + self.confusion.sum(1)).double()
        occurs = either > 0
        return float((2 * right[occurs] / either[occurs]).mean())

    def figures(self) -> dict[str, float]:
        """Mean loss, accuracy and macro_f1."""
        return {
            "loss": self.loss / self.num_texts,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
        }


def evaluate_classes(model: nn.Module, batches: Iterable[Batch], num_classes: int) -> ClassTally:
    """Losses and answers of a classifier over batches, without dropout.

    Raises:
        DataError: There is no text.
    """
    tally = ClassTally(num_classes)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            logits, classes = class_logits(model, batch)
            tally.add(functional.cross_entropy(logits, classes, reduction="none"), logits, classes)
    if not tally.num_texts:
        raise DataError("no text to evaluate on", fix="check the data")
    return tally


@dataclass(frozen=True, kw_only=True)
class ClassEvaluation:
    """What a classifier did on a file."""

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    """Of each label: rows, precision, recall."""
    predictions: list[Prediction]
    rejected: list[tuple[str, str]]


METRICS = ("loss", "accuracy", "macro_f1")
"""What is measured of a classifier."""


def evaluate_class_file(
    model: nn.Module, tokenizer: Any, path: str, data: DataConfig, *, batch_size: int = 16
) -> ClassEvaluation:
    """Measure a classifier on the rows of a file.

    Args:
        model: A classifier, with or without adapters.
        tokenizer: Its tokenizer.
        path: Rows of "text" and "label".
        data: Its max_length, on_overlong, skip_invalid and limit act here.
        batch_size: Texts in one forward pass.

    Raises:
        DataError: A row is wrong, has a label that the model does not know, or none can be used.
        StorageError: The file cannot be read.
    """
    labels = labels_of(model)
    length = min(data.max_length, context_length(model))
    found = ClassReader(labels)(path, tokenizer, replace(data, max_length=length), "eval")
    loader = Loader(found.samples, batch_size, length, packing=False, shuffle=False, kind="class")
    tally, predictions = ClassTally(len(labels)), []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in loader.epoch(0):
            logits, classes = class_logits(model, batch.to(device))
            losses = functional.cross_entropy(logits, classes, reduction="none")
            tally.add(losses, logits, classes)
            where = [found.samples[index].where for row in batch.sample_ids for index in row]
            predictions += _predictions(where, logits, classes, losses, labels)
    return ClassEvaluation(
        metrics=tally.figures(),
        per_class=_per_class(tally.confusion, labels),
        predictions=predictions,
        rejected=found.report.rejected,
    )


def _predictions(
    where: Sequence[str], logits: Tensor, classes: Tensor, losses: Tensor, labels: Sequence[str]
) -> list[Prediction]:
    chances = torch.log_softmax(logits, -1).tolist()
    return [
        Prediction(
            where=place,
            reference=labels[true],
            choice=labels[max(range(len(labels)), key=scores.__getitem__)],
            choice_scores=dict(zip(labels, scores, strict=True)),
            loss=loss if math.isfinite(loss) else None,
        )
        for place, scores, true, loss in zip(where, chances, classes.tolist(), losses.tolist(), strict=True)
    ]


def _per_class(confusion: Tensor, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    told = {}
    for number, label in enumerate(labels):
        right, rows = int(confusion[number, number]), int(confusion[number].sum())
        answers = int(confusion[:, number].sum())
        told[label] = {
            "rows": rows,
            "precision": right / answers if answers else 0.0,
            "recall": right / rows if rows else 0.0,
        }
    return told
