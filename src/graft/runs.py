"""What a run directory holds, and how to open, lock, append to and read it.

runs/first/
    run.json          resolved config, derived choices with reasons, versions, digests, results
    metrics.jsonl     one line a step; the same bytes for the same run, also when it was resumed
    timings.jsonl     speed and memory of each logged step; differs from run to run
    spectra.jsonl     singular values of the adapter's updates, now and then; the same bytes for the same run
    audit.json        what the audit of the first steps saw
    quarantine.jsonl  rows that data.skip_invalid left out, with places and reasons; only where there are any
    splits.json       from which steps on memory allowed fewer rows at a time; only where it ran out
    checkpoints/step-NNNNNN/
    adapter/          the result: a PEFT adapter directory (or model/ after full fine-tuning)
    report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from graft import files
from graft.errors import CheckpointError, StorageError

_STEP = re.compile(r"step-(\d{6,})$")


class RunDirectory:
    """The files of one run.

    Args:
        path: The directory; `create` or `open` check what is there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.record_path = self.path / "run.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.timings_path = self.path / "timings.jsonl"
        self.spectra_path = self.path / "spectra.jsonl"
        self.checkpoints_path = self.path / "checkpoints"
        self.adapter_path = self.path / "adapter"
        self.model_path = self.path / "model"
        self.quarantine_path = self.path / "quarantine.jsonl"
        self.report_path = self.path / "report.html"

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Make a new run directory.

        Raises:
            StorageError: It holds a run already, or other files, or cannot be written.
        """
        run = cls(path)
        run.check_new()
        try:
            run.checkpoints_path.mkdir(parents=True, exist_ok=True)
            files.remove_partials(run.path)  # of a start that was killed before its record was there
        except OSError as error:
            files.refuse(error, run.path, None, "cannot be made")
        return run

    def check_new(self) -> None:
        """Check that a new run may be made here, before any work is done.

        Raises:
            StorageError: There is a run already, or other files.
        """
        if self.record_path.exists():
            raise StorageError(
                "holds a run already",
                where=str(self.path),
                fix=f"go on with `--resume {self.path}`, or choose another",
            )
        if self.path.exists() and not self.path.is_dir():
            raise StorageError("is a file", where=str(self.path), fix="choose another output directory")
        if self.path.is_dir() and any(
            path.name not in ("checkpoints", "lock") and not path.name.endswith(files.PARTIAL)
            for path in self.path.iterdir()
        ):
            raise StorageError("is not empty", where=str(self.path), fix="choose another output directory")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Open an existing run.

        Raises:
            CheckpointError: There is no run.
        """
        run = cls(path)
        if not run.record_path.is_file():
            near = (
                sorted(p.parent.name for p in run.path.parent.glob("*/run.json"))
                if run.path.parent.is_dir()
                else []
            )
            fix = f"runs there: {', '.join(near)}" if near else "give the directory that holds run.json"
            raise CheckpointError("is not a run directory", where=str(run.path), fix=fix)
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, so that no second process writes into it; freed by the system if this one dies.

        Raises:
            CheckpointError: Another process holds it.
            StorageError: The filesystem cannot tell whether one does.
        """
        with _opened(self.path / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise CheckpointError(
                    f"is being written by {holder}", where=str(self.path), fix="wait for it, or stop it"
                ) from error
            except OSError as error:
                raise StorageError(
                    f"cannot be locked against a second process: {error.strerror}",
                    where=str(self.path / "lock"),
                    fix="this filesystem has no locks (NFS without a lock service, for one): "
                    "let the run write to a local disk, and copy it afterwards",
                ) from error
            with contextlib.suppress(OSError):  # the name is for people; a full disk may still be freed
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()}".encode())
            yield

    def read_record(self) -> dict[str, Any]:
        """run.json as a dictionary."""
        record: dict[str, Any] = files.read_json(self.record_path)
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace run.json."""
        files.write_json(self.record_path, record)

    def check_present(self) -> None:
        """Check that nobody took the directory away while the run was writing into it.

        Raises:
            StorageError: The record or the log is gone; says what is left.
        """
        if not (self.record_path.is_file() and self.metrics_path.is_file()):
            self.refuse_removed()

    def refuse_removed(self) -> NoReturn:
        """Say that the directory was taken away from a run, and what is left of it.

        Raises:
            StorageError: Always.
        """
        results = [path for path in (self.adapter_path, self.model_path) if path.is_dir()]
        left = [str(path.relative_to(self.path)) for path in [*self.checkpoints(), *results]]
        raise StorageError(
            "the run directory, or the log in it, was removed or moved while the run was writing; "
            f"left there: {', '.join(left) or 'nothing'}",
            where=str(self.path),
            fix="start the run again; if it was moved, `graft train --resume` its new place goes on "
            "from its newest checkpoint",
        )

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint directories, oldest first."""
        if not self.checkpoints_path.is_dir():
            return []
        found = [path for path in self.checkpoints_path.iterdir() if _STEP.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps goes."""
        return self.checkpoints_path / f"step-{step:06d}"


class LineLog:
    """A file of JSON lines that can be cut back to a known length.

    Args:
        path: The file; made when missing.
        keep_bytes: Cut the file to this length first; None keeps all of it.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        # Unbuffered: what a full disk refused is not tried again on closing.
        self._file = _opened(path, "ab", buffering=0)
        self._path = path
        self._digest = hashlib.sha256()
        if keep_bytes is not None:
            if self._file.tell() < keep_bytes:
                raise CheckpointError(
                    f"is {self._file.tell()} bytes long, the checkpoint says {keep_bytes}",
                    where=str(path),
                    fix="the log was changed after the checkpoint; restore it or start a new run",
                )
            try:
                self._file.truncate(keep_bytes)
            except OSError as error:
                self._refuse(error, None)
            self._file.seek(keep_bytes)
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    self._digest.update(chunk)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; NaN and infinity are refused, write null instead.

        Raises:
            StorageError: The disk refused; a part of the line may be there.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._refuse(error, len(line))
        self._digest.update(line)

    def in_place(self) -> bool:
        """Whether the file still has its name: nobody removed, moved or replaced it."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def sync(self) -> int:
        """Flush to the disk; returns the length in bytes.

        Raises:
            StorageError: The disk refused.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._refuse(error, self._file.tell())
        return int(self._file.tell())

    def sha256(self) -> str:
        """Digest of what was kept and written since, as 64 hex digits; of a log opened at a length."""
        return self._digest.hexdigest()

    def _refuse(self, error: OSError, needed_bytes: int | None) -> NoReturn:
        fix = f"free some space, then `graft train --resume {self._path.parent}`"
        files.refuse(error, self._path, needed_bytes, "the log cannot be written", fix)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _opened(path: Path, mode: str, buffering: int = -1) -> Any:
    try:
        return open(path, mode, buffering)  # closed by whoever asked
    except OSError as error:
        fix = "a run writes into its directory: make it writable, or copy the run elsewhere"
        files.refuse(error, path, None, "cannot be opened for writing", fix)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSON-lines log; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
