"""The passes of a model over examples: losses of labelled tokens, written answers, scored choices.

Each pass is prepared before any is run, so that a row that is unfit for one of them is left out of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from graft.config import closest
from graft.data.chat.turns import Choice
from graft.data.config import DataConfig
from graft.data.formats import Conversation, Example, Text
from graft.data.loader import Loader
from graft.data.masking import Encoder, Rejected, Sample
from graft.errors import ConfigError, DataError, ModelError
from graft.evaluate.answers import (
    answer_of,
    num_labelled_characters,
    split_answer,
    up_to_answer,
    with_answer,
    without_ends,
)
from graft.evaluate.decoding import context_length, evaluating
from graft.evaluate.generate import GenerationConfig, complete
from graft.evaluate.likelihood import Question, choice_scores
from graft.evaluate.loss import labelled_losses
from graft.evaluate.metrics import Prediction

MAX_CHOICES = 200
"""Most different answers that are taken as the choices without being named."""

UNCUT = 1 << 30
"""A length that no row has."""


@dataclass(kw_only=True)
class Task:
    """What all passes share."""

    model: nn.Module
    tokenizer: Any
    examples: Sequence[Example]
    data: DataConfig
    template: str | None
    """Text of a chat template to use instead of the tokenizer's."""
    batch_size: int
    predictions: list[Prediction] = field(default_factory=list)
    rejected: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.predictions = [
            Prediction(where=example.where, reference=answer_of(example)) for example in self.examples
        ]

    @property
    def used(self) -> list[int]:
        """Places of the examples that no pass has rejected."""
        return [place for place in range(len(self.examples)) if place not in self.rejected]

    def reject(self, place: int, reason: str) -> None:
        """Leave a row out."""
        self.rejected.setdefault(place, (self.examples[place].where, reason))

    def encode(
        self, examples: Mapping[int, Example], loss_on: Any, max_length: int, choice: Choice | None = None
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of examples, by place; those that give none are rejected.

        Raises:
            DataError: A row is wrong, or too long, and the data section says to stop then.
        """
        encoder = Encoder(
            self.tokenizer, chat_template=self.template, loss_on=loss_on, choice=choice, day=self.data.day
        )
        encoded = encoder.encode(examples.values(), max_length, self.data.on_overlong)
        for place, found in zip(examples, encoded, strict=True):
            if not isinstance(found, Rejected):
                yield place, found
                continue
            if found.invalid and not self.data.skip_invalid:
                fix = "correct the row, or set data.skip_invalid"
                raise DataError(found.reason, where=found.where, fix=fix)
            if found.overlong and self.data.on_overlong == "error":
                fix = "raise data.max_length, or truncate or drop"
                raise DataError(found.reason, where=found.where, fix=fix)
            self.reject(place, found.reason)

    def answers(self, examples: Sequence[Example]) -> Iterator[tuple[int, list[int], list[int]]]:
        """Of each example its place, the ids before its last answer, and the ids of that answer.

        They are the ids that training has, so a prompt here is the prompt that was trained on.

        Raises:
            ConfigError: A row is plain text, which has no answer.
        """
        asked: dict[int, Example] = {}
        for place, example in enumerate(examples):
            if isinstance(example, Text):
                raise ConfigError(
                    "a metric of answers needs rows with a prompt and an answer; this row is plain text",
                    where=example.where,
                    fix="use loss, perplexity or bits_per_character",
                )
            shortened = up_to_answer(example)
            if shortened is None:
                self.reject(place, "the conversation has no answer of the assistant")
            else:
                asked[place] = shortened
        for place, samples in self.encode(asked, "completion", UNCUT):
            yield place, *split_answer(samples[-1])

    def fits(self, place: int, prompt: Sequence[int], num_more: int) -> bool:
        """Whether a prompt and so many tokens more fit in the model's context; else the row is rejected."""
        context = context_length(self.model)
        if len(prompt) + num_more > context:
            self.reject(place, f"the prompt of {len(prompt)} tokens fills the model's context of {context}")
        return len(prompt) + num_more <= context


class Pass(Protocol):
    """One way through the data."""

    def prepare(self) -> None:
        """Encode the rows, rejecting those that are unfit."""
        ...

    def run(self) -> None:
        """Put the rows that are left through the model and fill their predictions."""
        ...


class LossPass:
    """Cross-entropy of the labelled tokens of each row."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._samples: dict[int, list[Sample]] = {}

    def prepare(self) -> None:
        """Encode the rows, rejecting those without a labelled token."""
        task = self._task
        length = min(task.data.max_length, context_length(task.model))
        choice = Choice(task.data.train_on_roles, task.data.train_on_last_turn)
        self._samples = dict(task.encode(dict(enumerate(task.examples)), task.data.loss_on, length, choice))

    def run(self) -> None:
        """Fill loss, num_labelled_tokens and num_labelled_characters."""
        task = self._task
        rows = [(task.predictions[place], sample) for place in task.used for sample in self._samples[place]]
        rows.sort(key=lambda row: len(row[1].input_ids))
        for row, sample in rows:
            characters = num_labelled_characters(task.tokenizer, sample)
            row.num_labelled_characters = (row.num_labelled_characters or 0) + characters
        for number, loss, count in self._losses([sample for _, sample in rows]):
            row = rows[number][0]
            row.loss = (row.loss or 0.0) + loss
            row.num_labelled_tokens = (row.num_labelled_tokens or 0) + count

    def _losses(self, samples: list[Sample]) -> Iterator[tuple[int, float, int]]:
        """Of each sample its number, its summed loss and its number of labelled tokens.

        Raises:
            ModelError: A loss is not finite.
        """
        task = self._task
        pad_id = task.tokenizer.pad_token_id or 0
        loader = Loader(samples, task.batch_size, UNCUT, packing=False, shuffle=False, pad_id=pad_id)
        device = next(task.model.parameters()).device
        with evaluating(task.model), torch.no_grad():
            for batch in loader.epoch(0):
                tensors = (batch.input_ids, batch.position_ids, batch.labels)
                losses, rows = labelled_losses(task.model, *(tensor.to(device) for tensor in tensors))
                counts = torch.bincount(rows, minlength=len(batch.sample_ids))
                sums = torch.zeros_like(counts, dtype=torch.float64).index_add_(0, rows, losses.double())
                for ids, total, count in zip(batch.sample_ids, sums.tolist(), counts.tolist(), strict=True):
                    if not math.isfinite(total):
                        raise ModelError(
                            f"the loss is {total}",
                            where=samples[ids[0]].where,
                            fix="check the weights, or load with dtype bfloat16 or float32",
                        )
                    yield ids[0], total, count


class TextPass:
    """The answer that the model writes to each prompt."""

    def __init__(self, task: Task, generation: GenerationConfig) -> None:
        self._task = task
        self._generation = generation
        self._prompts: dict[int, list[int]] = {}

    def prepare(self) -> None:
        """Encode the prompts, rejecting those that fill the context."""
        for place, prompt, _ in self._task.answers(self._task.examples):
            if self._task.fits(place, prompt, 1):
                self._prompts[place] = prompt

    def run(self) -> None:
        """Fill prompt and prediction."""
        task = self._task
        ends: list[int] = []
        if any(isinstance(example, Conversation) for example in task.examples):
            ends = Encoder(task.tokenizer, chat_template=task.template).end_of_turn_ids()
        prompts = [self._prompts[place] for place in task.used]
        done = complete(
            task.model, task.tokenizer, prompts, self._generation, batch_size=task.batch_size, end_ids=ends
        )
        for place, prompt, completion in zip(task.used, prompts, done, strict=True):
            task.predictions[place].prompt = task.tokenizer.decode(prompt)
            task.predictions[place].prediction = completion.text


class ChoicePass:
    """The log-likelihood of each choice after each prompt."""

    def __init__(self, task: Task, choices: Sequence[str]) -> None:
        self._task = task
        self._choices = list(choices)
        self._questions: dict[int, Question] = {}

    def prepare(self) -> None:
        """Encode each prompt with each choice, rejecting those that do not fit in the context."""
        task = self._task
        self._choices = self._choices or self._all_answers()
        self._check_choices()
        prompts: dict[int, list[int]] = {}
        answers: dict[int, list[list[int]]] = {}
        for choice in self._choices:
            for place, prompt, answer in task.answers([with_answer(row, choice) for row in task.examples]):
                prompts[place] = prompt
                answers.setdefault(place, []).append(answer)
        for place, found in answers.items():
            if place in task.rejected:
                continue
            bare = without_ends(task.tokenizer, found)
            if task.fits(place, prompts[place], max(map(len, bare))):
                self._questions[place] = Question(prompts[place], bare, task.examples[place].where)

    def run(self) -> None:
        """Fill prompt, choice, choice_scores and choice_tokens."""
        task = self._task
        questions = [self._questions[place] for place in task.used]
        found = choice_scores(task.model, questions, batch_size=task.batch_size)
        for place, question, scores in zip(task.used, questions, found, strict=True):
            row = task.predictions[place]
            row.prompt = task.tokenizer.decode(question.prompt)
            row.choice_scores = dict(zip(self._choices, scores, strict=True))
            row.choice_tokens = dict(zip(self._choices, map(len, question.choices), strict=True))
            row.choice = max(row.choice_scores, key=row.choice_scores.__getitem__)

    def _all_answers(self) -> list[str]:
        found = {row.reference for row in self._task.predictions if row.reference}
        if not 2 <= len(found) <= MAX_CHOICES:
            raise ConfigError(
                f"accuracy chooses between the answers in the data, which are {len(found)}",
                where="choices",
                fix=f"name the choices, or use data with 2 to {MAX_CHOICES} different answers",
            )
        return sorted(found)

    def _check_choices(self) -> None:
        for row in self._task.predictions:
            if row.reference and row.reference not in self._choices:
                near = closest(row.reference, self._choices)
                raise DataError(
                    f"the answer {row.reference!r:.100} is not among the choices",
                    where=row.where,
                    fix=f"did you mean {near!r}? White space counts" if near else "add it to the choices",
                )
