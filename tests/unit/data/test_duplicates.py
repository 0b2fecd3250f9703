"""Duplicates: what is equal, what is nearly so, what only looks alike; beside brute force."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from graft.data.examples import Conversation, Example, Pair, Text
from graft.data.filters.content import content_of
from graft.data.filters.duplicates import Duplicates
from graft.data.filters.near_duplicates import NUM_HASHES, SKETCH, NearIndex, bands_for
from graft.data.filters.sorted_index import DigestIndex, Places, SortedIndex


def pair(prompt: str, completion: str, line: int) -> Pair:
    return Pair(prompt, completion, f"a.jsonl:{line}")


def chat(turns: Sequence[tuple[str, str]], line: int, tools: list[Any] | None = None) -> Conversation:
    return Conversation([{"role": r, "content": c} for r, c in turns], f"a.jsonl:{line}", tools)


@cache
def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, min(len(words), 1)))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


@cache
def parts(one: Pair) -> set[Any]:
    return {("p", s) for s in shingles(one.prompt)} | {("a", s) for s in shingles(one.completion)}


def alike(one: Pair, other: Pair) -> tuple[float, float]:
    """Of the whole and of the answers, by sets."""
    return jaccard(parts(one), parts(other)), jaccard(shingles(one.completion), shingles(other.completion))


def brute_force(examples: Sequence[Pair], threshold: float) -> list[str | None]:
    kept: list[Pair] = []
    found: list[str | None] = []
    for example in examples:
        twin = next((k.where for k in kept if min(alike(k, example)) >= threshold), None)
        found.append(twin)
        if twin is None:
            kept.append(example)
    return found


def planted(count: int, seed: int) -> list[Pair]:
    """Rows of 30 to 60 words, of which some repeat another with up to three words changed."""
    chance = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(500)]
    rows: list[list[str]] = []
    for _ in range(count):
        if rows and chance.random() < 0.4:
            words = list(chance.choice(rows))
            for _ in range(chance.randrange(4)):
                words[chance.randrange(len(words))] = chance.choice(vocabulary)
        else:
            words = chance.choices(vocabulary, k=chance.randint(30, 60))
        rows.append(words)
    return [pair(" ".join(words[:10]), " ".join(words[10:]), i + 1) for i, words in enumerate(rows)]


EQUAL: list[tuple[Example, Example]] = [
    (pair("a", "b", 1), pair("a", "b", 2)),
    (pair("caf\u00e9", " b", 1), pair("cafe\u0301\n", "b  ", 2)),
    (Text("one\r\ntwo", "t:1"), Text("one two\n", "t:2")),
    (
        chat([("user", "a"), ("assistant", "b")], 1, [{"x": 1}]),
        chat([("user", "a"), ("assistant", "b")], 2, [{"x": 1}]),
    ),
]
DIFFERENT: list[tuple[Example, Example]] = [
    (pair("a", "b", 1), pair("a", "c", 2)),
    (pair("a b", "c", 1), pair("a", "b c", 2)),
    (pair("A", "b", 1), pair("a", "b", 2)),
    (pair("1 + 2", "b", 1), pair("1 - 2", "b", 2)),
    (chat([("user", "a"), ("assistant", "b")], 1), chat([("system", "a"), ("assistant", "b")], 2)),
    (chat([("user", "a"), ("assistant", "b")], 1), chat([("user", "a"), ("assistant", "b")], 2, [{"x": 1}])),
    (
        Conversation([{"role": "user", "content": "a"}], "c:1"),
        Conversation([{"role": "user", "content": "a"}], "c:2", None, 1),
    ),
]


@pytest.mark.parametrize("kind", ["exact", "near"])
@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_examples_are_found_with_the_place_of_the_first(
    one: Example, other: Example, kind: Any
) -> None:
    for together in (True, False):
        duplicates = Duplicates(kind)
        if together:
            assert duplicates.find_all([one, other]) == [None, one.where]
        else:
            assert [duplicates.find(one), duplicates.find(other)] == [None, one.where]
        assert (duplicates.num_exact, duplicates.num_near, duplicates.num_contradictions) == (1, 0, 0)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_examples_that_differ_are_no_exact_duplicates(one: Example, other: Example) -> None:
    assert Duplicates("exact").find_all([one, other]) == [None, None]


def test_one_prompt_with_two_answers_is_told_and_stays() -> None:
    rows = [pair("how?", "so", 1), pair("how?", "not so", 2), pair("how?", "so", 3), pair("why?", "so", 4)]
    for size in (1, 2, 4):
        duplicates = Duplicates("exact")
        found = [place for i in range(0, 4, size) for place in duplicates.find_all(rows[i : i + size])]
        assert found == [None, None, "a.jsonl:1", None]
        assert duplicates.num_contradictions == 1
        assert duplicates.contradictions == ["a.jsonl:2 = a.jsonl:1"]
    conversations = [chat([("user", "a"), ("assistant", answer)], line) for line, answer in enumerate("xy")]
    duplicates = Duplicates("exact")
    duplicates.find_all(conversations)
    assert duplicates.num_contradictions == 1


def test_a_long_prompt_does_not_hide_that_the_answers_differ() -> None:
    prompt = " ".join(f"word{i}" for i in range(2000))
    rows = [pair(prompt, "yes", 1), pair(prompt, "no", 2), pair(f"{prompt} more", "Yes.", 3)]
    assert Duplicates("near").find_all(rows) == [None, None, "a.jsonl:1"]


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_near_duplicates_are_those_of_brute_force(threshold: float) -> None:
    rows = planted(600, seed=int(threshold * 10))
    expected = brute_force(rows, threshold)
    duplicates = Duplicates("near", threshold)
    found = [place for i in range(0, len(rows), 97) for place in duplicates.find_all(rows[i : i + 97])]
    wrong = [
        row
        for row, place in zip(rows, found, strict=True)
        if place and not brute(row, rows, place, threshold)
    ]
    assert not wrong
    missed = sum(bool(e) and not f for e, f in zip(expected, found, strict=True))
    assert sum(map(bool, expected)) > 50
    assert missed <= 2


def brute(row: Pair, rows: Sequence[Pair], place: str, threshold: float) -> bool:
    return min(alike(row, rows[int(place.split(":")[1]) - 1])) >= threshold - 1e-9


def test_the_similarity_that_is_told_is_that_of_the_sets() -> None:
    one = pair("a b c d e f g h", "i j k l m n o p q r s t u v w x y z", 1)
    other = pair("a b c d e f g h", "i j k l m n o p q r s t u v w x y 0", 2)
    twins = Duplicates("near", 0.7).twins([content_of(one), content_of(other)])
    assert twins[1] is not None
    assert twins[1].similarity == pytest.approx(alike(one, other)[0])
    assert not twins[1].exact


def test_a_row_is_compared_with_the_rows_that_stay() -> None:
    words = [f"w{i}" for i in range(60)]
    rows = [
        pair("p", " ".join(words[:k] + [f"x{i}" for i in range(60 - k)]), 60 - k) for k in (60, 56, 52, 48)
    ]
    found = Duplicates("near").find_all(rows)
    assert found == brute_force(rows, 0.8)
    assert found[1] == "a.jsonl:0"
    assert None in found[2:]


def test_long_texts_are_compared_by_a_sample() -> None:
    chance = random.Random(1)
    words = [str(chance.random()) for _ in range(4000)]
    for changed, expected in ((40, True), (700, False)):
        other = list(words)
        for place in range(0, 4000, 4000 // changed):
            other[place] = "changed" + str(place)
        texts = [Text(" ".join(words), "t:1"), Text(" ".join(other), "t:2")]
        true = jaccard(shingles(texts[0].text), shingles(texts[1].text))
        twin = Duplicates("near", 0.8).twins([content_of(text) for text in texts])[1]
        assert (twin is not None) == expected
        assert abs(true - 0.8) > 4 * np.sqrt(0.16 / SKETCH)
        if twin:
            assert abs(twin.similarity - true) < 4 * np.sqrt(true * (1 - true) / SKETCH)


def test_rows_that_share_boilerplate_stay_and_their_duplicates_are_found() -> None:
    chance = random.Random(0)
    head = " ".join(f"rule{i}" for i in range(80))
    bodies = [" ".join(chance.choices([f"w{i}" for i in range(300)], k=40)) for _ in range(300)]
    rows = [pair(f"{head} {body}", f"answer {body[:60]}", i + 1) for i, body in enumerate(bodies)]
    again = [pair(f"{head} {body} now", f"answer {body[:60]}", i + 1000) for i, body in enumerate(bodies)]
    assert Duplicates("near").find_all([*rows, *again]) == [None] * 300 + [row.where for row in rows]


def test_bands_miss_few_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.99, 1.0):
        bands, size = bands_for(threshold)
        assert bands * size <= NUM_HASHES
        assert (1 - threshold**size) ** bands <= 0.005


def test_bands_agree_as_often_as_their_formula_says() -> None:
    chance = random.Random(3)
    vocabulary = [f"w{i}" for i in range(3000)]
    index = NearIndex(0.8)
    bands, size = bands_for(0.8)
    agreed, expected, trials = 0, 0.0, 150
    for _ in range(trials):
        words = chance.choices(vocabulary, k=40)
        other = list(words)
        other[20] = "changed"
        rows = [content_of(Text(" ".join(words), "t:1")), content_of(Text(" ".join(other), "t:2"))]
        keys = index.sketch(rows).keys
        agreed += int((keys[0] == keys[1]).sum())
        expected += bands * jaccard(shingles(" ".join(words)), shingles(" ".join(other))) ** size
    assert abs(agreed - expected) < 6 * np.sqrt(trials * bands)


def test_examples_without_words_are_like_nothing() -> None:
    rows: list[Example] = [Text("...", "t:1"), Text("!!!", "t:2"), Text("...", "t:3"), pair("?", "!", 4)]
    assert Duplicates("near").find_all(rows) == [None, None, "t:1", None]
    assert Duplicates("near").find_all([]) == []


def test_an_index_finds_what_was_put_in_over_many_runs() -> None:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 400, 5000).astype(np.uint64)
    index = SortedIndex()
    for begin in range(0, 5000, 7):
        index.add(keys[begin : begin + 7], np.arange(begin, min(begin + 7, 5000)))
    asked = np.array([3, 399, 3, 1000], dtype=np.uint64)
    places, rows = index.find(asked, most=10_000)
    found = {i: sorted(rows[places == i].tolist()) for i in range(4)}
    assert found == {i: np.flatnonzero(keys == key).tolist() for i, key in enumerate(asked)}


def test_digests_that_share_their_key_are_told_apart() -> None:
    index = DigestIndex()
    digests = np.array([[5 << 32, 1], [5 << 32, 2], [5 << 32 | 7, 1]], dtype=np.uint64)
    index.add(digests[:2])
    assert index.find(digests).tolist() == [0, 1, -1]


def test_places_come_back_as_they_were() -> None:
    names = [
        "/a/b.jsonl:1",
        "/a/b.jsonl:10000000000",
        "c:rows[3]",
        "12",
        ":7",
        "x:007",
        "/a/b.jsonl:0",
        "a:²",
    ]
    places = Places()
    places.extend(names)
    assert [places[i] for i in range(len(names))] == names


def test_a_copy_of_a_near_duplicate_is_told_with_the_row_that_stays() -> None:
    words = [f"w{i}" for i in range(60)]
    near = " ".join([*words[:59], "other"])
    rows = [pair("p", " ".join(words), 1), pair("p", near, 2), pair("p", near, 3)]
    for size in (1, 2, 3):
        duplicates = Duplicates("near")
        found = [place for i in range(0, 3, size) for place in duplicates.find_all(rows[i : i + size])]
        assert found == [None, "a.jsonl:1", "a.jsonl:1"]
        assert (duplicates.num_exact, duplicates.num_near) == (0, 2)
