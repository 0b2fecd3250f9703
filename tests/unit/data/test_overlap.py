"""Training rows that are in the evaluation data: equal, near, or with a stretch of it inside."""

from __future__ import annotations

import random
from typing import Any

import pytest

from graft.data.examples import Pair, Text
from graft.data.filters.overlap import MAX_ROWS, NGRAM, Overlap

WORDS = [f"w{i}" for i in range(200)]


def pair(prompt: str, completion: str, line: int, file: str = "train.jsonl") -> Pair:
    return Pair(prompt, completion, f"{file}:{line}")


def held_out(*rows: tuple[str, str]) -> list[Pair]:
    return [pair(prompt, answer, line, "eval.jsonl") for line, (prompt, answer) in enumerate(rows, 1)]


@pytest.mark.parametrize("by", ["exact", "near", "ngrams"])
def test_equal_rows_are_found_and_both_sides_counted(by: Any) -> None:
    overlap = Overlap(by)
    overlap.add(held_out(("a", "b"), ("c", "d"), ("e", "f"), ("a", "b")))
    train = [pair("a", "b", 1), pair("a", "c", 2), pair("c", " d", 3), pair("a", "b", 4)]
    assert overlap.find_all(train) == ["eval.jsonl:1", None, "eval.jsonl:2", "eval.jsonl:1"]
    assert (overlap.num_train, overlap.num_eval) == (3, 3)


def test_near_rows_are_found_where_asked_for() -> None:
    evaluation = held_out((" ".join(WORDS[:20]), " ".join(WORDS[20:60])), (" ".join(WORDS[:20]), "no"))
    train = [
        pair(" ".join(WORDS[:20]), " ".join([*WORDS[20:59], "other"]), 1),
        pair(" ".join(WORDS[:20]), "yes", 2),
    ]
    for by, expected in (("near", "eval.jsonl:1"), ("exact", None)):
        overlap = Overlap(by)  # type: ignore[arg-type]
        overlap.add(evaluation)
        assert overlap.find_all(train) == [expected, None]


def brute_force(train: list[str], evaluation: list[str]) -> list[bool]:
    def stretches(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}

    known = set().union(*map(stretches, evaluation))
    return [bool(known & stretches(text)) for text in train]


def test_a_prompt_inside_a_long_text_is_found_as_by_brute_force() -> None:
    chance = random.Random(0)
    evaluation = [" ".join(chance.choices(WORDS, k=chance.randint(8, 40))) for _ in range(50)]
    train = []
    for _ in range(200):
        words = chance.choices(WORDS, k=300)
        begin = chance.randrange(250)
        stolen = chance.choice(evaluation).split()[: chance.choice([NGRAM - 1, NGRAM, 40])]
        words[begin : begin + len(stolen)] = stolen
        train.append(" ".join(words))
    overlap = Overlap("ngrams")
    overlap.add(held_out(*((text, "x") for text in evaluation)))
    found = overlap.find_all([Text(text, f"t:{i}") for i, text in enumerate(train)])
    expected = brute_force(train, evaluation)
    assert [place is not None for place in found] == expected
    assert 20 < sum(expected) < 180


def test_wording_that_many_evaluation_rows_share_is_no_overlap() -> None:
    head = " ".join(WORDS[:20])
    overlap = Overlap("ngrams")
    overlap.add(held_out(*((f"{head} question{i}", f"answer{i}") for i in range(MAX_ROWS + 1))))
    assert overlap.find_all([pair(f"{head} quite another", "x", 1)]) == [None]
    few = Overlap("ngrams")
    few.add(held_out(*((f"{head} question{i}", f"answer{i}") for i in range(MAX_ROWS))))
    assert few.find_all([pair(f"{head} quite another", "x", 1)]) == ["eval.jsonl:1"]


def test_a_stretch_does_not_reach_from_prompt_to_answer() -> None:
    overlap = Overlap("ngrams")
    overlap.add(held_out((" ".join(WORDS[:NGRAM]), "x")))
    assert overlap.find_all([pair(" ".join(WORDS[:6]), " ".join(WORDS[6:NGRAM]), 1)]) == [None]


def test_without_evaluation_rows_nothing_overlaps() -> None:
    for by in ("exact", "near", "ngrams"):
        assert Overlap(by).find_all([pair("a", "b", 1)]) == [None]  # type: ignore[arg-type]
