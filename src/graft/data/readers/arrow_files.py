"""Files of columns: parquet, arrow (feather), and the directories that `datasets` saves; needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from graft.data.readers.compressed import open_ordinary
from graft.data.readers.rows import Refuse, Row, check_text
from graft.errors import DataError, StorageError
from graft.files import read_json

BATCH_ROWS = 1024
"""Rows that are made into Python objects at a time."""


def read_parquet(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read a .parquet file.

    Texts, numbers, lists and objects are what they are in JSON; dates, times and decimal numbers become
    texts; binary columns stay bytes, which no text column may be.

    Args:
        path: The file.
        refuse: Receives rows that cannot be read.

    Yields:
        The rows, with "file:row" counted from 1.

    Raises:
        DataError: `refuse` raises it; or the file is damaged, or pyarrow is not installed.
        StorageError: The file cannot be read.

    Cost: a row group as it is stored, and BATCH_ROWS rows.
    """
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    with _reading(path, pyarrow), parquet.ParquetFile(path, pre_buffer=False) as file:
        _check_names(file.schema_arrow.names, path)
        yield from _rows(file.iter_batches(BATCH_ROWS, use_threads=False), path, refuse)


def read_arrow(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read an .arrow or .feather file: the file format of arrow, or its stream format.

    Args:
        path: The file.
        refuse: Receives rows that cannot be read.

    Yields:
        The rows, as `read_parquet`.

    Raises:
        DataError: As `read_parquet`.
        StorageError: The file cannot be read.

    Cost: a batch as it is stored (files are mapped into memory), and BATCH_ROWS rows.
    """
    pyarrow = _pyarrow(path)
    from pyarrow import ipc

    with _reading(path, pyarrow), pyarrow.memory_map(str(path)) as file:
        begin = file.read(6)
        file.seek(0)
        if begin.startswith(b"FEA1"):
            raise DataError("feather of version 1", where=str(path), fix="write it as version 2, or parquet")
        if begin == b"ARROW1":
            reader = ipc.open_file(file)
            batches: Any = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = reader = ipc.open_stream(file)
        _check_names(reader.schema.names, path)
        yield from _rows(batches, path, refuse)


def saved_files(path: Path) -> list[Path]:
    """The files of a directory that `Dataset.save_to_disk` wrote, in their order.

    Raises:
        DataError: One is missing, or the list of them is malformed.
        StorageError: The list cannot be read.
    """
    state = path / "state.json"
    listed = read_json(state)
    parts = listed.get("_data_files") if isinstance(listed, dict) else None
    try:
        files = [path / Path(part["filename"]).name for part in parts or ()]
    except (TypeError, KeyError) as error:
        raise DataError(
            "the list of data files is malformed", where=str(state), fix="save the data set again"
        ) from error
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        what = f"{missing.name} is missing" if missing else "no data file is listed"
        raise DataError(what, where=str(state), fix="copy or save the data set again")
    return files


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"reading {path.suffix} needs pyarrow, which is not installed",
            where=str(path),
            fix="pip install 'graft[arrow]'",
        ) from error
    return pyarrow


@contextmanager
def _reading(path: Path, pyarrow: Any) -> Iterator[None]:
    # Tells errors of pyarrow as errors of the file.
    try:
        with open(path, "rb", opener=open_ordinary):  # pyarrow would wait for a pipe
            pass
        yield
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        if error.errno is None:  # how pyarrow tells of data that is cut off
            raise _damaged(path, error) from error
        raise StorageError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error


def _damaged(path: Path, error: Exception) -> DataError:
    kind = "parquet" if path.suffix.lower() == ".parquet" else "arrow"
    told = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return DataError(f"not a sound {kind} file: {told}", where=str(path), fix="fetch or write it again")


def _check_names(names: list[str], path: Path) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"column {twice!r} is there twice", where=str(path), fix="rename one of them")


def _rows(batches: Any, path: Path, refuse: Refuse) -> Iterator[Row]:
    number = 0
    for whole in batches:
        for begin in range(0, whole.num_rows, BATCH_ROWS):
            batch = whole.slice(begin, BATCH_ROWS)
            for value in _values(batch):
                number += 1
                where = f"{path}:{number}"
                try:
                    if not isinstance(value, dict):
                        raise DataError(
                            f"the row is damaged: {value}", where=where, fix="write the file again"
                        )
                    check_text(value, where)
                except DataError as error:
                    refuse(error, repr(value))
                    continue
                yield Row(value, where)


def _values(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a batch; in the place of a row that holds no UTF-8 or no sound data, the reason."""
    easy = [_is_plain(field.type) for field in batch.schema]
    try:
        batch.validate(full=True)  # damaged offsets would be read as they are
        rows = batch.to_pylist()
    except (ValueError, IndexError) as error:
        if batch.num_rows == 1:
            yield error
            return
        for index in range(batch.num_rows):
            yield from _values(batch.slice(index, 1))
        return
    if all(easy):
        yield from rows
        return
    for row in rows:
        cells = zip(row.items(), easy, strict=True)
        yield {name: value if as_is else plain(value) for (name, value), as_is in cells}


def _is_plain(kind: Any) -> bool:
    """Whether a column's values are what they would be in JSON."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    known = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return types.is_null(kind) or any(check(kind) for check in known)


def plain(value: Any) -> Any:
    """A value as JSON has it, where JSON has it."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return str(value) if isinstance(value, timedelta | Decimal) else value
