"""Byte-pair encoding in C++ on a vocabulary small enough to merge by hand."""

from __future__ import annotations

import numpy as np
import pytest

from graft.kernels.cpu import library
from graft.kernels.cpu.words import NUM_CHARACTERS, Kind, Marks, Pattern, Vocabulary, Words

pytestmark = pytest.mark.skipif(bool(library.problem()), reason=library.problem() or "compiled")

AB, BC, ABC, MARK = 300, 301, 302, 303


def kinds(**others: Kind) -> np.ndarray:
    found = np.full(NUM_CHARACTERS, Kind.OTHER, np.uint8)
    found[[ord(char) for char in "abcdefghijklmnopqrstuvwxyz"]] = Kind.LETTER
    found[ord(" ")] = Kind.SPACE
    for char, kind in others.items():
        found[ord(char)] = kind
    return found


def words(*merges: tuple[int, int, int], **given: object) -> Words:
    fields: dict[str, object] = {"pattern": Pattern.GPT2, "kinds": kinds(), **given}
    return Words(
        Vocabulary(
            byte_ids=np.arange(256, dtype=np.int32),
            merges=np.asarray(merges, np.int32).reshape(-1, 3),
            **fields,  # type: ignore[arg-type]
        )
    )


def read(encoder: Words, *texts: str) -> list[list[int]]:
    found = encoder.read([text.encode() for text in texts])
    return [ids.tolist() for ids in np.split(found.ids, found.ends[:-1])]


A, B, C = map(ord, "abc")


def test_the_merge_that_was_learned_first_comes_first() -> None:
    assert read(words((B, C, BC), (A, B, AB)), "abc") == [[A, BC]]
    assert read(words((A, B, AB), (B, C, BC)), "abc") == [[AB, C]]
    assert read(words((A, B, AB), (AB, C, ABC)), "abcabc ab") == [[ABC, ABC, ord(" "), AB]]


def test_of_equal_merges_the_leftmost_comes_first() -> None:
    assert read(words((A, A, AB)), "aaaaa") == [[AB, AB, A]]


def test_tokens_begin_where_their_first_character_does() -> None:
    found = words((A, B, AB)).read(["é ab".encode(), b"", b"ab"])
    assert found.ids.tolist() == [0xC3, 0xA9, ord(" "), AB, AB]
    assert found.starts.tolist() == [0, 0, 1, 2, 0]
    assert (found.ends, found.done) == ([4, 4, 5], [True] * 3)


def test_an_unread_text_has_no_tokens() -> None:
    found = words(kinds=kinds(z=Kind.UNKNOWN)).read([b"ab", b"abz", b"ab " + b"c" * 600, b"a"])
    assert found.done == [True, False, False, True]
    assert (found.ids.tolist(), found.ends) == ([A, B, A], [2, 2, 2, 3])


def test_control_characters_are_their_tokens_and_split_words() -> None:
    encoder = words((A, B, AB), kinds=kinds(x=Kind.CONTROL), controls=[77], first_control=ord("x"))
    assert read(encoder, "abxab", "axb") == [[AB, 77, AB], [A, 77, B]]


def test_whole_words_come_before_merges() -> None:
    assert read(words((A, B, AB), wholes={b"abc": 9, b" ab": 8}), "abc ab ab") == [[9, 8, 8]]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (Marks.NONE, [A, 77, B, 77, 32, C]),
        (Marks.ALL, [MARK, A, 77, MARK, B, 77, MARK, 32, C]),
        (Marks.NOT_SPACES, [MARK, A, 77, MARK, B, 77, 32, C]),
        (Marks.BEGIN, [MARK, A, 77, B, 77, 32, C]),
    ],
)
def test_marks_stand_before_sections(marks: Marks, expected: list[int]) -> None:
    encoder = words(
        pattern=Pattern.SPACES,
        kinds=kinds(x=Kind.CONTROL),
        controls=[77],
        first_control=ord("x"),
        mark=MARK,
        marks=marks,
    )
    assert read(encoder, "axbx c") == [expected]


def test_a_word_is_another_one_where_it_has_a_mark() -> None:
    encoder = words((MARK, A, AB), pattern=Pattern.SPACES, mark=MARK, marks=Marks.BEGIN)
    assert read(encoder, "a", "b a", "a") == [[AB], [MARK, B, ord(" "), A], [AB]]


def test_no_texts() -> None:
    found = words().read([])
    assert (found.ids.tolist(), found.ends, found.done) == ([], [], [])


def test_a_control_character_may_stand_for_several() -> None:
    encoder = words(kinds=kinds(x=Kind.CONTROL), controls=[77], first_control=ord("x"), widths=[4])
    found = encoder.read([b"axbx", b"ab"])
    assert (found.ids.tolist(), found.starts.tolist()) == ([A, 77, B, 77, A, B], [0, 1, 5, 6, 0, 1])


@pytest.mark.parametrize("text", [b"a\xf0", b"ab\xe3\x81", b"\xf7\xbf\xbf\xbf"])
def test_what_is_no_text_is_not_read(text: bytes) -> None:
    assert words().read([text]).done == [False]


@pytest.mark.parametrize("pattern", Pattern)
def test_kinds_that_fit_no_pattern_do_no_harm(pattern: Pattern) -> None:
    """Each character of any kind: every text is read to its end, byte by byte."""
    encoder = words(pattern=pattern, kinds=np.arange(NUM_CHARACTERS, dtype=np.uint8) % 4 + 3 * (pattern == 3))
    text = bytes(range(32, 127)) * 2 + b" \n  \r a"
    found = encoder.read([text])
    assert not found.done[0] or found.ids.tolist() == list(text)
