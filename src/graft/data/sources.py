"""The one door to rows: files of every kind, directories, data sets of the hub, rows from Python."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from graft.data.columns import renamed, row_text
from graft.data.readers.arrow_files import read_arrow, read_parquet, saved_files
from graft.data.readers.compressed import is_gzip
from graft.data.readers.hub import is_hub, read_hub
from graft.data.readers.json_files import read_json
from graft.data.readers.json_lines import read_json_lines
from graft.data.readers.rows import MAX_ROW_BYTES, Refuse, Row, check_text, kind_of, stop
from graft.data.readers.table_files import read_table
from graft.data.readers.text_files import read_document
from graft.errors import DataError, StorageError

__all__ = ["IN_MEMORY", "MAX_ROW_BYTES", "Refuse", "Row", "Source", "find_files", "name_of", "read_rows"]

Source = str | os.PathLike[str] | Iterable[dict[str, Any] | str]
"""A path, the name of a data set on the hub ("hub:owner/name"), or rows from Python."""

IN_MEMORY = "memory:rows"
"""Stands in a configuration for rows from Python."""

SPLIT_NAMES = {"train": ("train",), "eval": ("eval", "valid", "validation", "val", "dev", "test")}

_PACKED = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*_PACKED, *(suffix + ".gz" for suffix in _PACKED), ".parquet", ".arrow", ".feather")
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")


def read_rows(
    source: Source,
    *,
    split: str = "train",
    on_invalid: Refuse | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Read the rows of a file, of the files of a directory, of a data set on the hub, or from Python.

    A byte order mark, CRLF line ends, a missing last newline and being packed with gzip make no difference to
    the rows. Nothing is held but the row that is read (of parquet and arrow files, a thousand).

    Args:
        source: A file (`SUFFIXES`), a directory that has one named after the split (see `find_files`),
            "hub:owner/name", or any iterable of dicts or texts.
        split: "train" or "eval"; decides the file taken from a directory.
        on_invalid: Receives the error and the text of a row that cannot be read, which is then left out;
            without it the first such row raises.
        columns: The file's column for each part ("prompt" -> "question").

    Yields:
        The rows in their order.

    Raises:
        DataError: A row is malformed (the place is file:line:column), or the file as a whole is.
        StorageError: The file is missing or cannot be read.
    """
    refuse = on_invalid or stop
    rows = _rows(source, split, refuse)
    return renamed(rows, columns, name_of(source), refuse) if columns else rows


def source_files(source: Source, split: str) -> list[Path]:
    """The files whose bytes are all that a source says; none for what is in no file."""
    if not isinstance(source, str | os.PathLike):
        return []
    path = os.fspath(source)
    return [] if path == IN_MEMORY or is_hub(path) else find_files(Path(path), split)


def source_bytes(source: Source, split: str) -> int:
    """Bytes of the files of a source, about as many as its rows have; 0 where they do not tell."""
    found = source_files(source, split)
    packed = any(is_gzip(file) or _kind(file) == ".parquet" for file in found)
    return 0 if packed else sum(file.stat().st_size for file in found)


