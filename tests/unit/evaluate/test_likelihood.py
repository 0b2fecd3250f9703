from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.errors import ConfigError
from graft.evaluate.likelihood import Question, choice_scores
from graft.models.load import load


@pytest.fixture
def tiny(tiny_dir: Callable[..., Path], tiny_family: str) -> Any:
    return load(tiny_dir(tiny_family)).model


def _expected(model: Any, prompt: list[int], choice: list[int]) -> float:
    """The definition: log-probabilities of the choice's tokens in one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *choice]])).logits[0].double()
    chances = torch.log_softmax(logits, -1)
    return sum(float(chances[len(prompt) + place - 1, token]) for place, token in enumerate(choice))


def _questions() -> list[Question]:
    generator = torch.Generator().manual_seed(4)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 264, (length,), generator=generator).tolist()

    sizes = [(12, (1, 1, 1)), (3, (2, 5, 1, 9)), (25, (4, 4)), (1, (1, 3)), (14, (7, 2, 2))]
    return [Question(ids(length), [ids(size) for size in choices]) for length, choices in sizes]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scores_are_the_sums_of_one_plain_pass_each(tiny: Any, batch_size: int) -> None:
    questions = _questions()
    found = choice_scores(tiny, questions, batch_size=batch_size)
    for question, scores in zip(questions, found, strict=True):
        expected = [_expected(tiny, list(question.prompt), list(choice)) for choice in question.choices]
        # fp32 forward passes over other paddings: sums of at most nine terms of size five
        assert scores == pytest.approx(expected, abs=2e-4)


def test_a_prompt_is_read_once_for_all_its_choices(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    rows = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, inputs: rows.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    choice_scores(model, [Question([5] * 40, [[6], [7], [8, 9, 10]])])
    assert rows == [(1, 40), (1, 2)]


def test_what_does_not_fit_the_context_is_refused(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    with pytest.raises(ConfigError, match="129 tokens do not fit") as error:
        choice_scores(model, [Question([5] * 126, [[6], [7, 8, 9]], where="rows.jsonl:3")])
    assert error.value.where == "rows.jsonl:3"
