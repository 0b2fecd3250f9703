"""Texts to words and word n-grams as numbers of 64 bits, many texts at once."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from graft.data.shuffling import spread

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]

_BLANK, _PART, _SIGN, _CHARACTER, _PUNCTUATION = range(5)
PASSED_OVER = frozenset(".,;:!?'\"`´“”„‘’‚«»…。，、；：！？「」『』")
"""Punctuation that no two texts differ by; other signs (operators, currency, #, @) are words of their own."""
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x312F),  # radicals, kana, bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
"""Scripts that put no spaces between words: each character counts as one."""

_BASE = 0x9E3779B97F4A7C15 | 1
_WINDOW = 1 << 16
"""Characters that are hashed at a time."""
_NOTHING = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Grams:
    """The word n-grams of many texts, one after another.

    Attributes:
        hashes: Each n-gram as 64 bits; the same words give the same number on every machine.
        starts: Where each text's n-grams begin in `hashes`, and where the last text's end: one more than
            texts.
    """

    hashes: Hashes
    starts: Places

    def owners(self) -> Places:
        """The text of each n-gram."""
        return np.repeat(np.arange(self.starts.size - 1), np.diff(self.starts))


def code_points(texts: Sequence[str]) -> tuple[NDArray[np.uint32], Places]:
    """The characters of texts joined by line ends, and where each text begins; one more than texts."""
    # A lone half of a surrogate pair is no text; readers refuse it, and here it must only not stop anything.
    data = "\n".join(texts).encode("utf-32-le", "surrogatepass")
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) + 1 for text in texts], out=starts[1:])
    return np.frombuffer(data, dtype="<u4"), starts


def counted(marked: NDArray[np.bool_], starts: Places) -> Places:
    """How many characters of each text are marked; `starts` as of `code_points`."""
    if starts.size < 2:
        return np.zeros(0, dtype=np.int64)
    found: Places = np.add.reduceat(np.append(marked, False), starts[:-1], dtype=np.int64)
    return found


def words(texts: Sequence[str]) -> Grams:
    """The words of texts, in their order.

    A word is a run of letters, marks and digits, in lower case; a sign is a word, the punctuation of
    sentences is none; scripts without spaces have a word for each character.

    Args:
        texts: Any.

    Cost: about 10 nanoseconds a character; memory for 4 bytes a character and 8 a word of all texts together.
    """
    points, begins = code_points([text.lower() for text in texts])
    kinds = _kinds()[points]
    found = [_words(points[begin:end], kinds[begin:end]) for begin, end in _windows(kinds)]
    starts = [places + begin for (begin, _), (places, _) in zip(_windows(kinds), found, strict=True)]
    hashes = [part for _, part in found]
    return Grams(
        np.concatenate([_NOTHING, *hashes]),
        np.searchsorted(np.concatenate([np.zeros(0, dtype=np.int64), *starts]), begins),
    )


def _windows(kinds: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Stretches that cut no word and stay in the cache, however long the texts are."""
    cuts = [0]
    while cuts[-1] + _WINDOW < kinds.size:
        begin, end = cuts[-1], cuts[-1] + _WINDOW
        inside = np.flatnonzero(kinds[begin:end] != _PART)
        if inside.size:
            cuts.append(begin + int(inside[-1]) + 1)
            continue
        beyond = np.flatnonzero(kinds[end:] != _PART)
        cuts.append(end + int(beyond[0]) + 1 if beyond.size else kinds.size)
    cuts.append(kinds.size)
    return [(begin, end) for begin, end in pairwise(cuts) if begin < end]


def _words(points: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> tuple[Places, Hashes]:
    """Where each word begins, and its number."""
    part, alone = kinds == _PART, (kinds == _SIGN) | (kinds == _CHARACTER)
    starts_here, ends_here = part.copy(), part.copy()
    starts_here[1:] &= ~part[:-1]
    ends_here[:-1] &= ~part[1:]
    starts = np.flatnonzero(starts_here | alone)
    ends = np.flatnonzero(ends_here | alone)
    # A polynomial in the characters; divided by the power of its first place, it forgets where it stands.
    powers, inverses = _powers(-(-points.size // _WINDOW))
    sums = np.zeros(points.size + 1, dtype=np.uint64)
    np.cumsum((points + np.uint64(1)) * powers[: points.size], out=sums[1:])
    return starts, spread((sums[ends + 1] - sums[starts]) * inverses[starts])


def grams(found: Grams, n: int) -> Grams:
    """The n-grams of words, in their order; a text of fewer words is one n-gram, one of none has none.

    Args:
        found: Words, as `words` gives them.
        n: Words of an n-gram.
    """
    counts = np.diff(found.starts)
    sizes = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    starts = np.zeros(found.starts.size, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    owner = np.repeat(np.arange(counts.size), sizes)
    first = found.starts[owner] + (np.arange(starts[-1]) - starts[owner])
    ends = found.starts[owner + 1]
    total = np.zeros(first.size, dtype=np.uint64)
    for offset in range(n):
        there = first + offset < ends
        word = (
            found.hashes[np.minimum(first + offset, max(found.hashes.size - 1, 0))] if first.size else total
        )
        total += np.where(there, word * np.uint64(pow(_BASE, 2 * offset + 3, 1 << 64)), np.uint64(0))
    return Grams(spread(total), starts)


def visible_and_letters(points: NDArray[np.uint32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which characters are seen, and which are letters, marks or digits."""
    kinds = _kinds()[points]
    return kinds != _BLANK, (kinds == _PART) | (kinds == _CHARACTER)


@cache
def _kinds() -> NDArray[np.uint8]:
    """What each code point is: nothing visible, part of a word, a word alone, or punctuation."""
    kinds = np.zeros(0x110000, dtype=np.uint8)
    for point in range(0x110000):
        char = chr(point)
        category = unicodedata.category(char)[0]
        if category in "LMN":
            kinds[point] = _PART
        elif category in "SP":
            kinds[point] = _PUNCTUATION if char in PASSED_OVER else _SIGN
    for first, last in _UNSPACED:
        inside = kinds[first : last + 1]
        inside[inside == _PART] = _CHARACTER
    return kinds


@cache
def _powers(blocks: int) -> tuple[Hashes, Hashes]:
    """Powers of an odd number, and of its inverse, modulo 2**64."""
    size = blocks * _WINDOW
    inverse = pow(_BASE, -1, 1 << 64)
    both = []
    for base in (_BASE, inverse):
        table = np.full(size, base, dtype=np.uint64)
        table[0] = 1
        both.append(np.multiply.accumulate(table))
    return both[0], both[1]
