"""Tokens of large files, kept by what they were made of: the rows, the tokenizer, the settings, the code.

One directory for each such digest, written whole or not at all; of two processes that want the same one, the
second waits for the first. The least recently used ones go when all together grow beyond 20 GiB; a process
that reads one then keeps its open files.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graft import files
from graft.data.config import DataConfig
from graft.data.listener import Listener
from graft.data.masking import Encoder
from graft.data.quarantine import Quarantine
from graft.data.report import Report
from graft.data.sources import Source, name_of, source_files
from graft.data.store import Store
from graft.errors import DataError, StorageError
from graft.kernels.cpu import library, words

MIN_BYTES = 16 << 20
"""Smaller files are tokenized in seconds, and not kept."""
MAX_BYTES = 20 << 30
"""All entries together."""

_DESCRIPTION = "dataset.json"
_QUARANTINE = "quarantine.jsonl"
_WITHOUT_EFFECT = (
    "train",
    "mix",
    "mix_by",
    "mix_temperature",
    "eval",
    "eval_fraction",
    "shuffle",
    "packing",
    "workers",
    "cache",
    "chat_template",
)
"""Settings that samples do not hang on; a template counts by its text."""
_ELSEWHERE = "name a directory that may be written with data.cache, or set it to false"
_KEY = re.compile("[0-9a-f]{64}")
"""Names of entries; whatever else lies in a directory that the user named is not ours."""
_LIBRARIES = ("tokenizers", "transformers", "jinja2")


def default_directory() -> Path:
    """Where tokens are kept: $GRAFT_CACHE, or graft in the user's cache directory."""
    if place := os.environ.get("GRAFT_CACHE"):
        return Path(place)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "graft" / "tokens"


