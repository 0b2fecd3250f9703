"""The answer of an example: finding it, replacing it, and its tokens as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from graft.data.formats import Conversation, Example, Pair
from graft.data.masking import IGNORED, Sample
from graft.evaluate.detokenize import continuation


def up_to_answer(example: Example) -> Example | None:
    """An example without what follows its last answer; None where it is a conversation without one."""
    if not isinstance(example, Conversation):
        return example
    answers = [at for at, message in enumerate(example.messages) if message["role"] == "assistant"]
    return replace(example, messages=example.messages[: answers[-1] + 1]) if answers else None


def answer_of(example: Example) -> str | None:
    """The completion of a pair, or what the assistant says last; None where there is neither."""
    if isinstance(example, Pair):
        return example.completion
    shortened = up_to_answer(example)
    return str(shortened.messages[-1]["content"]) if isinstance(shortened, Conversation) else None


def with_answer(example: Example, answer: str) -> Example:
    """An example that ends with another answer in the place of its own."""
    if isinstance(example, Pair):
        return replace(example, completion=answer)
    shortened = up_to_answer(example)
    if not isinstance(shortened, Conversation):
        return example
    *history, last = shortened.messages
    return replace(shortened, messages=[*history, {**last, "content": answer}])


def split_answer(sample: Sample) -> tuple[list[int], list[int]]:
    """Token ids before the last answer of a sample, and of that answer with the tokens that end it."""
    end = len(sample.labels)
    while end and sample.labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and sample.labels[start - 1] != IGNORED:
        start -= 1
    return sample.input_ids[:start], sample.input_ids[start:end]


def without_ends(tokenizer: Any, answers: Sequence[list[int]]) -> list[list[int]]:
    """Answers without the tokens that end them, unless only these tell one answer from a longer one.

    How likely the end is says something about the model's habits, not about the answer; but "not" is always
    likelier than "not so" as long as the end of "not" does not count.
    """
    bare = [_without_end(tokenizer, answer) for answer in answers]
    ordered = sorted(bare)
    begins = any(one == other[: len(one)] for one, other in zip(ordered, ordered[1:], strict=False))
    return list(answers) if begins else bare


def _without_end(tokenizer: Any, answer: list[int]) -> list[int]:
    size = len(answer)
    while size and not tokenizer.decode(answer[size - 1 : size], skip_special_tokens=True).strip():
        size -= 1
    return answer[:size]


def num_labelled_characters(tokenizer: Any, sample: Sample) -> int:
    """Characters of the text that the labelled tokens of a sample stand for."""
    total, start = 0, 0
    for labelled, run in groupby(label != IGNORED for label in sample.labels):
        end = start + len(list(run))
        if labelled:
            total += len(continuation(tokenizer, sample.input_ids[:start], sample.input_ids[start:end]))
        start = end
    return total
