"""JSON files: a list of rows, an object that holds one, or one row; read piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.data.compressed import open_text
from graft.data.json_lines import DECODER, checked_row, read_json_lines
from graft.data.rows import MAX_ROW_BYTES, SHOWN_BYTES, Refuse, Row, kind_of, no_text, too_long
from graft.errors import DataError

_PIECE = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_BYTE = re.compile("[\udc80-\udcff]")
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
        window = _Window(file, path)
        mark = window.peek()
        if mark == "[":
            window.position += 1
            yield from _list(window, refuse)
            if extra := window.peek():
                raise DataError(f"{extra!r} after the end of the list of rows", where=window.place())
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


class _Window:
    """The part of a text that is being read.

    Attributes:
        text: What is in memory.
        position: What is read next, in `text`.
        ended: Whether `text` reaches to the end of the file.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self.path = file, path
        self.text, self.position, self.ended = "", 0, False
        self._line, self._counted, self._before = 1, 0, 0

    def more(self) -> None:
        """Read on: as much again as there is left, and at least a piece; forget what was read before."""
        self.line()
        self._before = self._column(self.position) - 1
        kept = self.text[self.position :]
        wanted = max(_PIECE, len(kept))
        new = self._file.read(wanted)
        self.ended = len(new) < wanted
        self.text, self.position, self._counted = kept + new, 0, 0
        if not new.isascii() and (bad := _BYTE.search(new)):
            raise no_text(bad.group(), self.place(len(kept) + bad.start()))

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.position)
            assert found is not None
            self.position = found.end()
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more()

    def line(self) -> int:
        """The line of the position."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def place(self, position: int | None = None) -> str:
        """A place, that of the position if none is given, as file:line:column."""
        position = self.position if position is None else position
        line = self.line() + self.text.count("\n", self.position, position)
        return f"{self.path}:{line}:{self._column(position)}"

    def _column(self, position: int) -> int:
        begin = self.text.rfind("\n", 0, position)
        return position - begin if begin >= 0 else self._before + position + 1

    def value(self) -> tuple[Any, int]:
        """The JSON value that begins here, and where it ends.

        Raises:
            ValueError: It is none, also when read on to the largest row; or it holds what is refused.
            RecursionError: It is nested too deeply.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError:
                if self.ended or len(self.text) - self.position > MAX_ROW_BYTES:
                    raise
            else:
                if end < len(self.text) or self.ended:
                    return value, end
            self.more()

    def take(self) -> Any:
        """The JSON value that begins here; the position is then behind it.

        Raises:
            DataError: It is none.
        """
        try:
            value, self.position = self.value()
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise self.not_json(error) from error
        return value

    def not_json(self, error: Exception) -> DataError:
        """The error of what `value` could not read."""
        fix = "correct the row"
        if isinstance(error, json.JSONDecodeError):
            cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 1
            if cut and not self.ended:
                return too_long(self.path, self.line())
            return DataError(f"not JSON: {error.msg}", where=self.place(error.pos), fix=fix)
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return DataError(f"not JSON: {reason}", where=self.place(), fix=fix)


def _list(window: _Window, refuse: Refuse) -> Iterator[Row]:
    """The rows of a list, from behind its "[" to behind its "]"."""
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


def _row(window: _Window, refuse: Refuse) -> Row | None:
    """The row that begins here; the position is then behind it."""
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
        return _refused(told, window, end, refuse)
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
        return _refused(error, window, end, refuse)
    window.position = end
    return row


def _refused(error: DataError, window: _Window, end: int, refuse: Refuse) -> None:
    source = window.text[window.position : end]
    window.position = end
    refuse(error, source[:SHOWN_BYTES] + " ..." if len(source) > MAX_ROW_BYTES else source)


def _end(window: _Window) -> int:
    try:
        return _LENIENT.raw_decode(window.text, window.position)[1]
    except (ValueError, RecursionError):
        return -1


def _several(window: _Window) -> bool:
    """Whether something follows the first object of a file, which is looked at up to the largest row."""
    try:
        _, end = window.value()
    except DataError:
        raise
    except (ValueError, RecursionError):
        return False  # told by who reads the object
    if end == len(window.text) and not window.ended:
        window.more()
        return _several(window)
    found = _SPACE.match(window.text, end)
    assert found is not None
    return found.end() < len(window.text)


def _object(window: _Window, refuse: Refuse) -> Iterator[Row]:
    """The rows of a file that is one object."""
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


def _members(window: _Window, refuse: Refuse) -> Iterator[Row]:
    """Walk through an object: the rows of the list in it; what else it has is passed over."""
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


def _first_in_list(window: _Window) -> str:
    """The first character in a list; if a row begins there, the position is behind the "[", else before."""
    while True:
        found = _SPACE.match(window.text, window.position + 1)
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


def _check_bare(value: dict[str, Any], lists: list[str], window: _Window) -> None:
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


def _two_lists(lists: list[str], window: _Window) -> DataError:
    return DataError(
        f"a JSON file must hold one list of rows; this one has several: {', '.join(lists)}",
        where=f"{window.path}:1",
        fix="write each list into a file of its own",
    )


def _is_row(rows: list[Any]) -> bool:
    return bool(rows) and isinstance(rows[0], dict)
