"""How likely a model finds each of several completions of a prompt, the prompt being read only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.errors import ConfigError
from graft.evaluate.decoding import Decoding, context_length, evaluating
from graft.evaluate.loss import head_losses


@dataclass(frozen=True)
class Question:
    """A prompt and the completions to choose from, as token ids."""

    prompt: Sequence[int]
    choices: Sequence[Sequence[int]]
    where: str = ""


def choice_scores(
    model: nn.Module, questions: Sequence[Question], *, batch_size: int = 16
) -> list[list[float]]:
    """Log-likelihood of the tokens of each choice, given the prompt.

    Prompts are read in batches; what differs between the choices is read from a copy of the cache.

    Args:
        model: A causal language model of transformers.
        questions: Prompts and choices, none of them empty.
        batch_size: Choices scored at a time, where a question does not have more.

    Returns:
        For each question the sums over the tokens of each choice, in nats.

    Raises:
        ConfigError: A prompt with a choice is longer than the model's context.
    """
    _check(model, questions)
    scores: list[list[float]] = [[] for _ in questions]
    order = sorted(range(len(questions)), key=lambda place: len(questions[place].prompt))
    with evaluating(model), torch.no_grad():
        for places in _batches(order, questions, batch_size):
            found = _score(model, [questions[place] for place in places])
            for place, sums in zip(places, found, strict=True):
                scores[place] = sums
    return scores


def _check(model: nn.Module, questions: Sequence[Question]) -> None:
    context = context_length(model)
    for question in questions:
        assert question.prompt
        assert all(question.choices)
        longest = len(question.prompt) + max(map(len, question.choices))
        if longest > context:
            raise ConfigError(
                f"{longest} tokens do not fit in the model's context of {context}",
                where=question.where,
                fix="shorten the prompt or the choices",
            )


def _batches(order: list[int], questions: Sequence[Question], batch_size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for place in order:
        num_choices = len(questions[place].choices)
        if batch and size + num_choices > batch_size:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += num_choices
    if batch:
        yield batch


def _score(model: nn.Module, questions: list[Question]) -> list[list[float]]:
    decoding = Decoding(model, [question.prompt for question in questions])
    chances = torch.log_softmax(decoding.logits, -1).double()
    rows = [row for row, question in enumerate(questions) for _ in question.choices]
    choices = [choice for question in questions for choice in question.choices]
    device = chances.device
    scores = chances[torch.tensor(rows, device=device), torch.tensor([c[0] for c in choices], device=device)]
    longer = [place for place, choice in enumerate(choices) if len(choice) > 1]
    if longer:
        rest = _rest(model, decoding, [rows[place] for place in longer], [choices[place] for place in longer])
        scores[torch.tensor(longer, device=device)] += rest
    return [part.tolist() for part in scores.split([len(question.choices) for question in questions])]


def _rest(model: nn.Module, decoding: Decoding, rows: list[int], choices: list[Sequence[int]]) -> Tensor:
    """Log-likelihood of each choice's tokens after its first one, (choices,) float64."""
    longest = max(map(len, choices))
    padded = torch.tensor([[*choice, *[-1] * (longest - len(choice))] for choice in choices])
    hidden = decoding.advance(rows, padded[:, :-1].clamp(min=0).tolist())
    targets = padded[:, 1:].to(hidden.device)
    real = targets >= 0
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=hidden.device)
    losses[real] = head_losses(model, hidden[real], targets[real]).double()
    return -losses.sum(1)
