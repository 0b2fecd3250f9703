"""The rows of a file once more, for what samples do not tell: raw texts, whole lengths, old marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
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
    path: str,
    split: str,
    config: DataConfig,
    encoder: Encoder,
    kind: str,
    *,
    raw: set[str],
    measured: set[str],
) -> Reread:
    """Read the rows of a file again, as far as is needed.

    Args:
        path: The file or directory.
        split: "train" or "eval".
        config: As it was read before.
        encoder: As it was encoded with.
        kind: "text", "pair" or "class".
        raw: Places whose raw rows are wanted.
        measured: Places of rows whose whole length in tokens is wanted.

    Raises:
        StorageError: The file cannot be read.
    """
    wanted = {row_of(place) for place in raw}
    texts: dict[str, str] = {}
    kept = _Kept(wanted, texts, measured)
    rows = read_rows(path, split=split, on_invalid=kept.invalid)
    limited = kept.watch(islice(rows, config.limit))
    first = list(islice(limited, _FIRST))
    examples = _reader(first, config, encoder, kind)
    marked = _marks(encoder)
    looked_at = templated = 0

    def lengthy() -> Iterator[Example]:
        nonlocal looked_at, templated
        for row in chain(first, limited):
            found = examples(row)
            if looked_at < LOOKED_AT and found:
                looked_at += 1
                templated += is_templated(found[0], marked)
            if row.where in measured:
                yield from found
            if kept.done and looked_at >= LOOKED_AT:
                break

    whole = [
        len(found[0].input_ids) - (kind == "class")  # texts with a class have no end token
        for found in encoder.encode(lengthy(), _UNLIMITED)
        if not isinstance(found, Rejected)
    ]
    if kind == "pair":  # a preference needs what its longer answer needs
        whole = [max(pair) for pair in zip(whole[0::2], whole[1::2], strict=False)]
    needed = tuple(length for length in whole if length > config.max_length)
    return Reread(texts, needed, looked_at, templated, _unused(first, config, kind))


class _Kept:
    """Keeps the raw text of wanted rows as they pass, and knows when all have passed."""

    def __init__(self, wanted: set[str], texts: dict[str, str], measured: set[str]) -> None:
        self._wanted, self._texts, self._left = wanted, texts, wanted | measured
        self._last = ""
        self.done = False

    def invalid(self, error: DataError, raw: str = "") -> None:
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
            told = "(several rows have this place)" if where in self._texts else text[:MOST_CHARACTERS]
            self._texts[where] = told
        self._left.discard(where)


def _raw(value: dict[str, Any] | str) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _reader(
    first: list[Row], config: DataConfig, encoder: Encoder, kind: str
) -> Callable[[Row], list[Example]]:
    """What gives the examples of a row; none of one that is wrong."""
    detected: Detected | None = None
    if kind == "text" and first:
        detected = detect(first, config.format)

    def examples(row: Row) -> list[Example]:
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
            return []  # told by the report already, with its place

    return examples


def _unused(first: list[Row], config: DataConfig, kind: str) -> tuple[str, ...]:
    if not first or isinstance(first[0].value, str):
        return ()
    if kind == "class":
        return tuple(name for name in first[0].value if name not in ("text", "label"))
    if kind == "pair":
        return tuple(name for name in first[0].value if name not in KNOWN)
    return tuple(detect(first, config.format).unused(first[0]))


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
