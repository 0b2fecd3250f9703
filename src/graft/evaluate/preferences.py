"""Preferences: log-probabilities of answers under a model and under its base, and what they lose.

With the log-ratio r = log p(answer | prompt) - log p_base(answer | prompt) and m = r_chosen - r_rejected:

- dpo: -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), e being the share of wrong labels (Rafailov et
  al. 2023, arXiv:2305.18290, eq. 7; label smoothing: Mitchell 2023, "conservative DPO")
- ipo: (m - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17), each r divided by the number of its
  tokens, as its authors recommend, so that beta means the same for short and long answers
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.attached import active_adapters, disabled
from graft.data.config import DataConfig
from graft.data.loader import Batch, Loader
from graft.data.preferences import ANSWERS, prepare_pairs
from graft.errors import ConfigError, DataError
from graft.evaluate.decoding import context_length, evaluating
from graft.evaluate.loss import IGNORED, labelled_losses
from graft.evaluate.metrics import Prediction


@dataclass(frozen=True)
class Answers:
    """Log-ratios of the answers of a batch.

    Attributes:
        ratios: (2 * pairs,) fp32, nats: log-probability under the model less that under its base; chosen and
            rejected in turn. Differentiable in the model.
        counts: Labelled tokens of each.
    """

    ratios: Tensor
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """Which loss, and its constants.

    Attributes:
        kind: "dpo" or "ipo".
        beta: Strength of the tie to the base.
        label_smoothing: Share of preferences taken to be the wrong way round; dpo only.
    """

    kind: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Beta r of the chosen and of the rejected answers, (pairs,) each."""
        ratios = answers.ratios
        if self.kind == "ipo":
            ratios = ratios / torch.tensor(answers.counts, dtype=ratios.dtype, device=ratios.device)
        return self.beta * ratios[0::2], self.beta * ratios[1::2]

    def losses(self, answers: Answers) -> Tensor:
        """The loss of each pair, (pairs,)."""
        chosen, rejected = self.rewards(answers)
        margin = chosen - rejected
        if self.kind == "ipo":
            return (margin / self.beta - 1 / (2 * self.beta)) ** 2
        wrong = self.label_smoothing
        agreeing, opposed = functional.logsigmoid(margin), functional.logsigmoid(-margin)
        return -(1 - wrong) * agreeing - wrong * opposed


def log_ratios(model: nn.Module, batch: Batch) -> Answers:
    """The answers of a batch under a model with an active adapter, against the base with no adapter.

    Args:
        model: A causal language model with an adapter that acts.
        batch: Of a loader of kind "pair", packed or not, on the model's device.

    Cost: besides the pass of the model one pass of the base, without gradient and without dropout: about half
    again the time of a step; no second model in memory.
    """
    with disabled(model), evaluating(model), torch.no_grad():
        base = _token_losses(model, batch)
    # Token by token: sums of hundreds of nats would leave few digits for their difference.
    gained = base - _token_losses(model, batch)
    counts = answer_tokens(batch)
    return Answers(torch.stack([part.sum() for part in gained.split(counts)]), counts)


def answer_tokens(batch: Batch) -> list[int]:
    """Labelled tokens of each sample of a batch, in the order of `batch.sample_ids`."""
    labelled = batch.labels != IGNORED
    numbers = (batch.position_ids == 0).cumsum(1) - 1
    counts: list[int] = []
    for row, ids in enumerate(batch.sample_ids):
        found = torch.bincount(numbers[row][labelled[row]], minlength=len(ids))
        counts += found.tolist()
    return counts


