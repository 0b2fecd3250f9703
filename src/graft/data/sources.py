"""Files to rows: JSON lines, JSON, CSV, TSV and plain text, each row with the place it came from."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from graft.errors import DataError, StorageError

MAX_ROW_BYTES = 32 << 20
"""Longest line of a JSON lines file."""
MAX_FILE_BYTES = 1 << 30
"""Largest file of the kinds that are read whole (JSON, CSV, text)."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
SPLIT_NAMES = {"train": ("train",), "eval": ("eval", "valid", "validation", "val", "dev", "test")}

_ESCAPE = re.compile(r"\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})")

Refuse = Callable[[DataError], None]


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file.

    Attributes:
        value: The columns by name, or the whole document of a text file.
        where: "file:line".
    """

    value: dict[str, Any] | str
    where: str


def read_rows(path: str | Path, *, split: str = "train", on_invalid: Refuse | None = None) -> Iterator[Row]:
    """Read the rows of a file, or of the files of a directory, in their order.

    A byte order mark, CRLF line ends and a missing last newline make no difference to the rows.

    Args:
        path: A .jsonl, .ndjson, .json, .csv, .tsv or .txt file, or a directory that has one named after
            the split, or only .txt files.
        split: "train" or "eval"; decides the file taken from a directory.
        on_invalid: Receives the error of a row that cannot be read, which is then left out; without it
            the first such row raises.

    Yields:
        The rows.

    Raises:
        DataError: A row is malformed (the place is file:line:column), or the kind of file is unknown.
        StorageError: The file is missing or cannot be read.
    """
    for file in find_files(Path(path), split):
        yield from _READERS[file.suffix.lower()](file, on_invalid or _raise)


def find_files(path: Path, split: str) -> list[Path]:
    """The files that hold a split.

    Raises:
        DataError: The kind of file is unknown, or a directory has no file of that split.
        StorageError: The path does not exist.
    """
    if not path.exists():
        raise StorageError(
            "no such file", where=str(path), fix="check the path; it is relative to where you are"
        )
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            raise DataError(
                f"files of kind {path.suffix!r} are not read",
                where=str(path),
                fix=f"convert it to one of: {', '.join(SUFFIXES)}",
            )
        return [path]
    named = [path / (name + suffix) for name in SPLIT_NAMES[split] for suffix in SUFFIXES]
    found = [file for file in named if file.is_file()]
    if found:
        return found[:1]
    texts = sorted(path.glob("*.txt"))
    if not texts or split != "train":
        raise DataError(
            f"the directory has no {split} file",
            where=str(path),
            fix=f"name one of its files, or call it {SPLIT_NAMES[split][0]}.jsonl",
        )
    return texts


def source_files(path: str, split: str) -> list[Path]:
    """The files whose bytes are all that a source says; none for what is no file."""
    return find_files(Path(path), split)


def source_bytes(path: str, split: str) -> int:
    """Bytes of the files of a source, about as many as its rows have; 0 where they do not tell."""
    return sum(file.stat().st_size for file in source_files(path, split))


def _raise(error: DataError) -> NoReturn:
    raise error


def _read_json_lines(path: Path, refuse: Refuse) -> Iterator[Row]:
    with _open(path) as file:
        number = 0
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                raise DataError(
                    f"a line is longer than {MAX_ROW_BYTES:,} bytes",
                    where=f"{path}:{number}",
                    fix="a row is one line; split the text into several rows",
                )
            try:
                row = _json_row(_decode(raw, path, number), path, number)
            except DataError as error:
                refuse(error)
                continue
            if row is not None:
                yield row


def _json_row(line: str, path: Path, number: int) -> Row | None:
    if not line.strip():
        return None
    try:
        value = _DECODER.decode(line.strip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise _json_error(error, path, number) from error
    return _checked(value, line, path, number)


def _checked(value: Any, source: str, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"a row must be an object with named columns, not {_kind(value)}",
            where=f"{path}:{number}:1",
            fix='write rows like {"prompt": "...", "completion": "..."}',
        )
    escape = _ESCAPE.search(source)
    if escape and (bad := _bad_character(value)):
        raise DataError(
            f"the row holds {bad}, which is no text",
            where=f"{path}:{number}:{_column(source, escape.start())}",
            fix="remove it where the file is made",
        )
    return Row(value, f"{path}:{number}")


def _read_json(path: Path, refuse: Refuse) -> Iterator[Row]:
    text = _read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        yield from _read_json_object(text, path, refuse)
        return
    if text[start : start + 1] not in ("[", ""):
        raise DataError(
            "a JSON file must hold a list of rows",
            where=_place(text, start, path),
            fix='begin it with "[", or write one row per line into a .jsonl file',
        )
    yield from _json_array(text, start + 1, path, refuse)


def _json_array(text: str, position: int, path: Path, refuse: Refuse) -> Iterator[Row]:
    line, seen, expect_comma = 1, 0, False
    while position < len(text):
        position = _skip_space(text, position)
        line += text.count("\n", seen, position)
        seen = position
        mark = text[position : position + 1]
        if mark == "]":
            return
        if expect_comma:
            if mark != ",":
                raise DataError("a comma is missing between two rows", where=_place(text, position, path))
            position, expect_comma = position + 1, False
            continue
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _json_error(error, path, line) from error
        try:
            yield _checked(value, text[position:end], path, line)
        except DataError as error:
            refuse(error)
        position, expect_comma = end, True
    if text.strip():
        raise DataError(
            "the list of rows is not closed", where=_place(text, len(text), path), fix='end it with "]"'
        )


def _read_json_object(text: str, path: Path, refuse: Refuse) -> Iterator[Row]:
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, 0))
    except (ValueError, RecursionError) as error:
        raise _json_error(error, path, 1) from error
    lists = [
        name for name, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    ]
    if text[end:].strip():
        yield from _read_json_lines(path, refuse)
        return
    bare = [name for name, rows in value.items() if isinstance(rows, list) and rows and name not in lists]
    if bare and not lists and all(isinstance(rows, list) for rows in value.values()):
        raise DataError(
            f"the lists in this JSON object ({', '.join(bare)}) hold {_kind(value[bare[0]][0])} where rows "
            "should be",
            where=f"{path}:1",
            fix='write a list of rows like {"prompt": "...", "completion": "..."}',
        )
    if not lists or "messages" in lists or "conversations" in lists:
        yield _checked(value, text, path, 1)
        return
    if len(lists) > 1:
        raise DataError(
            f"a JSON file must hold one list of rows; this one has several: {', '.join(lists)}",
            where=f"{path}:1",
            fix="write each list into a file of its own",
        )
    for index, row in enumerate(value[lists[0]]):
        try:
            checked = _checked(row, text if index == 0 else "", path, 1)
        except DataError as error:
            refuse(error)
            continue
        yield Row(checked.value, f"{path}:{lists[0]}[{index}]")


def _read_csv(path: Path, refuse: Refuse) -> Iterator[Row]:
    text = _read_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(rows, [])
        _check_header(names, path)
        line = rows.line_num + 1
        for cells in rows:
            if len(cells) == len(names):
                yield Row(dict(zip(names, cells, strict=True)), f"{path}:{line}")
            elif cells:
                fix = "quote cells that hold the separator"
                problem = f"the row has {len(cells)} cells, the header {len(names)}"
                refuse(DataError(problem, where=f"{path}:{line}:1", fix=fix))
            line = rows.line_num + 1
    except csv.Error as error:
        where = f"{path}:{rows.line_num}"
        raise DataError(
            f"not a CSV file: {error}", where=where, fix="check the quotes of that row"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_header(names: list[str], path: Path) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(
            f"column {sorted(twice)[0]!r} is there twice", where=f"{path}:1", fix="rename one of them"
        )


def _read_document(path: Path, refuse: Refuse) -> Iterator[Row]:
    text = _read_text(path)
    if text.strip():
        yield Row(text, f"{path}:1")


def _open(path: Path) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise StorageError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error


def _read_text(path: Path) -> str:
    with _open(path) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise DataError(
            f"the file is larger than {MAX_FILE_BYTES:,} bytes",
            where=str(path),
            fix="write it as .jsonl, which is read line by line",
        )
    text = _decode(data, path, 1).replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise DataError(
            "the file holds a NUL character, which is no text",
            where=_place(text, text.index("\0"), path),
            fix="remove it; a file full of them is not UTF-8 text",
        )
    return text


def _decode(data: bytes, path: Path, line: int) -> str:
    if line == 1 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("the file is UTF-16", where=f"{path}:1:1", fix="save it as UTF-8")
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        place = _place(before, len(before), path, line)
        raise DataError(
            f"byte 0x{data[error.start]:02x} is not UTF-8", where=place, fix="save the file as UTF-8"
        ) from error


def _json_error(error: Exception, path: Path, line: int) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        row = line if path.suffix.lower() != ".json" else error.lineno
        spread = line == 1 and error.doc.strip() in ("{", "[")
        return DataError(
            f"not JSON: {error.msg}",
            where=f"{path}:{row}:{error.colno}",
            fix="write each row on one line, or name the file .json"
            if spread
            else "correct the row, or set data.skip_invalid",
        )
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return DataError(
        f"not JSON: {reason}", where=f"{path}:{line}:1", fix="correct the row, or set data.skip_invalid"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _place(text: str, position: int, path: Path, line: int = 1) -> str:
    return f"{path}:{line + text.count(chr(10), 0, position)}:{_column(text, position)}"


def _column(text: str, position: int) -> int:
    return position - text.rfind("\n", 0, position)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")


def _bad_character(value: Any) -> str:
    if isinstance(value, str):
        if "\0" in value:
            return "a NUL character"
        return "half of a surrogate pair" if any("\ud800" <= char <= "\udfff" for char in value) else ""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((bad for part in parts if (bad := _bad_character(part))), "")


_READERS: dict[str, Callable[[Path, Refuse], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_document,
}
