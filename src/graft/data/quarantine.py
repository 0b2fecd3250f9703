"""The rows that were left out, kept to be looked at and mended: a file of JSON lines."""

from __future__ import annotations

import json
import os
import tempfile
from types import TracebackType

from graft.errors import DataError
from graft.files import refusing, write_chunks

_IN_MEMORY_BYTES = 8 << 20


class Quarantine:
    """Collects refused rows until it is known where they go.

    They wait in memory, more than a few megabytes in a file without a name, so that nothing is left behind
    where the data is refused as a whole. Close it, or use it in a `with`.

    Attributes:
        count: Rows in it.
    """

    def __init__(self) -> None:
        self.count = 0
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 - closed by close()

    def add(self, error: DataError, raw: str) -> None:
        """Keep a row.

        Args:
            error: Why it was left out, and where it stands.
            raw: The row as text, undecodable bytes escaped.

        Raises:
            StorageError: The disk for temporary files is full.
        """
        line = {"where": error.where, "reason": error.what, "fix": error.fix, "row": raw}
        data = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        with refusing(tempfile.gettempdir(), len(data)):
            self._file.write(data)
        self.count += 1

    def take(self, path: str | os.PathLike[str]) -> None:
        """Keep the rows of a file that another quarantine saved.

        Raises:
            StorageError: It cannot be read, or the disk for temporary files is full.
        """
        with refusing(path, 0), open(path, "rb") as file:
            for line in file:
                self._file.write(line)
                self.count += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all, over an older one; without any row there is none then.

        Args:
            path: Where; the directory must exist.

        Raises:
            StorageError: The place cannot be written.
        """
        if not self.count:
            with refusing(path, 0):
                if os.path.lexists(path):
                    os.unlink(path)
            return
        self._file.seek(0)
        write_chunks(path, iter(lambda: self._file.read(1 << 20), b""))
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Let go of the rows."""
        self._file.close()

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