def entry_for(
    source: Source, encoder: Encoder, config: DataConfig, split: str, comparisons: Sequence[Sequence[str]]
) -> Entry | None:
    """The entry for a source; None where nothing is kept.

    Args:
        source: What is read.
        encoder: What makes its samples.
        config: How.
        split: Which file of a directory.
        comparisons: What its rows are compared with, and what the notes about them name: the sources before
            it. The first with which tokens are kept counts, or the last.

    Raises:
        DataError: The kind of file is unknown.
        StorageError: The file is missing or cannot be read.

    Cost: reads the file once, about a second for a gigabyte.
    """
    found = source_files(source, split) if config.cache is not False else None
    if not found or sum(file.stat().st_size for file in found) < MIN_BYTES:
        return None
    stamps = tuple((file, _stamp(file)) for file in found)
    settings = dataclasses.asdict(config)
    made_of = {
        "path": name_of(source),
        "files": [[file.name, files.sha256_file(file)] for file in found],
        "split": split,
        "settings": {name: settings[name] for name in settings if name not in _WITHOUT_EFFECT},
        "tokenizer": encoder.digest(),
        "code": _code(),
    }
    root = default_directory() if config.cache is True else Path(str(config.cache)).expanduser()
    places = [root / files.sha256_json({**made_of, "seen": list(seen)}) for seen in comparisons]
    return Entry(next((place for place in places if place.exists()), places[-1]), stamps)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A directory of the cache.

    Attributes:
        path: Its place, named after the digest of what it was made of.
        stamps: The files whose digests these are, each with the time and size that it had before.
    """

    path: Path
    stamps: tuple[tuple[Path, tuple[int, int]], ...] = ()

    @contextmanager
    def held(self, listener: Listener) -> Iterator[None]:
        """Keep other processes from making the same entry meanwhile.

        A cache that may only be read is used as it is, if it has the entry.

        Raises:
            StorageError: The cache cannot be written, and does not have the entry.
        """
        root = self.path.parent
        if self.path.exists() and not _writable(root):
            yield
            return
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            files.refuse(error, root, None, "tokens cannot be kept", _ELSEWHERE)
        if not _writable(root):
            denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            files.refuse(denied, root, None, "tokens cannot be kept", _ELSEWHERE)
        waiting = "waiting: another process prepares the same data"
        with files.locked(_lock(self.path), lambda: listener.say(waiting)):
            yield

    @contextmanager
    def filled(self) -> Iterator[Path]:
        """A directory to fill, which becomes the entry at the end; older entries make room for it.

        Raises:
            DataError: A file was changed meanwhile, so that its digest is not that of what was read.
            StorageError: The disk refused.
        """
        with files.new_directory(self.path) as partial:
            yield partial
            for file, stamp in self.stamps:
                if _stamp(file) != stamp:
                    raise DataError(
                        "the file was changed while it was read",
                        where=str(file),
                        fix="start again when it is written completely",
                    )
        _make_room(self.path)

    def describe(
        self,
        directory: Path,
        samples: Store,
        report: Report,
        digest: str,
        quarantine: Quarantine,
        num_eval: int,
    ) -> None:
        """Write down what a filled directory holds."""
        quarantine.save(directory / _QUARANTINE)
        report.notes.append(f"tokens kept in {self.path} ({samples.num_bytes / 1e6:,.0f} MB)")
        described = {
            "sizes": samples.sizes(),
            "digests": {name: files.sha256_file(directory / name) for name in samples.sizes()},
            "token_dtype": samples.token_dtype.str,
            "remarks": [list(remarks) for remarks in samples.remarks],
            "report": report.to_dict(),
            "digest": digest,
            "num_eval": num_eval,
        }
        files.write_json(directory / _DESCRIPTION, described)

    def num_eval(self) -> int:
        """Evaluation rows that had been found in the training data when this was made.

        Raises:
            StorageError: It cannot be read.
        """
        return int(files.read_json(self.path / _DESCRIPTION)["num_eval"])

    def open(self, quarantine: Quarantine | None) -> tuple[Store, Report, str] | None:
        """What is kept; None where there is nothing, or not what was written, which is then removed.

        Args:
            quarantine: Receives the rows that were left out.

        Raises:
            StorageError: It is there and cannot be read or removed.
        """
        if not self.path.exists():
            return None
        found = self._described()
        if found is None or not self._is_whole(found):
            if not _writable(self.path.parent):
                raise StorageError(
                    "the kept tokens are damaged, and the cache may only be read",
                    where=str(self.path),
                    fix=_ELSEWHERE,
                )
            files.remove_directory(self.path)
            return None
        report = Report(**found["report"])
        report.rejected = [(where, reason) for where, reason in report.rejected]
        with files.refusing(self.path, 0):
            if _writable(self.path.parent):
                os.utime(self.path / _DESCRIPTION)
            remarks = [tuple(each) for each in found["remarks"]]
            store = Store.opened(self.path, found["token_dtype"], remarks, report.path)
        if quarantine is not None and (self.path / _QUARANTINE).exists():
            quarantine.take(self.path / _QUARANTINE)
        return store, report, found["digest"]

    def _described(self) -> dict[str, Any] | None:
        """The description; None where it is damaged or missing."""
        try:
            found = files.read_json(self.path / _DESCRIPTION)
        except StorageError:
            return None
        return found if isinstance(found, dict) and found.keys() >= {"sizes", "digests"} else None

    def _is_whole(self, described: dict[str, Any]) -> bool:
        """Whether all columns are as they were written, byte by byte; about a second for a gigabyte."""
        sizes, digests = described["sizes"], described["digests"]
        return {name: _size(self.path / name) for name in sizes} == sizes and all(
            files.sha256_file(self.path / name) == digest for name, digest in digests.items()
        )


def _stamp(path: Path) -> tuple[int, int]:
    with files.refusing(path, 0):
        found = path.stat()
    return found.st_mtime_ns, found.st_size


def _writable(directory: Path) -> bool:
    return os.access(directory, os.W_OK | os.X_OK)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


class _BusyError(Exception):
    """Another holds a lock."""


def _lock(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


@contextmanager
def _free(entry: Path) -> Iterator[bool]:
    """Whether nobody makes or opens an entry, and nobody will within the block."""

    def busy() -> None:
        raise _BusyError

    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(_lock(entry), busy))
        except _BusyError:
            yield False
            return
        yield True


def _make_room(keep: Path) -> None:
    """Remove what killed processes left, and the entries that were used longest ago until the rest fits."""
    root = keep.parent
    for partial in root.glob(f".*{files.PARTIAL}"):
        entry = root / partial.name.split(".")[1]
        if not _KEY.fullmatch(entry.name):
            continue
        with nullcontext(True) if entry == keep else _free(entry) as free:
            if free:
                shutil.rmtree(partial, ignore_errors=True)
    used: dict[Path, tuple[float, int]] = {}
    for description in root.glob(f"*/{_DESCRIPTION}"):
        entry = description.parent
        if not _KEY.fullmatch(entry.name):
            continue
        with suppress(FileNotFoundError):  # another process makes room too
            size = sum(file.stat().st_size for file in entry.iterdir())
            used[entry] = (description.stat().st_mtime, size)
    total = sum(size for _, size in used.values())
    for entry, (_, size) in sorted(used.items(), key=lambda item: item[1][0]):
        if total <= MAX_BYTES:
            return
        if entry == keep:
            continue
        with _free(entry) as free:
            if free and entry.exists():
                files.remove_directory(entry)
                total -= size


@functools.cache
def _code() -> str:
    """Digest of what turns rows into samples: this room, the kernel it calls, the libraries below it."""
    room = [*sorted(Path(__file__).parent.rglob("*.py")), Path(words.__file__)]
    room += [] if library.problem() else [library.FILE]
    return files.sha256_json(
        [[version(name) for name in _LIBRARIES], [[file.name, files.sha256_file(file)] for file in room]]
    )