def _token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the labelled tokens in reading order, which is that of the samples."""
    return labelled_losses(model, batch.input_ids, batch.position_ids, batch.labels)[0]


class Tally:
    """Sums over pairs: what was lost, rewards, and how often the chosen answer had the higher one."""

    def __init__(self) -> None:
        self.num_pairs, self.loss = 0, 0.0
        self._chosen = self._rejected = 0.0
        self._won = 0

    def add(self, losses: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Count the pairs of a batch: losses and rewards, (pairs,) each."""
        self.num_pairs += len(losses)
        self.loss += float(losses.detach().double().sum())
        self._chosen += float(chosen.detach().double().sum())
        self._rejected += float(rejected.detach().double().sum())
        self._won += int((chosen > rejected).sum())

    @property
    def mean_loss(self) -> float:
        """Loss of a pair."""
        return self.loss / self.num_pairs

    def figures(self, prefix: str = "") -> dict[str, float]:
        """Means by name; none where a reward is not finite, or nothing was counted."""
        if not self.num_pairs or not math.isfinite(self._chosen + self._rejected):
            return {}
        chosen, rejected = self._chosen / self.num_pairs, self._rejected / self.num_pairs
        return {
            f"{prefix}reward_chosen": chosen,
            f"{prefix}reward_rejected": rejected,
            f"{prefix}reward_margin": chosen - rejected,
            f"{prefix}preference_accuracy": self._won / self.num_pairs,
        }


def evaluate_preferences(model: nn.Module, batches: Iterable[Batch], loss: PreferenceLoss) -> Tally:
    """Loss and rewards of a model over batches of pairs, every pair weighing the same, without dropout.

    Raises:
        DataError: There is no pair.
    """
    tally = Tally()
    with evaluating(model), torch.no_grad():
        for batch in batches:
            answers = log_ratios(model, batch)
            tally.add(loss.losses(answers), *loss.rewards(answers))
    if not tally.num_pairs:
        raise DataError("no pair to evaluate on", fix="check the data")
    return tally


METRICS = ("preference_accuracy", "log_ratio_chosen", "log_ratio_rejected", "log_ratio_margin")
"""What is measured of preferences: the share of pairs whose chosen answer gained more over the base than the
rejected one, and means of the log-ratios, in nats. beta times a log-ratio is the reward of training."""


def evaluate_preference_file(
    model: nn.Module, tokenizer: Any, path: str, data: DataConfig, *, batch_size: int = 8
) -> tuple[dict[str, float], list[Prediction], list[tuple[str, str]]]:
    """Measure an adapter on the preferences of a file.

    Args:
        model: With an adapter that acts.
        tokenizer: Its tokenizer.
        path: Rows with chosen and rejected answers.
        data: Its max_length, on_overlong, chat_template, skip_invalid and limit act here.
        batch_size: Pairs in one forward pass.

    Returns:
        Figures by name, what was found for each pair, and rows that could not be used.

    Raises:
        ConfigError: The model has no adapter, so that there is no base to compare it with.
        DataError: A row is wrong, or none can be used.
    """
    if not active_adapters(model):
        raise ConfigError(
            "preferences are measured against the base under an adapter; there is none",
            where="--adapter",
            fix="give --adapter DIRECTORY",
        )
    length = min(data.max_length, context_length(model))
    found = prepare_pairs(path, tokenizer, replace(data, max_length=length), "eval")
    loader = Loader(found.samples, batch_size, length, packing=False, shuffle=False, kind="pair")
    tally, predictions = Tally(), []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in loader.epoch(0):
            chosen, rejected = log_ratios(model, batch.to(device)).ratios.view(-1, 2).unbind(1)
            tally.add(rejected - chosen, chosen, rejected)
            for row, ratios in zip(
                batch.sample_ids[::2], zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True
            ):
                scores = dict(zip(ANSWERS, ratios, strict=True))
                best = max(scores, key=scores.__getitem__) if ratios[0] != ratios[1] else None
                where = found.samples[row[0]].where
                predictions.append(Prediction(where=where, choice=best, choice_scores=scores))
    figures = {name.replace("reward", "log_ratio"): value for name, value in tally.figures().items()}
    if not figures:
        raise DataError("a log-probability is not finite", where=path, fix="check the weights of the model")
    return {name: figures[name] for name in METRICS}, predictions, found.report.rejected
