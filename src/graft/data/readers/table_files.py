"""CSV and TSV files: a header, then one row after another, read line by line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.data.readers.compressed import is_gzip, open_text
from graft.data.readers.rows import (
    MAX_ROW_BYTES,
    SHOWN_BYTES,
    Refuse,
    Row,
    find_no_text,
    no_text,
    too_long,
    unescaped,
)
from graft.errors import DataError


def read_table(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read a .csv or .tsv file.

    Lines inside quotes belong to their cell, with LF between them. After a row whose quotes are wrong the
    next line begins a new row.

    Args:
        path: The file; also packed.
        refuse: Receives rows that cannot be read.

    Yields:
        The rows, with the line in which each begins; a cell is a text.

    Raises:
        DataError: `refuse` raises it; or the header is wrong, the file is no text, or packed and damaged.
        StorageError: The file cannot be read.

    Cost: one row at a time, of at most MAX_ROW_BYTES.
    """
    name = path.with_suffix("") if is_gzip(path) else path
    with open_text(path) as file:
        lines = _Lines(file, path)
        rows = csv.reader(lines, delimiter="\t" if name.suffix.lower() == ".tsv" else ",", strict=True)
        names = _header(rows, lines)
        _check_header(names, path)
        width = len(names)
        while True:
            line = lines.number + 1
            lines.begin()
            try:
                cells = _next(rows, lines)
            except DataError as error:
                refuse(error, unescaped(lines.raw()))
                continue
            if cells is None:
                return
            if len(cells) == width:
                yield Row(dict(zip(names, cells, strict=True)), f"{path}:{line}")
            elif cells:
                refuse(_uneven(cells, names, f"{path}:{line}:1"), unescaped(lines.raw()))


class _Lines:
    """The lines of a file for the csv reader; it remembers those of the row that is being read.

    Attributes:
        number: Of the last line.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self.path = file, path
        self.number = 0
        self._row: list[str] = []
        self._length = 0
        self._bad: DataError | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line: str = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._row.append(line)
        self._length += len(line)
        if self._length > MAX_ROW_BYTES:
            while line and not line.endswith("\n"):
                line = self._file.readline(1 << 20)
            raise too_long(self.path, self.number)
        if self._bad is None and (found := find_no_text(line)):
            self._bad = no_text(found.group(), f"{self.path}:{self.number}:{found.start() + 1}")
        return line

    def begin(self) -> None:
        """A new row begins."""
        self._row.clear()
        self._length, self._bad = 0, None

    def check(self) -> None:
        """Refuse a row that has what is no text.

        Raises:
            DataError: It has; the line and the column are named.
        """
        if self._bad is not None:
            raise self._bad

    def raw(self) -> str:
        """The row that was read last as it stands in the file."""
        text = "".join(self._row)
        return text[:SHOWN_BYTES] + " ..." if self._length > MAX_ROW_BYTES else text.rstrip("\n")


def _header(rows: Any, lines: _Lines) -> list[str]:
    while (names := _next(rows, lines)) == []:
        lines.begin()  # an empty line before the header
    return names or []


def _next(rows: Any, lines: _Lines) -> list[str] | None:
    # The limit is one for the whole process: it is ours only while a row is read.
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    begin = lines.number + 1
    try:
        cells: list[str] | None = next(rows, None)
    except csv.Error as error:
        raise DataError(
            f"not a CSV file: {error}",
            where=f"{lines.path}:{lines.number}",
            fix=f"check the quotes of the row that begins in line {begin}",
        ) from error
    finally:
        csv.field_size_limit(limit)
    lines.check()
    return cells


def _uneven(cells: list[str], names: list[str], where: str) -> DataError:
    return DataError(
        f"the row has {len(cells)} cells, the header {len(names)}",
        where=where,
        fix="quote cells that hold the separator",
    )


def _check_header(names: list[str], path: Path) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(
            f"column {sorted(twice)[0]!r} is there twice", where=f"{path}:1", fix="rename one of them"
        )
