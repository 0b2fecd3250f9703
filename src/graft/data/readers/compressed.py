"""Opening a data file: plain or gzip, as bytes or as text, and telling what is no UTF-8 text at all."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from graft.errors import DataError, StorageError

BUFFER_BYTES = 1 << 18
_BEGIN_BYTES = 8
_MARK = b"\xef\xbb\xbf"
_FOREIGN = (
    (b"\x1f\x8b", "gzip", "let its name end in .gz"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"BZh91AY", "bzip2", "unpack it, or pack it with gzip"),
    (b"\xfd7zXZ\0", "xz", "unpack it, or pack it with gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it, or pack it with gzip"),
    (b"PAR1\x15", "parquet", "let its name end in .parquet"),
    (b"ARROW1\0\0", "an arrow file", "let its name end in .arrow"),
    (b"\x80\x04\x95", "a pickle, which is never read", "write the rows as .jsonl"),
    (b"\x80\x05\x95", "a pickle, which is never read", "write the rows as .jsonl"),
    (b"\0\0\xfe\xff", "UTF-32", "save it as UTF-8"),
    (b"\xff\xfe\0\0", "UTF-32", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
)

_WIDE: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "UTF-16",
    (True, False, True, False): "UTF-16",
    (False, True, True, True): "UTF-32",
    (True, True, True, False): "UTF-32",
}
"""Which of the first four bytes are zero where a text of ASCII begins without a byte order mark."""


def is_gzip(path: Path) -> bool:
    """Whether a file's name says that it is packed."""
    return path.suffix.lower() == ".gz"


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file for reading, unpacking it on the way where its name ends in .gz.

    Members of a gzip file after one another are read as one. A byte order mark is passed over.

    Raises:
        DataError: It is no ordinary file, or begins as other kinds of files do; later, while it is read: the
            packed data is damaged or ends too soon.
        StorageError: It cannot be opened.

    Cost: a fixed buffer, however much a packed file unpacks to.
    """
    try:
        plain = open(path, "rb", buffering=BUFFER_BYTES, opener=open_ordinary)  # noqa: SIM115 - the caller's
    except OSError as error:
        raise StorageError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error
    file: Any = io.BufferedReader(_Unpacked(plain, path), BUFFER_BYTES) if is_gzip(path) else plain
    with contextlib.ExitStack() as stack:
        stack.push(file)
        begin = file.peek(_BEGIN_BYTES)[:_BEGIN_BYTES]
        _check_begin(begin, path)
        if begin.startswith(_MARK):
            file.read(len(_MARK))
        stack.pop_all()
    opened: io.BufferedReader = file
    return opened


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a file as text whose lines end in LF, whatever they end in.

    Bytes that are not UTF-8 become halves of surrogate pairs (surrogateescape), for the reader to refuse with
    their place.

    Raises:
        DataError: As `open_bytes`.
        StorageError: It cannot be opened.
    """
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8", errors="surrogateescape", newline=None)


def open_ordinary(path: str, flags: int) -> int:
    """An opener for `open` that takes ordinary files only, and waits for nobody.

    Raises:
        DataError: It is a directory, a pipe, a socket or a device.
    """
    # O_NONBLOCK: opening a named pipe would wait for its writer, perhaps for ever.
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    raise DataError(
        "a directory, not a file" if stat.S_ISDIR(mode) else "no ordinary file (a pipe, socket or device)",
        where=path,
        fix="write the rows into a file",
    )


def _check_begin(begin: bytes, path: Path) -> None:
    for magic, name, fix in _FOREIGN:
        if begin.startswith(magic):
            raise DataError(f"the file is {name}", where=f"{path}:1:1", fix=fix)
    if wide := _WIDE.get(tuple(byte == 0 for byte in begin[:4])):
        raise DataError(f"the file is {wide}", where=f"{path}:1:1", fix="save it as UTF-8")


class _Unpacked(io.RawIOBase):
    """What a gzip file holds; errors of it are told as errors of the data."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._packed = file
        self._file = gzip.GzipFile(fileobj=file)
        self._path = path
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read1(len(buffer))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            ends = isinstance(error, EOFError)
            reason = "the packed data ends too soon" if ends else f"not a sound gzip file: {error}"
            raise DataError(
                f"{reason}, after {self._num_bytes:,} bytes unpacked",
                where=str(self._path),
                fix="fetch or pack it again",
            ) from error
        buffer[: len(data)] = data
        self._num_bytes += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        self._packed.close()
        super().close()
