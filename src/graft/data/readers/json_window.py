"""A JSON text that is read piece by piece: the part in memory, the position, values, places."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from graft.data.readers.json_lines import DECODER
from graft.data.readers.rows import MAX_ROW_BYTES, no_text, too_long
from graft.errors import DataError

SPACE = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 18
_BYTE = re.compile("[\udc80-\udcff]")


class Window:
    """The part of a text that is being read.

    Args:
        file: The text, decoded with surrogateescape.
        path: What errors call it.

    Attributes:
        text: What is in memory.
        position: What is read next, in `text`.
        ended: Whether `text` reaches to the end of the file.
    """

    def __init__(self, file: io.TextIOBase, path: Path) -> None:
        self._file, self.path = file, path
        self.text, self.position, self.ended = "", 0, False
        self._line, self._counted, self._before = 1, 0, 0

    def more(self) -> None:
        """Read on: as much again as there is left, and at least a piece; forget what was read before.

        Raises:
            DataError: What comes is no UTF-8.
        """
        self.line()
        self._before = self._column(self.position) - 1
        kept = self.text[self.position :]
        wanted = max(_PIECE, len(kept))
        new = self._file.read(wanted)
        self.ended = len(new) < wanted
        self.text, self.position, self._counted = kept + new, 0, 0
        if not new.isascii() and (bad := _BYTE.search(new)):
            error = no_text(bad.group(), self.place(len(kept) + bad.start()))
            raise error

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = SPACE.match(self.text, self.position)
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
            JSONDecodeError: It is none, also when read on to the largest row.
            ValueError: It holds a number that is refused.
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
