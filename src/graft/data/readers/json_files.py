"""JSON files: a list of rows, an object that holds one, or one row; read piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.data.readers.compressed import open_text
from graft.data.readers.json_lines import checked_row, read_json_lines
from graft.data.readers.json_window import SPACE, Window
from graft.data.readers.rows import MAX_ROW_BYTES, SHOWN_BYTES, Refuse, Row, kind_of, too_long
from graft.errors import DataError

_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)
"""Finds the end of a row that holds a number which is refused."""
_CONVERSATIONS = ("messages", "conversations")


def read_json(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read a .json file.

    A list of objects is a row each; so is the one list of objects in an object, unless it is called messages
    or conversations: then the object is one row. Objects after one another are JSON lines.

    Args:
        path: The file; also packed.
        refuse: Receives rows that cannot be read. What breaks the list itself is raised, as nothing tells
            where the next row begins.

    Yields:
        The rows, with the line in which each begins.

    Raises:
        DataError: `refuse` raises it; or the file is not JSON, no text, or packed and damaged.
        StorageError: The file cannot be read.

    Cost: rows of at most MAX_ROW_BYTES at a time, however long the list is.
    """
    with open_text(path) as file:
        window = Window(file, path)
        mark = window.peek()
        if mark == "[":
            window.position += 1
            yield from _list(window, refuse)
            if extra := window.peek():
                raise DataError(
                    f"{extra!r} after the end of the list of rows", where=window.place(), fix="remove it"
                )
            return
        if mark not in ("", "{"):
            raise DataError(
                "a JSON file must hold a list of rows",
                where=window.place(),
                fix='begin it with "[", or write one row per line into a .jsonl file',
            )
        if mark == "{" and not _several(window):
            yield from _object(window, refuse)
            return
    if mark:
        yield from read_json_lines(path, refuse)


def _list(window: Window, refuse: Refuse) -> Iterator[Row]:
    # From behind its "[" to behind its "]".
    expect_comma = False
    while mark := window.peek():
        if mark == "]":
            window.position += 1
            return
        if expect_comma:
            if mark != ",":
                raise DataError(
                    "a comma is missing between two rows", where=window.place(), fix='write "," there'
                )
            window.position += 1
            expect_comma = False
            continue
        row = _row(window, refuse)
        if row is not None:
            yield row
        expect_comma = True
    raise DataError("the list of rows is not closed", where=window.place(), fix='end it with "]"')


def _row(window: Window, refuse: Refuse) -> Row | None:
    # The row that begins here; the position is then behind it.
    try:
        value, end = window.value()
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        told = window.not_json(error)
        # Only where the row is whole but for a number is it known where the next one begins.
        end = -1 if isinstance(error, json.JSONDecodeError | RecursionError) else _end(window)
        if end < 0:
            raise told from error
        _refused(told, window, end, refuse)
        return None
    length = end - window.position
    source = window.text[window.position : end]
    where = f"{window.path}:{window.line()}"
    if type(value) is dict and "\\u" not in source and length <= MAX_ROW_BYTES:
        window.position = end
        return Row(value, where)
    try:
        if length > MAX_ROW_BYTES:
            raise too_long(window.path, window.line())
        row = checked_row(value, source, where, int(window.place().rpartition(":")[2]))
    except DataError as error:
        _refused(error, window, end, refuse)
        return None
    window.position = end
    return row


def _refused(error: DataError, window: Window, end: int, refuse: Refuse) -> None:
    source = window.text[window.position : end]
    window.position = end
    refuse(error, source[:SHOWN_BYTES] + " ..." if len(source) > MAX_ROW_BYTES else source)


def _end(window: Window) -> int:
    try:
        return _LENIENT.raw_decode(window.text, window.position)[1]
    except (ValueError, RecursionError):
        return -1


def _several(window: Window) -> bool:
    # Whether something follows the first object of a file, which is looked at up to the largest row.
    try:
        _, end = window.value()
    except DataError:
        raise
    except (ValueError, RecursionError):
        return False  # told by who reads the object
    if end == len(window.text) and not window.ended:
        window.more()
        return _several(window)
    found = SPACE.match(window.text, end)
    assert found is not None
    return found.end() < len(window.text)


def _object(window: Window, refuse: Refuse) -> Iterator[Row]:
    # The rows of a file that is one object.
    try:
        value, _ = window.value()
    except json.JSONDecodeError as error:
        if window.ended:
            raise window.not_json(error) from error
        value = {}  # larger than a row may be: a list of rows in it is read as it comes
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise window.not_json(error) from error
    lists = [name for name, rows in value.items() if isinstance(rows, list) and _is_row(rows)]
    _check_bare(value, lists, window)
    if value and (not lists or any(name in lists for name in _CONVERSATIONS)):
        row = _row(window, refuse)
        if row is not None:
            yield row
        return
    if len(lists) > 1:
        raise _two_lists(lists, window)
    yield from _members(window, refuse)


def _members(window: Window, refuse: Refuse) -> Iterator[Row]:
    # Walk through an object: the rows of the list in it; what else it has is passed over.
    lists: list[str] = []
    while window.peek() not in ("}", ""):
        window.position += 1  # "{" before the first, "," before any other
        window.peek()
        name = str(window.take())
        if window.peek() != ":":
            raise DataError('":" is missing after a name', where=window.place(), fix='write ":" there')
        window.position += 1
        if window.peek() == "[" and _first_in_list(window) == "{":
            lists.append(name)
            if len(lists) > 1:
                raise _two_lists(lists, window)
            yield from _list(window, refuse)
        else:
            window.take()
        if window.peek() not in (",", "}"):
            raise DataError("the object is not closed", where=window.place(), fix='write "," or "}" there')
    if not lists:
        raise too_long(window.path, 1)


def _first_in_list(window: Window) -> str:
    # The first character in a list; if a row begins there, the position is behind the "[", else before.
    while True:
        found = SPACE.match(window.text, window.position + 1)
        assert found is not None
        if found.end() < len(window.text) or window.ended:
            break
        if len(window.text) - window.position > MAX_ROW_BYTES:
            raise too_long(window.path, window.line())
        window.more()
    mark = window.text[found.end() : found.end() + 1]
    if mark == "{":
        window.position = found.end()
    return mark


def _check_bare(value: dict[str, Any], lists: list[str], window: Window) -> None:
    """Refuse an object of nothing but lists that hold no rows.

    Raises:
        DataError: It is one.
    """
    bare = [name for name, rows in value.items() if rows and isinstance(rows, list) and name not in lists]
    if bare and not lists and all(isinstance(rows, list) for rows in value.values()):
        raise DataError(
            f"the lists in this JSON object ({', '.join(bare)}) hold {kind_of(value[bare[0]][0])} where rows "
            "should be",
            where=f"{window.path}:1",
            fix='write a list of rows like {"prompt": "...", "completion": "..."}',
        )


def _two_lists(lists: list[str], window: Window) -> DataError:
    return DataError(
        f"a JSON file must hold one list of rows; this one has several: {', '.join(lists)}",
        where=f"{window.path}:1",
        fix="write each list into a file of its own",
    )


def _is_row(rows: list[Any]) -> bool:
    return bool(rows) and isinstance(rows[0], dict)
