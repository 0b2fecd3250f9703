"""A row and its place; what every reader of files refuses in the same words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from graft.errors import DataError

MAX_ROW_BYTES = 32 << 20
"""Longest row: a line of JSON lines, a row of a list in a JSON file or of a table."""

SHOWN_BYTES = 64 << 10
"""What is kept of a row that is longer than that, to show it."""

NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that are no text: NUL, and halves of surrogate pairs, which also stand for bytes that are not
UTF-8 where a file was decoded with surrogateescape."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file.

    Attributes:
        value: The columns by name, or the whole document of a text file.
        where: "file:line", in files of columns (parquet, arrow) "file:row"; "row 17" of rows from Python.
    """

    value: dict[str, Any] | str
    where: str


Refuse = Callable[[DataError, str], None]
"""Receives the error of a row that cannot be read, and the row's text with undecodable bytes escaped."""


def stop(error: DataError, raw: str) -> NoReturn:
    """Refuse a row by raising its error.

    Raises:
        DataError: Always.
    """
    raise error


def shown(raw: bytes) -> str:
    """Bytes as text, those that are not UTF-8 written as escapes."""
    return raw.decode("utf-8", "backslashreplace")


def unescaped(text: str) -> str:
    """A text that was decoded with surrogateescape, as `shown` writes it."""
    return shown(text.encode("utf-8", "surrogateescape"))


def find_no_text(text: str) -> re.Match[str] | None:
    """The first character of a text that is none; ASCII, the usual case, is not searched letter by letter."""
    return None if text.isascii() and "\0" not in text else NO_TEXT.search(text)


def check_text(value: Any, where: str) -> None:
    """Refuse a row in which a text, however deep, holds what is no text.

    Raises:
        DataError: It does; the column is named.
    """
    for name, part in value.items() if isinstance(value, Mapping) else [("", value)]:
        if bad := bad_character(part):
            raise DataError(
                f"column {name!r} holds {bad}, which is no text" if name else f"the text holds {bad}",
                where=where,
                fix="remove it where the rows are made",
            )


def bad_character(value: Any) -> str:
    """What a value holds that is no text, in words; "" where there is nothing of that kind."""
    if isinstance(value, str):
        found = find_no_text(value)
        if found is None:
            return ""
        return "a NUL character" if found.group() == "\0" else "half of a surrogate pair"
    if isinstance(value, dict):
        parts: Any = (*value, *value.values())
    else:
        parts = value if isinstance(value, list | tuple) else ()
    return next((bad for part in parts if (bad := bad_character(part))), "")


def not_utf8(byte: int, where: str) -> DataError:
    """The error of a byte that is not UTF-8."""
    return DataError(f"byte 0x{byte:02x} is not UTF-8", where=where, fix="save the file as UTF-8")


def no_text(character: str, where: str) -> DataError:
    """The error of a character that `NO_TEXT` found in a text decoded with surrogateescape."""
    if character != "\0":
        return not_utf8(ord(character) - 0xDC00, where)
    return DataError(
        "a NUL character, which is no text",
        where=where,
        fix="remove it; a file full of them is not UTF-8 text",
    )


def too_long(path: Path, line: int) -> DataError:
    """The error of a row that is longer than is read."""
    return DataError(
        f"a row is longer than {MAX_ROW_BYTES:,} bytes",
        where=f"{path}:{line}",
        fix="split the text into several rows",
    )


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
