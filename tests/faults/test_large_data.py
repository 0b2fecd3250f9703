"""Rows and files that are too large: refused by line, or streamed, in bounded memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from graft.data.readers.rows import MAX_ROW_BYTES, SHOWN_BYTES
from graft.data.readers.text_files import DOCUMENT_CHARACTERS
from graft.data.sources import read_rows
from graft.errors import DataError

MB = 1 << 20
FEW_ROWS = 4 * MB
"""Peak memory of reading small rows, however many: some buffers, and what they are decoded into."""
ONE_ROW = 8 * MAX_ROW_BYTES
"""Peak memory where a row is too long: it is read up to the limit, then joined, decoded or searched; the csv
reader keeps four bytes a character."""
LONG = 100 * MB


@contextmanager
def peak_below(num_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


def opened(path: Path) -> Any:
    return gzip.GzipFile(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb")


def write_repeated(file: Any, piece: bytes, num_bytes: int) -> None:
    many = piece * max(1, MB // len(piece))
    for _ in range(num_bytes // len(many)):
        file.write(many)


def long_row(path: Path, before: bytes, begin: bytes, piece: bytes, end: bytes, after: bytes) -> None:
    with opened(path) as file:
        file.write(before + begin)
        write_repeated(file, piece, LONG)
        file.write(end + after)


ROW = b'{"text": "a"}'
LONG_ROWS = [
    ("line.jsonl", ROW + b"\n", b'{"text": "', b"x", b'"}\n', b'{"text": "b"}\n', 2, True),
    ("line.jsonl.gz", ROW + b"\n", b'{"text": "', b"x", b'"}\n', b'{"text": "b"}\n', 2, True),
    ("zeros.jsonl.gz", ROW + b"\n", b"", b"\0", b"\n", b'{"text": "b"}\n', 2, True),
    ("cell.csv", b"text\na\n", b'"', b"x", b'"\n', b"b\n", 3, True),
    ("lines.csv", b"text\na\n", b'"', b"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n", b'"\n', b"", 3, False),
    ("row.json", b"[" + ROW + b",\n", b'{"text": "', b"x", b'"},', b'{"text": "b"}]', 2, False),
    ("spaces.json", b"[" + ROW + b",\n", b'{"text":', b" ", b'"a"},', b'{"text": "b"}]', 2, False),
    ("object.json", b"", b'{"text": "', b"x", b'"}', b"", 1, False),
]


@pytest.mark.parametrize("case", LONG_ROWS, ids=lambda case: case[0])
def test_a_row_of_100_mb_is_refused_by_its_line(case: tuple[Any, ...], tmp_path: Path) -> None:
    name, *parts, line, _ = case
    path = tmp_path / name
    long_row(path, *parts)
    with peak_below(ONE_ROW), pytest.raises(DataError, match="longer than 33,554,432 bytes") as caught:
        list(read_rows(path))
    assert caught.value.where.startswith(f"{path}:")
    if name != "lines.csv":
        assert caught.value.where == f"{path}:{line}"


@pytest.mark.parametrize("case", [case for case in LONG_ROWS if case[-1]], ids=lambda case: case[0])
def test_a_row_of_100_mb_is_passed_over_and_the_next_one_is_read(
    case: tuple[Any, ...], tmp_path: Path
) -> None:
    name, *parts, line, _ = case
    path = tmp_path / name
    long_row(path, *parts)
    refused: list[tuple[str, str]] = []
    with peak_below(ONE_ROW):
        rows = list(read_rows(path, on_invalid=lambda error, raw: refused.append((error.where, raw))))
    assert [row.value for row in rows] == [{"text": "a"}, {"text": "b"}]
    assert [row.where for row in rows] == [f"{path}:{line - 1}", f"{path}:{line + 1}"]
    assert [where for where, _ in refused] == [f"{path}:{line}"]
    assert len(refused[0][1]) <= SHOWN_BYTES + 4


def test_a_row_of_nearly_the_limit_is_read(tmp_path: Path) -> None:
    text = "x" * (MAX_ROW_BYTES - len(ROW) + 1)
    line = json.dumps({"text": text}).encode()
    assert len(line) == MAX_ROW_BYTES
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n" + ROW)
    assert [len(row.value["text"]) for row in read_rows(path)] == [len(text), 1]  # type: ignore[index]
    path.write_bytes(line.replace(b"x", b"xx", 1) + b"\n" + ROW)
    with pytest.raises(DataError, match="longer than"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "begin", "piece", "end"),
    [
        ("rows.jsonl", b"", b'{"prompt": "question", "completion": "' + b"answer" * 200 + b'"}\n', b""),
        ("rows.jsonl.gz", b"", b'{"prompt": "question", "completion": "' + b"answer" * 200 + b'"}\n', b""),
        (
            "rows.json",
            b"[",
            b'{"prompt": "question", "completion": "' + b"answer" * 200 + b'"},\n',
            b'{"prompt": ""}]',
        ),
        (
            "one-line.json",
            b"[",
            b'{"prompt": "question", "completion": "' + b"answer" * 200 + b'"},',
            b'{"prompt": ""}]',
        ),
        (
            "rows.json.gz",
            b"[",
            b'{"prompt": "question", "completion": "' + b"answer" * 200 + b'"},',
            b'{"prompt": ""}]',
        ),
        ("rows.csv", b"prompt,completion\n", b"question," + b"answer" * 200 + b"\n", b""),
    ],
)
def test_many_rows_are_read_in_the_memory_of_a_few(
    name: str, begin: bytes, piece: bytes, end: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    with opened(path) as file:
        file.write(begin)
        write_repeated(file, piece, 8 * MB)
        file.write(end)
    expected = (8 * MB // ((MB // len(piece)) * len(piece))) * (MB // len(piece)) + bool(end)
    with peak_below(FEW_ROWS):
        assert sum(1 for _ in read_rows(path)) == expected


def test_an_object_larger_than_a_row_is_walked_through_for_its_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with open(path, "wb") as file:
        file.write(b'{"about": {"of": [1, 2]}, "tags": [ "x" ],\n"rows": [\n')
        write_repeated(file, b'{"text": "' + b"x" * 4000 + b'"},\n', MAX_ROW_BYTES + 4 * MB)
        file.write(b'{"text": "last"}], "end": 1}')
    with peak_below(ONE_ROW):
        rows = [(len(row.value["text"]), row.where) for row in read_rows(path)]  # type: ignore[index]
    assert rows[0] == (4000, f"{path}:3")
    assert rows[-1] == (4, f"{path}:{len(rows) + 2}")
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b', "more": [{"text": "b"}]}')
    with pytest.raises(DataError, match="several: rows, more"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "piece"),
    [("spaces.jsonl.gz", b" " * 99 + b"\n"), ("spaces.json.gz", b" "), ("spaces.csv.gz", b"\r\n")],
)
def test_a_bomb_of_spaces_is_read_to_its_end_in_little_memory(
    name: str, piece: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as file:
        write_repeated(file, piece, 8 * MB if "json" in name else MB)
        file.write(b"[]" if "json." in name else b"\n")
    with peak_below(FEW_ROWS):
        assert list(read_rows(path)) == []


def test_a_very_long_text_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.data.readers.text_files.DOCUMENT_CHARACTERS", 10)
    path = tmp_path / "text.txt"
    path.write_text("0123456789")
    assert [row.value for row in read_rows(path)] == ["0123456789"]
    path.write_text("one\ntwo\nthree\n" + "x" * 23 + "\nend\0")
    found: list[str] = []
    rows = list(read_rows(path, on_invalid=lambda error, _: found.append(error.where)))
    assert [row.value for row in rows] == ["one\ntwo\n", "three\n", "x" * 10, "x" * 10]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (1, 3, 4, 4)]
    assert found == [f"{path}:5:4"]
    path.write_text("x" * 25 + "\0")
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}:1:26"
    assert DOCUMENT_CHARACTERS == 64 * MB
