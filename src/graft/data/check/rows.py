"""The rows of a file once more, for what samples do not tell: raw texts, whole lengths, old marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from graft.data.config import DataConfig
from graft.data.formats import Conversation, Detected, Example, Pair, Text, detect, to_example
from graft.data.masking import Encoder
from graft.data.preferences import KNOWN, read_preference
from graft.data.samples import Rejected
from graft.data.sources import Row, read_rows
from graft.errors import DataError

LOOKED_AT = 2_000
"""Rows whose texts are searched for marks of templates."""
MOST_CHARACTERS = 1_200
"""Characters that are kept of a raw row."""
_UNLIMITED = 1 << 40
_FIRST = 100
_MARK = re.compile(r"[<>\[\]#|{}]")
_PLACE = re.compile(r"^(.*?(?::\d+|\[\d+\]))(?=$|:\d+$|, (?:message|turn) \d+$)")


@dataclass(frozen=True)
class Reread:
    """What the rows tell.

    Attributes:
        raw: Raw text by place, as a place is given by `row_of`.
        needed: Tokens of the rows that were to be measured, those within max_length left out.
        num_looked_at: Rows searched for marks of templates.
        num_templated: Those with a mark in half of their texts or more.
        unused: Columns of the first row that nothing reads.
    """

    raw: dict[str, str]
    needed: tuple[int, ...]
    num_looked_at: int
    num_templated: int
    unused: tuple[str, ...]


def row_of(place: str) -> str:
    """The row of a place: without the column, message or turn behind it."""
    found = _PLACE.match(place)
    return found[1] if found else place


def reread(
    sources: Sequence[tuple[str, str]],
    config: DataConfig,
    encoder: Encoder,
    kind: str,
    *,
    raw: set[str],
    measured: set[str],
) -> Reread:
    """Read the rows of files again, as far as is needed.

    Args:
        sources: The files or directories, each with the split that is read of it: "train" or "eval".
        config: As they were read before.
        encoder: As they were encoded with.
        kind: "text", "pair" or "class".
        raw: Places whose raw rows are wanted.
        measured: Places of rows whose whole length in tokens is wanted.

    Raises:
        StorageError: A file cannot be read.
    """
    again = _Again(config, encoder, kind, _Kept({row_of(place) for place in raw}, measured), measured)
    whole = [
        len(found[0]) - (kind == "class")  # texts with a class have no end token
        for found in encoder.encode(again.examples(sources), _UNLIMITED)
        if not isinstance(found, Rejected)
    ]
    if kind == "pair":  # a preference needs what its longer answer needs
        whole = [max(pair) for pair in zip(whole[0::2], whole[1::2], strict=False)]
    needed = tuple(length for length in whole if length > config.max_length)
    return Reread(again.kept.texts, needed, again.looked_at, again.templated, tuple(again.unused))


class _Again:
    """One more way through the rows, until everything that is wanted of them is known."""

    def __init__(
        self, config: DataConfig, encoder: Encoder, kind: str, kept: _Kept, measured: set[str]
    ) -> None:
        self._config, self._encoder, self._kind, self._measured = config, encoder, kind, measured
        self._marked = _marks(encoder)
        self.kept = kept
        self.looked_at = self.templated = 0
        self.unused: list[str] = []

    def examples(self, sources: Sequence[tuple[str, str]]) -> Iterator[Example]:
        """The examples of the rows that are measured; the others pass by."""
        config = self._config
        for path, split in sources:
            rows = read_rows(path, split=split, on_invalid=self.kept.invalid, columns=config.columns)
            limited = self.kept.watch(islice(rows, config.limit))
            first = list(islice(limited, _FIRST))
            if first:
                yield from self._of(first, limited)

    def _of(self, first: list[Row], rows: Iterator[Row]) -> Iterator[Example]:
        kind, config = self._kind, self._config
        detected = detect(first, config.format, config.prompt_template) if kind == "text" else None
        self.unused += [name for name in _unused(first[0], kind, detected) if name not in self.unused]
        for row in chain(first, rows):
            found = _examples(row, kind, detected, self._encoder)
            if self.looked_at < LOOKED_AT and found:
                self.looked_at += 1
                self.templated += is_templated(found[0], self._marked)
            if row.where in self._measured:
                yield from found
            if self.kept.done and self.looked_at >= LOOKED_AT:
                break


class _Kept:
    """Keeps the raw text of wanted rows as they pass, and knows when all have passed."""

    def __init__(self, wanted: set[str], measured: set[str]) -> None:
        self._wanted, self._left = wanted, wanted | measured
        self.texts: dict[str, str] = {}
        self._last = ""
        self.done = False

    def invalid(self, error: DataError, raw: str) -> None:
        """Keep a row that cannot be read."""
        self._keep(row_of(error.where), raw)

    def watch(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The same rows."""
        for row in rows:
            # Rows of one line have one place: with the next line it is certain that all of them have passed.
            self.done = not self._left and row.where != self._last
            self._last = row.where
            self._keep(row.where, _raw(row.value) if row.where in self._wanted else "")
            yield row

    def _keep(self, where: str, text: str) -> None:
        if where in self._wanted and text:
            told = "(several rows have this place)" if where in self.texts else text[:MOST_CHARACTERS]
            self.texts[where] = told
        self._left.discard(where)


def _raw(value: dict[str, Any] | str) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _examples(row: Row, kind: str, detected: Detected | None, encoder: Encoder) -> list[Example]:
    """The examples of a row; none of one that is wrong, which is told by the report already."""
    try:
        if kind == "pair":
            read = read_preference(row, chat=encoder.has_template)
            return [read.chosen, read.rejected]
        if kind == "class":
            text = row.value.get("text") if isinstance(row.value, dict) else None
            return [Text(text, row.where)] if isinstance(text, str) else []
        assert detected is not None
        return [to_example(row, detected, chat=encoder.has_template)]
    except DataError:
        return []


def _unused(row: Row, kind: str, detected: Detected | None) -> list[str]:
    if isinstance(row.value, str):
        return []
    if detected is not None:
        return detected.unused(row)
    used = KNOWN if kind == "pair" else {"text", "label"}
    return [name for name in row.value if name not in used]


def _marks(encoder: Encoder) -> Callable[[str], bool]:
    """Whether a text has what a template writes around messages: control tokens, headings in brackets."""
    pieces = template_marks(encoder)

    def marked(text: str) -> bool:
        return encoder.text.spells_control(text) or any(piece in text for piece in pieces)

    return marked


def template_marks(encoder: Encoder) -> tuple[str, ...]:
    """Lines that a chat template writes around messages and that hardly stand in other texts."""
    if not encoder.has_template:
        return ()
    one, two = "graftsaysone", "graftsaystwo"
    messages = [{"role": "user", "content": one}, {"role": "assistant", "content": two}]
    try:
        text = encoder.template.render(messages)
    except DataError:
        return ()  # a template that refuses such a talk has its own errors where it is used
    lines = {line.strip() for part in re.split(f"{one}|{two}", text) for line in part.splitlines()}
    return tuple(sorted(line for line in lines if 4 <= len(line) <= 60 and _MARK.search(line)))


def is_templated(example: Example, marked: Callable[[str], bool]) -> bool:
    """Whether half of the texts of an example, or more, have marks of a template in them."""
    if isinstance(example, Conversation):
        texts = [message["content"] for message in example.messages if message["content"].strip()]
    else:
        texts = [example.prompt, example.completion] if isinstance(example, Pair) else [example.text]
    return sum(map(marked, texts)) * 2 >= max(len(texts), 1)
