"""Rows that are probably not what they should be: empty answers, copies of the prompt, loops, broken text.

Each finding has a name, is told with its places, and removes rows only where `data.drop` names it. None is
certain: a table of numbers has few letters, a song repeats itself.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from graft.data.filters.content import Content, normalized
from graft.data.filters.findings import FINDINGS
from graft.data.filters.scripts import main_scripts, script_names
from graft.data.filters.words import Grams, code_points, counted, grams, visible_and_letters, words
from graft.data.report import MAX_PLACES, num_rows

MIN_WORDS = 30
"""Shorter texts repeat words by chance."""
MAX_REPEATED = 0.7
"""Share of a text's word 3-grams that stand in it before; natural texts of any length stay below a half."""
MIN_SIGNS, MIN_LETTERS = 20, 0.4
"""Visible characters from which on at least this share must be letters or digits."""
MIN_COPIED = 5
"""Words of a prompt with which an answer must not begin."""

_FOREIGN = (
    "[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)
_BROKEN = re.compile(f"\ufffd|[ÂÃâðÐÑ]{_FOREIGN}{{1,3}}")
_PLACEHOLDER = re.compile(
    r"<\s*no\s*(?:out|in)put\s*>|\blorem ipsum\b|\[(?:insert|your|enter|add)\b[^\]\n]{0,60}\]"
    r"|\{\{[^{}\n]{1,60}\}\}",
    re.IGNORECASE,
)
_EMPTY_WORDS = re.compile(r"\W*(?:n/?a|todo|tbd|tba|null|nan|undefined|xxx+)\W*", re.IGNORECASE)
_SIGNS = ("<", "[", "{{", "orem", "OREM")
"""One of these is in every placeholder; looking for them is ten times as fast."""
_SHORT = 40
_ENTITY = re.compile(r"&(?:[a-z]{2,8}|#\d{2,5});")


class Sanity:
    """Looks at examples as they stream by.

    Args:
        scripts: The scripts that rows may be written in; none for any.

    Attributes:
        counts: Rows of each finding.
        places: The first thousand places of each.
        scripts: Rows of each main script.
        script_places: The first thousand places of each.

    Cost: 15 microseconds a row of 50 words.
    """

    def __init__(self, scripts: Iterable[str] = ()) -> None:
        self._allowed = frozenset(scripts)
        self.counts: dict[str, int] = dict.fromkeys(FINDINGS, 0)
        self.places: dict[str, list[str]] = {name: [] for name in FINDINGS}
        self.scripts: dict[str, int] = {}
        self.script_places: dict[str, list[str]] = {}

    def look(self, contents: Sequence[Content]) -> list[tuple[str, ...]]:
        """What is odd about each example, by name; counted and remembered."""
        texts = [f"{content.prompt}\n{content.answer}" for content in contents]
        points, starts = code_points(texts)
        found = words([content.answer for content in contents])
        marks = {
            "blank_answer": [not any(map(str.isalnum, content.answer)) for content in contents],
            "copied_prompt": list(map(_copied, contents)),
            "repetitive": _repetitive(found).tolist(),
            "few_letters": _few_letters(points, starts).tolist(),
            "mojibake": list(map(_broken, texts)),
            "placeholder": [_placeholder(content.answer) for content in contents],
            "other_script": self._other_script(contents, main_scripts(texts)),
        }
        named = [tuple(name for name in FINDINGS if marks[name][row]) for row in range(len(contents))]
        for content, names in zip(contents, named, strict=True):
            for name in names:
                _count(self.counts, self.places, name, content.where)
        return named

    def _other_script(self, contents: Sequence[Content], numbers: NDArray[np.int64]) -> list[bool]:
        other = []
        for content, number in zip(contents, numbers.tolist(), strict=True):
            name = script_names([number])[0] if number >= 0 else ""
            if name:
                _count(self.scripts, self.script_places, name, content.where)
            other.append(bool(self._allowed and name and name not in self._allowed))
        return other

    def told(self, dropped: Iterable[str] = ()) -> list[str]:
        """Sentences about what was found, with the first place of each.

        Args:
            dropped: Findings whose rows are left out.
        """
        left = frozenset(dropped)
        told = [
            f"{num_rows(count)}{' left out' if name in left else ''}: {FINDINGS[name]} ({name}; the first: "
            f"{self.places[name][0]})"
            for name, count in self.counts.items()
            if count
        ]
        total = sum(self.scripts.values())
        most = max(self.scripts, key=self.scripts.__getitem__, default="")
        for name, count in sorted(self.scripts.items(), key=lambda item: -item[1]):
            # A tenth or more is no slip but a part of the data.
            if not self._allowed and name != most and count < total / 10:
                first = self.script_places[name][0]
                told.append(f"{num_rows(count)} in {name}, most others in {most} (the first: {first})")
        return told


def _count(counts: dict[str, int], places: dict[str, list[str]], name: str, where: str) -> None:
    counts[name] = counts.get(name, 0) + 1
    kept = places.setdefault(name, [])
    if len(kept) < MAX_PLACES:
        kept.append(where)


def _copied(content: Content) -> bool:
    if content.prompt.lstrip()[:1] != content.answer.lstrip()[:1]:
        return False  # what begins otherwise need not be compared word for word
    prompt, answer = normalized(content.prompt), normalized(content.answer[: 2 * len(content.prompt) + 100])
    if not prompt or not answer.startswith(prompt):
        return False
    rest = answer[len(prompt) :]
    return not rest.strip() or (prompt.count(" ") + 1 >= MIN_COPIED and not rest[0].isalnum())


def _repetitive(found: Grams) -> NDArray[np.bool_]:
    """Texts whose word 3-grams mostly stand in them before."""
    counts = np.diff(found.starts)
    triples = grams(found, 3)
    whole = (triples.owners().astype(np.uint64) << np.uint64(32)) | (triples.hashes >> np.uint64(32))
    whole.sort()
    again = whole[1:][whole[1:] == whole[:-1]]
    repeated = np.bincount((again >> np.uint64(32)).astype(np.int64), minlength=counts.size)
    return (counts >= MIN_WORDS) & (repeated > MAX_REPEATED * np.maximum(np.diff(triples.starts), 1))


def _few_letters(points: NDArray[np.uint32], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    seen, letters = visible_and_letters(points)
    num_seen, num_letters = counted(seen, starts), counted(letters, starts)
    return (num_seen >= MIN_SIGNS) & (num_letters < MIN_LETTERS * num_seen)


def _broken(text: str) -> bool:
    if text.isascii():
        return False
    for found in _BROKEN.finditer(text):
        if found[0] == "\ufffd":
            return True
        for length in range(2, len(found[0]) + 1):
            if _was_utf8(found[0][:length]):
                return True
    return False


def _was_utf8(text: str) -> bool:
    """Whether these are the bytes of one character, read as Windows-1252 or Latin-1."""
    for encoding in ("cp1252", "latin-1"):
        try:
            if len(text.encode(encoding).decode("utf-8")) == 1:
                return True
        except UnicodeError:
            continue
    return False


def _placeholder(answer: str) -> bool:
    if len(answer) < _SHORT and _EMPTY_WORDS.fullmatch(answer):
        return True
    if any(sign in answer for sign in _SIGNS) and _PLACEHOLDER.search(answer):
        return True
    if "&" not in answer or "</" in answer:
        return False  # a page, in which entities belong
    return any(html.unescape(found[0]) != found[0] for found in _ENTITY.finditer(answer))