def name_of(source: Source) -> str:
    """What errors and reports call a source."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "rows from Python"


def _rows(source: Source, split: str, refuse: Refuse) -> Iterator[Row]:
    if not isinstance(source, str | os.PathLike):
        yield from _from_python(source, refuse)
        return
    path = os.fspath(source)
    if path == IN_MEMORY:
        raise DataError(
            "the rows were given from Python and stand in no file",
            where="data",
            fix="give them again with graft.train, or write them into a .jsonl file first",
        )
    if is_hub(path):
        yield from read_hub(path, SPLIT_NAMES[split], refuse)
        return
    for file in find_files(Path(path), split):
        yield from _READERS[_kind(file)](file, refuse)


def _from_python(rows: Iterable[Any], refuse: Refuse) -> Iterator[Row]:
    # Both give the names of their columns (or splits) when they are gone through, which would be learned.
    if isinstance(rows, Mapping) or hasattr(rows, "iterrows"):
        table = hasattr(rows, "iterrows")
        raise DataError(
            f"{type(rows).__name__} gives names, not rows",
            where="data",
            fix='data.to_dict("records")'
            if table
            else "give a list of rows; of a data set with splits one split",
        )
    for number, value in enumerate(rows, 1):
        where = f"row {number}"
        try:
            named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
            if not named and not isinstance(value, str):
                raise DataError(
                    f"a row must be a dict with named columns, not {kind_of(value)} ({value!r:.60})",
                    where=where,
                    fix='{"prompt": "...", "completion": "..."}',
                )
            check_text(value, where)
        except DataError as error:
            refuse(error, row_text(value))
            continue
        yield Row(value, where)


def find_files(path: Path, split: str) -> list[Path]:
    """The files that hold a split, in their order.

    Args:
        path: A file, or a directory with files train.KIND, shards train-00000-of-00003.KIND (there, or in a
            directory data/ in it), only .txt files, or with what `datasets` saved.
        split: "train", or "eval", which the first of eval, valid, validation, val, dev and test is.

    Raises:
        DataError: The kind of file is unknown; a directory has no file of that split, or several; a shard is
            missing.
        StorageError: The path does not exist.
    """
    if not path.exists():
        link = path.is_symlink()
        raise StorageError(
            "a link that leads nowhere" if link else "no such file",
            where=str(path),
            fix="check the path; it is relative to where you are",
        )
    if not path.is_dir():
        if _kind(path) not in _READERS:
            raise DataError(
                f"files of kind {path.suffix!r} are not read",
                where=str(path),
                fix=f"convert it to one of: {', '.join(SUFFIXES)}",
            )
        return [path]
    if (path / "state.json").is_file():
        return saved_files(path)
    for directory in (path, path / "data"):
        for name in SPLIT_NAMES[split]:
            if found := _named(directory, name):
                return found
    texts = sorted(path.glob("*.txt"))
    if not texts or split != "train":
        known = sorted(child.name for child in path.iterdir() if _kind(child) in _READERS)[:20]
        raise DataError(
            f"the directory has no {split} file",
            where=str(path),
            fix=f"name one of its files, or call it {SPLIT_NAMES[split][0]}.jsonl"
            + (f"; there are {', '.join(known)}" if known else ""),
        )
    return texts


def _named(directory: Path, name: str) -> list[Path]:
    """The file or the shards of this name in a directory.

    Raises:
        DataError: Several files have the name, or a shard is missing.
    """
    if not directory.is_dir():
        return []
    if (directory / name / "state.json").is_file():
        return saved_files(directory / name)
    whole = [file for suffix in SUFFIXES if (file := directory / (name + suffix)).is_file()]
    shards: dict[tuple[str, int], dict[int, Path]] = {}
    for file in sorted(directory.glob(f"{name}-*")):
        kind = _kind(file)
        found = _SHARD.match(file.name.removesuffix(kind))
        if kind in _READERS and found and found["name"] == name:
            shards.setdefault((kind, int(found["count"])), {})[int(found["number"])] = file
    several = [file.name for file in whole] + [next(iter(parts.values())).name for parts in shards.values()]
    if len(several) > 1:
        raise DataError(
            f"the directory has several {name} files: {', '.join(several)}",
            where=str(directory),
            fix="name the one to read, or remove the others",
        )
    for (kind, count), parts in shards.items():
        missing = next((number for number in range(count) if number not in parts), None)
        if missing is not None:
            raise DataError(
                f"{name}-{missing:05}-of-{count:05}{kind} is missing",
                where=str(directory),
                fix="fetch or write all shards",
            )
        return [parts[number] for number in sorted(parts)]
    return whole


def _kind(path: Path) -> str:
    """The end of a file's name that tells how it is read, ".jsonl" or ".jsonl.gz"."""
    suffixes = path.suffixes
    return "".join(suffixes[-2:] if is_gzip(path) else suffixes[-1:]).lower()


_PLAIN: dict[str, Callable[[Path, Refuse], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".txt": read_document,
}
_READERS = {
    **_PLAIN,
    **{suffix + ".gz": reader for suffix, reader in _PLAIN.items()},
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
