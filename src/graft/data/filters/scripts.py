"""In which script a text is written, counted by the characters' Unicode scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from graft.data.filters.findings import SCRIPTS
from graft.data.filters.words import code_points

OTHER = "another script"

_LETTER = re.compile("[A-Za-z]")
_CLASSES = {"Kana": r"[\p{Script=Hiragana}\p{Script=Katakana}]"}
_JAPANESE = 0.05
"""Share of kana from which on Han characters count as Japanese too, written with both."""


def main_scripts(texts: Sequence[str]) -> NDArray[np.int64]:
    """The script of most letters of each text.

    A text of Han characters and kana counts as Kana. Languages that share a script (English and German) are
    not told apart, and a text in two scripts counts as that of the larger part.

    Args:
        texts: Any.

    Returns:
        For each the number of its script in `SCRIPTS`, len(SCRIPTS) for others, -1 for a text without
        letters.
    """
    plain = np.array([text.isascii() for text in texts], dtype=bool)
    found = np.where([_LETTER.search(text) is not None for text in texts], SCRIPTS.index("Latin"), -1)
    found[~plain] = _by_letters([text for text, ascii in zip(texts, plain, strict=True) if not ascii])
    return found


def _by_letters(texts: Sequence[str]) -> NDArray[np.int64]:
    points, starts = code_points(texts)
    kinds = _table()[points]
    owners = np.repeat(np.arange(starts.size - 1), np.diff(starts))[: points.size]
    letters = kinds > 0
    size = len(SCRIPTS) + 1
    flat = owners[letters] * size + (kinds[letters].astype(np.int64) - 1)
    counts = np.bincount(flat, minlength=(starts.size - 1) * size).reshape(-1, size)
    kana, han = SCRIPTS.index("Kana"), SCRIPTS.index("Han")
    japanese = counts[:, kana] > _JAPANESE * (counts[:, kana] + counts[:, han])
    counts[japanese, kana] += counts[japanese, han]
    counts[japanese, han] = 0
    return np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), -1)


def script_names(numbers: Sequence[int]) -> list[str]:
    """Names of the numbers that `main_scripts` gives, but for -1."""
    return [(*SCRIPTS, OTHER)[number] for number in numbers]


@cache
def _table() -> NDArray[np.uint8]:
    """For each code point 0, or 1 and the number of the script of this letter."""
    import regex  # type: ignore[import-untyped]

    every = "".join(map(chr, (point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF)))
    points = np.frombuffer(every.encode("utf-32-le"), dtype="<u4")
    table = np.zeros(0x110000, dtype=np.uint8)
    # What is letter and in none of the scripts below is in another; signs and digits are common to all.
    for found in regex.finditer(r"[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]+", every, regex.V1):
        table[points[found.start() : found.end()]] = len(SCRIPTS) + 1
    for number, name in enumerate(SCRIPTS, 1):
        pattern = _CLASSES.get(name, rf"\p{{Script={name}}}")
        for found in regex.finditer(rf"[\p{{L}}&&{pattern}]+", every, regex.V1):
            table[points[found.start() : found.end()]] = number
    return table
