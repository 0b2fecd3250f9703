"""Prompts written from the columns of a row: `data.prompt_template`."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import NoReturn

from graft.config import closest
from graft.data.examples import Pair, column_text
from graft.data.sources import Row
from graft.errors import ConfigError, DataError

FORMATS = ("auto", "prompt_completion", "alpaca")
"""Formats of rows with columns of text, on which a template acts."""
COMPLETIONS = ("completion", "response", "answer", "output")
"""Columns that hold what is learned, the first that a row has."""


@dataclass(frozen=True)
class PromptTemplate:
    r"""A text with columns in braces: "Question: {question}\nAnswer:".

    Attributes:
        parts: Plain texts and the column after each; None after the last.
        columns: The columns, in their order.
    """

    parts: tuple[tuple[str, str | None], ...]
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """Read a template; a brace of the text itself is written twice.

        Raises:
            ConfigError: It has a brace without its other, no column, or more than a plain name in braces.
        """
        try:
            found = list(string.Formatter().parse(text))
        except ValueError as error:
            _refuse(f"{text!r:.100}: {error}", 'a brace of the text itself is written twice: "{{"', error)
        for _, name, spec, conversion in found:
            if name is None:
                continue
            if not name or spec or conversion or any(sign in name for sign in ".[]"):
                inner = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                _refuse(f"{{{inner}}} is not the name of a column", "write {question}, nothing else inside")
        columns = tuple(dict.fromkeys(name for _, name, _, _ in found if name))
        if not columns:
            _refuse(f"{text!r:.100} names no column", 'write "Question: {question}\\nAnswer:"')
        return cls(tuple((plain, name) for plain, name, _, _ in found), columns)

    def fill(self, row: Row) -> str:
        """The prompt of a row.

        Raises:
            DataError: The row is a plain text, or a column is missing or holds something else than text.
        """
        if isinstance(row.value, str):
            raise DataError(
                "a plain text has no columns for data.prompt_template", where=row.where, fix="leave it out"
            )
        return "".join(plain + ("" if name is None else column_text(row, name)) for plain, name in self.parts)

    def example(self, row: Row) -> Pair:
        """The prompt of a row with what is learned after it.

        Raises:
            DataError: As `fill`; or the row has no column for the answer, or is a conversation.
        """
        prompt = self.fill(row)
        assert isinstance(row.value, dict)
        return Pair(prompt, column_text(row, completion_of(row)), row.where)


def completion_of(row: Row) -> str:
    """The column of a row that holds what is learned.

    Raises:
        DataError: There is none.
    """
    name = next((name for name in COMPLETIONS if name in row.value), "")
    if name:
        return name
    names = list(row.value) if isinstance(row.value, dict) else []
    if any(name in names for name in ("messages", "conversations", "conversation", "chosen")):
        raise DataError(
            "data.prompt_template acts on columns of text; this row is a conversation or a preference",
            where=row.where,
            fix="leave data.prompt_template out",
        )
    near = next((close for wanted in COMPLETIONS if (close := closest(wanted, names))), "")
    raise DataError(
        f"the row has no column with the answer; its columns are {', '.join(map(repr, names)) or 'none'}",
        where=row.where,
        fix=f"rename {near!r} to 'completion'" if near else f"name it one of: {', '.join(COMPLETIONS)}",
    )


def _refuse(what: str, fix: str, cause: Exception | None = None) -> NoReturn:
    """Say what is wrong with a template.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(f"data.prompt_template: {what}", where="data.prompt_template", fix=fix) from cause
