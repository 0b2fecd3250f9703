"""The corpus of the built-in base: reproducible, true to its rules, and right in its answers."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]
SIZES = {"book_copies": 1, "num_conversations": 60, "num_plain": 60}


@pytest.fixture(scope="module")
def lexicon(script: Script) -> Any:
    return script("lexicon").Lexicon(["apron", "bridge", "candle", "drift", "ember", "forest"])


def answers(script: Script, lexicon: Any, name: str, count: int = 60) -> list[tuple[str, str, str]]:
    """(instruction, input, answer) of one drill, three of each wording."""
    script("corpus")
    maker = next(maker for maker in script("drills_words").DRILLS if maker.__name__ == name)
    rng = random.Random(7)
    found = []
    for _ in range(count):
        drill = maker(rng, lexicon)
        found += [(drill.instruction, *drill.make()) for _ in range(3)]
    return found


def test_the_same_seed_gives_the_same_rows(script: Script, books: Path) -> None:
    corpus = script("corpus")
    texts = corpus.read_books(books)
    assert corpus.rows(texts, seed=3, **SIZES) == corpus.rows(texts, seed=3, **SIZES)
    assert corpus.rows(texts, seed=3, **SIZES) != corpus.rows(texts, seed=4, **SIZES)


def test_held_out_books_are_not_read(script: Script, books: Path) -> None:
    corpus = script("corpus")
    assert sorted(corpus.read_books(books)) == ["first", "second"]
    assert "golden bird" not in json.dumps(corpus.rows(corpus.read_books(books), seed=0, **SIZES))


def test_paragraphs_are_unwrapped(script: Script) -> None:
    text = script("corpus").unwrap("It was\nlate, “he”\nsaid.\r\n\r\n  _No_,\nsaid she.")
    assert text == 'It was late, "he" said.\nNo, said she.'


def test_passages_give_back_the_book(script: Script, books: Path) -> None:
    corpus = script("corpus")
    text = corpus.read_books(books)["first"]
    found = list(corpus.passages(text, random.Random(0)))
    assert "".join(found).replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")
    assert max(map(len, found)) <= 1600


def test_rows_are_of_the_three_kinds(script: Script, books: Path, tmp_path: Path) -> None:
    corpus = script("corpus")
    made = corpus.write_corpus(books, tmp_path / "corpus.jsonl", seed=0, **SIZES)
    read = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert read == made
    kinds = Counter(frozenset(row) for row in read)
    assert kinds[frozenset({"messages"})] == 60
    assert kinds[frozenset({"prompt", "completion"})] == 60
    assert set(kinds) == {frozenset(k) for k in ({"text"}, {"messages"}, {"prompt", "completion"})}


def test_conversations_alternate_and_end_with_an_answer(script: Script, lexicon: Any) -> None:
    rng = random.Random(0)
    for _ in range(100):
        messages = script("corpus").conversation(rng, lexicon)["messages"]
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(message["content"].strip() for message in messages)


def test_every_drill_asks_and_answers(script: Script, lexicon: Any) -> None:
    script("corpus")
    for maker in script("drills_words").DRILLS:
        for _, given, answer in answers(script, lexicon, maker.__name__, 20):
            assert given.strip()
            assert answer.strip()
            assert "{" not in answer or answer.startswith("{")  # JSON, not a slot left open


def test_arithmetic_is_right(script: Script, lexicon: Any) -> None:
    signs = {"plus": "+", "minus": "-", "times": "*"}
    for _, given, answer in answers(script, lexicon, "arithmetic"):
        left, sign, right = re.search(r"(\d+) *(plus|minus|times|[-+*]) *(\d+)", given).groups()
        assert int(answer) == eval(f"{left}{signs.get(sign, sign)}{right}")


@pytest.mark.parametrize(
    "name", ["copy_text", "look_up", "pick_position", "what_follows", "answer_from_text"]
)
def test_copied_answers_stand_in_the_input(script: Script, lexicon: Any, name: str) -> None:
    for _, given, answer in answers(script, lexicon, name):
        assert answer in given


def test_reversed_lists_are_reversed(script: Script, lexicon: Any) -> None:
    for _, given, answer in answers(script, lexicon, "reverse_list"):
        separator = next((s for s in (", ", "; ", " | ", " / ", " - ", "\n", " > ") if s in given), " ")
        assert answer.split(separator) == given.split(separator)[::-1]


def test_sorted_lists_are_sorted(script: Script, lexicon: Any) -> None:
    for instruction, given, answer in answers(script, lexicon, "sort_list"):
        items = re.findall(r"\w+", answer)
        down = any(words in instruction for words in ("largest to smallest", "reverse", "Z to A"))
        key = int if items[0].isdigit() else str
        assert sorted(re.findall(r"\w+", given)) == sorted(items)
        assert items == sorted(items, key=key, reverse=down)


def test_word_counts_are_right(script: Script, lexicon: Any) -> None:
    for _, given, answer in answers(script, lexicon, "count_word"):
        listing, question = given.split("\n")
        asked = question.removeprefix("How many times does ").removesuffix(" occur?")
        assert int(answer) == listing.split().count(asked)


def test_membership_is_right(script: Script, lexicon: Any) -> None:
    for _, given, answer in answers(script, lexicon, "yes_no"):
        if match := re.fullmatch(r"Is (\d+) (\w+) than (\d+)\?", given):
            left, word, right = int(match[1]), match[2], int(match[3])
            holds = left < right if word == "smaller" else left > right
            assert (answer.lower() in {"yes", "true", "y"}) == holds


def test_extracted_fields_come_from_the_sentence(script: Script, lexicon: Any) -> None:
    for _, given, answer in answers(script, lexicon, "extract_fields"):
        assert sum(word in given for word in re.findall(r"\w+", answer)) >= 1
        if answer.startswith("{"):
            assert all(value in given for value in json.loads(answer).values())
