"""Words and n-grams as numbers: the same text gives the same ones wherever it stands, others others."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from graft.data.filters import words as module
from graft.data.filters.words import Grams, grams, words

TEXTS = [
    "Hello, World!",
    "",
    "one",
    "hello world",
    "  Tab\tand\nline  ",
    "x+y = 3.14",
    "你好 世界",
    "naïve Straße",
]


def of_each(found: Grams) -> list[list[int]]:
    cuts = found.starts.tolist()
    return [found.hashes[a:b].tolist() for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def plain_words(text: str) -> list[str]:
    return re.findall(r"[+=]|[一-鿿]|[^\W_]+", text.lower())


def same_pattern(hashes: Sequence[Sequence[int]], texts: Sequence[Sequence[object]]) -> bool:
    """Whether numbers are equal exactly where the things are."""
    flat = [
        (number, thing)
        for row, things in zip(hashes, texts, strict=True)
        for number, thing in zip(row, things, strict=True)
    ]
    return len(set(flat)) == len({number for number, _ in flat}) == len({thing for _, thing in flat})


def test_words_are_runs_of_letters_and_digits_signs_and_characters_of_unspaced_scripts() -> None:
    assert same_pattern(of_each(words(TEXTS)), [plain_words(text) for text in TEXTS])


@pytest.mark.parametrize("n", [1, 2, 3, 13])
def test_grams_are_those_of_each_text_alone(n: int) -> None:
    texts = [*TEXTS, " ".join(map(str, range(20)))]
    expected: list[list[tuple[str, ...]]] = []
    for text in texts:
        found = plain_words(text)
        expected.append([tuple(found[i : i + n]) for i in range(max(len(found) - n + 1, min(len(found), 1)))])
    assert same_pattern(of_each(grams(words(texts), n)), expected)


def test_the_order_of_words_counts() -> None:
    one, other = of_each(grams(words(["a b c", "c b a"]), 3))
    assert one != other


def test_long_texts_are_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["some words of a text " * 30, "x" * 500, "你" * 300, "a b"]
    whole = of_each(words(texts))
    module._powers.cache_clear()
    monkeypatch.setattr(module, "_WINDOW", 64)
    assert of_each(words(texts)) == whole
    monkeypatch.undo()
    module._powers.cache_clear()


def test_no_texts_have_no_words() -> None:
    assert words([]).starts.tolist() == [0]
    assert grams(words([]), 3).hashes.size == 0
    assert np.array_equal(grams(words(["", "..."]), 3).starts, [0, 0, 0])
