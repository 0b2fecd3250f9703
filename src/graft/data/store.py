"""Samples held as bytes, in memory or in files: any one is read by itself, so that their number costs little.

Four columns: token ids one sample after another, the learned ranges of tokens, the places of the rows, and a
record of fixed size for each sample that says where its parts begin. A store in files keeps 4 bytes a sample
in memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from graft import files
from graft.data.held import FIGURES, Held, tell
from graft.data.samples import Sample
from graft.errors import StorageError

SPILL_BYTES = 64 << 20
"""A store without a directory of its own goes to a nameless file beyond this."""

COLUMNS = ("tokens", "spans", "places", "records")
RECORD = np.dtype(
    [
        ("token", "<i8"),  # where its ids begin, in tokens
        ("span", "<i8"),  # where its learned ranges begin, in ranges
        ("place", "<i8"),  # where the name of its place begins, in bytes
        ("key", "<u8", (2,)),  # digest of its ids and labels
        ("tokens", "<i4"),
        ("spans", "<i4"),
        ("place_bytes", "<i4"),
        ("learned", "<i4"),  # tokens that are learned
        ("ends", "<i4"),  # learned tokens that end an answer or a text
        ("remark", "<i4"),  # which of the store's sets of remarks
    ]
)
_SPAN = np.dtype(("<i4", (2,)))
_BLOCK = 1 << 14
_BUFFER_TOKENS = 1 << 18
_WHOLE = "\0"
"""Stands before a place that does not begin with the prefix; no place has it."""


class Store(Held):
    """Samples that `StoreWriter` wrote.

    Args:
        columns: What holds the bytes, by the names of `COLUMNS`.
        token_dtype: Of the ids.
        remarks: The sets of remarks that samples have, by number.
        prefix: What places begin with, which is not written for each.
    """

    def __init__(
        self,
        columns: dict[str, Column],
        token_dtype: np.dtype[Any],
        remarks: Sequence[tuple[str, ...]],
        prefix: str,
    ) -> None:
        self._columns = columns
        self.token_dtype = token_dtype
        self.remarks = remarks
        self._prefix = prefix
        count = columns["records"].num_bytes // RECORD.itemsize
        self.lengths = np.empty(count, dtype=np.int32)
        for begin, block in self._blocks(count):
            self.lengths[begin : begin + len(block)] = block["tokens"]

    @classmethod
    def opened(
        cls, directory: Path, token_dtype: str, remarks: Sequence[tuple[str, ...]], prefix: str
    ) -> Store:
        """What a writer put into a directory.

        Raises:
            OSError: A file is missing or cannot be read.
        """
        columns = {name: Column.opened(directory / name) for name in COLUMNS}
        return cls(columns, np.dtype(token_dtype), remarks, prefix)

    def sizes(self) -> dict[str, int]:
        """Bytes of each column."""
        return {name: column.num_bytes for name, column in self._columns.items()}

    @property
    def num_bytes(self) -> int:
        """Of all columns."""
        return sum(column.num_bytes for column in self._columns.values())

    def sample(self, index: int) -> Sample:
        """The sample at a place from 0 on; three small reads."""
        at = self._read("records", RECORD, index, 1)[0]
        ids = self._read("tokens", self.token_dtype, int(at["token"]), int(at["tokens"]))
        spans = self._read("spans", _SPAN, int(at["span"]), int(at["spans"]))
        place = self._columns["places"].read(int(at["place"]), int(at["place_bytes"]))
        where = place.decode("utf-8", "surrogateescape")
        where = where[1:] if where.startswith(_WHOLE) else self._prefix + where
        learned = [(begin, end) for begin, end in spans.tolist()]
        return Sample.of(ids, learned, where, self.remarks[int(at["remark"])])

    def figures(self) -> NDArray[Any]:
        """Of each sample its key, tokens, learned tokens and ends; 28 bytes each."""
        found = np.empty(len(self), dtype=FIGURES)
        for begin, block in self._blocks(len(self)):
            for name in FIGURES.names or ():
                found[name][begin : begin + len(block)] = block[name]
        return found

    def _blocks(self, count: int) -> Iterator[tuple[int, NDArray[Any]]]:
        for begin in range(0, count, _BLOCK):
            yield begin, self._read("records", RECORD, begin, min(_BLOCK, count - begin))

    def _read(self, column: str, dtype: np.dtype[Any], begin: int, count: int) -> NDArray[Any]:
        size = dtype.itemsize
        return np.frombuffer(self._columns[column].read(begin * size, count * size), dtype)


class StoreWriter:
    """Takes samples one after another.

    Args:
        num_ids: Ids are below this; up to 65,536 they take two bytes each.
        control_ids: Tokens that end an answer or a text where they are learned last.
        directory: Where the columns become files; without one they stay in memory, and go to nameless files
            in the system's temporary directory when they grow.
        spill_bytes: How large they grow before; SPILL_BYTES if left out.
        prefix: What most places begin with.

    Raises:
        StorageError: The disk is full, from any of the methods.
    """

    def __init__(
        self,
        num_ids: int,
        control_ids: Collection[int],
        directory: Path | None = None,
        spill_bytes: int | None = None,
        *,
        prefix: str = "",
    ) -> None:
        self._prefix = prefix
        self.token_dtype: np.dtype[Any] = np.dtype("<u2" if num_ids <= 1 << 16 else "<i4")
        self.remarks: dict[tuple[str, ...], int] = {(): 0}
        self._control_ids = control_ids
        self._spill_bytes = SPILL_BYTES if spill_bytes is None else spill_bytes
        self._columns: dict[str, Column] = {name: Column.new(name, directory) for name in COLUMNS}
        self._in_memory = directory is None
        self._ends = {"token": 0, "span": 0, "place": 0}
        self._waiting: list[Sample] = []
        self._num_waiting_tokens = 0
        self.num_samples = 0

    def add(self, sample: Sample) -> None:
        """Append a sample.

        Args:
            sample: Its labels are its ids where they are learned.
        """
        self._waiting.append(sample)
        self._num_waiting_tokens += len(sample)
        self.num_samples += 1
        if self._num_waiting_tokens >= _BUFFER_TOKENS:
            self._flush()

    def store(self) -> Store:
        """All that was added; nothing may be added afterwards."""
        self._flush()
        return Store(self._columns, self.token_dtype, list(self.remarks), self._prefix)

    def _place(self, where: str) -> bytes:
        begins = where.startswith(self._prefix)
        place = where.removeprefix(self._prefix) if begins else _WHOLE + where
        return place.encode("utf-8", "surrogateescape")

    def _flush(self) -> None:
        samples, self._waiting, self._num_waiting_tokens = self._waiting, [], 0
        if not samples:
            return
        names = [self._place(sample.where) for sample in samples]
        records = np.zeros(len(samples), RECORD)
        ids, spans = tell(samples, self._control_ids, records)
        records["place_bytes"] = [len(name) for name in names]
        records["remark"] = [self.remarks.setdefault(s.remarks, len(self.remarks)) for s in samples]
        for begin, size in (("token", "tokens"), ("span", "spans"), ("place", "place_bytes")):
            ends = np.cumsum(records[size], dtype=np.int64)
            records[begin] = self._ends[begin] + ends - records[size]
            self._ends[begin] += int(ends[-1])
        kept = (ids.astype(self.token_dtype).tobytes(), spans.tobytes(), b"".join(names), records.tobytes())
        for column, data in zip(COLUMNS, kept, strict=True):
            self._columns[column].append(data)
        if self._in_memory and sum(column.num_bytes for column in self._columns.values()) > self._spill_bytes:
            self._columns = {name: column.spilled() for name, column in self._columns.items()}
            self._in_memory = False


class Column:
    """Bytes that grow at their end and are read anywhere: in memory, or in a file.

    Args:
        handle: Of a file; without one the bytes are in memory. It is closed with the column.
        where: Its name, for errors.
    """

    def __init__(self, handle: int | None = None, where: str = "") -> None:
        self._handle, self._where = handle, where
        self._memory = bytearray()
        self.num_bytes = 0
        if handle is not None:
            self.num_bytes = os.fstat(handle).st_size
            weakref.finalize(self, os.close, handle)

    @classmethod
    def new(cls, name: str, directory: Path | None) -> Column:
        """An empty one, in memory or as a file of a directory."""
        if directory is None:
            return cls()
        path = directory / name
        with files.refusing(path, 0):
            return cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), str(path))

    @classmethod
    def opened(cls, path: Path) -> Column:
        """One that was written before.

        Raises:
            OSError: It cannot be read.
        """
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        if self._handle is None:
            self._memory += data
        else:
            with files.refusing(self._where, len(data)):
                files.write_at(self._handle, memoryview(data), self.num_bytes)
        self.num_bytes += len(data)

    def read(self, begin: int, count: int) -> bytes | bytearray:
        """Bytes from a place on.

        Raises:
            StorageError: They cannot be read, or the file ends before.
        """
        if self._handle is None:
            return self._memory[begin : begin + count]
        data = bytearray(count)
        try:
            missing = files.read_at(self._handle, memoryview(data), begin)
        except OSError as error:
            self._refuse(str(error.strerror), error)
        if missing:
            self._refuse("the file has become shorter")
        return data

    def _refuse(self, why: str, error: OSError | None = None) -> NoReturn:
        raise StorageError(
            f"tokens cannot be read: {why}",
            where=self._where,
            fix="start again: they are made anew where the file is damaged",
        ) from error

    def spilled(self) -> Column:
        """The same bytes in a nameless file."""
        directory = tempfile.gettempdir()
        moved = Column(files.scratch_file(directory, 0), directory)
        moved.append(bytes(self._memory))
        return moved
