"""JSON lines: one object a line, read in bounded memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from graft.data.readers.compressed import open_bytes
from graft.data.readers.rows import (
    MAX_ROW_BYTES,
    NO_TEXT,
    SHOWN_BYTES,
    Refuse,
    Row,
    bad_character,
    kind_of,
    not_utf8,
    shown,
    too_long,
)
from graft.errors import DataError

_ESCAPES = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a whole pair
    r"|\\u(?!0000|[dD][89a-fA-F])|\\[^u]"  # any other escape
    "|(\\\\u|[\0\ud800-\udfff])"  # NUL or half a pair
)
_ENDS = frozenset(("", "\n", "\r\n"))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
"""Refuses NaN and Infinity; of a key that is given twice the last value counts, as in Python."""


def read_json_lines(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read a .jsonl or .ndjson file.

    Args:
        path: The file; also packed.
        refuse: Receives rows that cannot be read.

    Yields:
        The rows.

    Raises:
        DataError: `refuse` raises it; or the file is no text, or its packed data is damaged.
        StorageError: The file cannot be read.

    Cost: one line at a time, of at most MAX_ROW_BYTES.
    """
    with open_bytes(path) as file:
        readline, place = file.readline, f"{path}:"
        scan: Any = DECODER.scan_once  # type: ignore[attr-defined]
        number = 0
        while raw := readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES and not _is_whole(raw):
                _skip_line(file)
                refuse(too_long(path, number), shown(raw[:SHOWN_BYTES]) + " ...")
                continue
            # Nearly every line is an object and a line end, and needs no more than this; the others are
            # looked at in detail. A raw NUL or half of a surrogate pair does not come through here.
            try:
                line = raw.decode()
                value, end = scan(line, 0)
            except (ValueError, RecursionError, StopIteration):
                value, end = None, 0
            if type(value) is dict and line[end:] in _ENDS and b"\\u" not in raw:
                yield Row(value, f"{place}{number}")
                continue
            try:
                row = _row(raw, path, number)
            except DataError as error:
                refuse(error, shown(raw).rstrip("\r\n"))
                continue
            if row is not None:
                yield row


def _is_whole(raw: bytes) -> bool:
    return raw.endswith(b"\n") and len(raw) == MAX_ROW_BYTES + 1


def _skip_line(file: io.BufferedReader) -> None:
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


def _row(raw: bytes, path: Path, number: int) -> Row | None:
    line = _decode(raw, path, number)
    if not line.strip():
        return None
    try:
        value = DECODER.decode(line.strip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise _not_json(error, path, number) from error
    return checked_row(value, line, f"{path}:{number}", 1)


def checked_row(value: Any, source: str, where: str, column: int) -> Row:
    """A row from what its JSON holds.

    Args:
        value: What was decoded.
        source: Its JSON.
        where: "file:line".
        column: In which it begins.

    Raises:
        DataError: It is no object, or one of its texts is no text.
    """
    if not isinstance(value, dict):
        raise DataError(
            f"a row must be an object with named columns, not {kind_of(value)}",
            where=f"{where}:{column}",
            fix='write rows like {"prompt": "...", "completion": "..."}',
        )
    if ("\\u" in source or NO_TEXT.search(source)) and (bad := bad_character(value)):
        raise DataError(
            f"the row holds {bad}, which is no text",
            where=f"{where}:{column + _escape_in(source)}",
            fix="remove it where the file is made",
        )
    return Row(value, where)


def _escape_in(source: str) -> int:
    """Where the first character that is no text stands, raw or as an escape."""
    return next((found.start() for found in _ESCAPES.finditer(source) if found.group(1)), 0)


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode()) + 1
        raise not_utf8(raw[error.start], f"{path}:{number}:{column}") from error


def _not_json(error: Exception, path: Path, line: int) -> DataError:
    fix = "correct the row, or set data.skip_invalid"
    if not isinstance(error, json.JSONDecodeError):
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return DataError(f"not JSON: {reason}", where=f"{path}:{line}:1", fix=fix)
    if line == 1 and error.doc.strip() in ("{", "["):
        fix = "write each row on one line, or name the file .json"
    elif error.msg == "Extra data" and "\r" in error.doc:
        fix = "the lines end in CR alone; let them end in LF"
    return DataError(f"not JSON: {error.msg}", where=f"{path}:{line}:{error.colno}", fix=fix)
