"""What is learned in place of the next token: preferences between answers, classes. The loop is the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.nn import functional

from graft.data.loader import Batch
from graft.evaluate.classes import ClassTally, class_logits, evaluate_classes
from graft.evaluate.preferences import PreferenceLoss, Tally, evaluate_preferences, log_ratios


class Objective(Protocol):
    """A loss that the loop minimizes, and the figures that go with it."""

    base_passes: ClassVar[int]
    """Forward passes of the base, with no adapter and no gradient, over the tokens of each batch."""

    def weight(self, batch: Batch) -> int:
        """How many things of equal weight a batch holds: the loss of a step is the mean over them."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over a batch on the model's device, differentiable."""

    def figures(self) -> dict[str, float]:
        """Figures of the batches since the last call, for the log; finite, and none of the clock's."""

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        """Mean loss over batches without dropout, and its figures under names that begin with eval_."""


class Preferences:
    """The chosen answer is made likelier than the rejected one, measured from the base.

    The base is the model with its adapter off, so no second model is held.

    Args:
        loss: Which loss.
    """

    base_passes: ClassVar[int] = 1

    def __init__(self, loss: PreferenceLoss) -> None:
        self._loss = loss
        self._tally = Tally()

    def weight(self, batch: Batch) -> int:
        """Pairs."""
        return sum(map(len, batch.sample_ids)) // 2

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the pairs."""
        answers = log_ratios(model, batch)
        losses = self._loss.losses(answers)
        self._tally.add(losses, *self._loss.rewards(answers))
        return losses.sum()

    def figures(self) -> dict[str, float]:
        """Rewards and how often the chosen answer's was higher, since the last call."""
        found, self._tally = self._tally.figures(), Tally()
        return found

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        """Mean loss of a pair, and the same figures."""
        tally = evaluate_preferences(model, batches, self._loss)
        return tally.mean_loss, tally.figures("eval_")


class Classes:
    """The class of each text is made likelier.

    Args:
        num_classes: How many there are.
    """

    base_passes: ClassVar[int] = 0

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._tally = ClassTally(num_classes)

    def weight(self, batch: Batch) -> int:
        """Texts."""
        return batch.num_labelled_tokens

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over the texts."""
        logits, classes = class_logits(model, batch)
        losses = functional.cross_entropy(logits, classes, reduction="none")
        self._tally.add(losses, logits, classes)
        return losses.sum()

    def figures(self) -> dict[str, float]:
        """Accuracy since the last call, before the update."""
        tally, self._tally = self._tally, ClassTally(self._num_classes)
        return {"accuracy": tally.accuracy} if tally.num_texts else {}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        """Mean loss of a text, accuracy and macro-averaged F1."""
        tally = evaluate_classes(model, batches, self._num_classes)
        found = tally.figures()
        return found.pop("loss"), {f"eval_{name}": value for name, value in found.items()}
