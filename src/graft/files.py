"""Every byte that graft keeps goes through here: atomic writes, digests, safe paths.

A file or directory written here exists whole under its final name or not at all, also after a kill -9 or a
full disk: it is written beside its place, flushed to the disk, then renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from graft.errors import StorageError

PARTIAL = ".partial"
"""Marks names that are being written; whatever carries it may be deleted."""


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it is either the old one or the new one, never a part.

    Args:
        path: Where to write; the directory must exist.
        data: The whole content.

    Raises:
        StorageError: The disk is full or the place cannot be written; the old file is untouched.
    """
    write_chunks(path, [data])


def write_chunks(path: str | os.PathLike[str], chunks: Iterable[bytes]) -> None:
    """Write a file from pieces, as `write_bytes` does from a whole.

    Args:
        path: Where to write; the directory must exist.
        chunks: The content, piece by piece.

    Raises:
        StorageError: The disk is full or the place cannot be written; the old file is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    num_bytes = 0
    try:
        with open(partial, "wb") as file:
            for chunk in chunks:
                num_bytes += len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        refuse(error, path, num_bytes)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file atomically, keys in the order given, non-finite numbers refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: The file is missing, unreadable or not JSON; the message has the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(
            f"not a JSON file: {error}", where=str(path), fix="restore or remove it"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error


def write_tensors(
    tensors: Mapping[str, Any], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write torch tensors as a safetensors file, inside a directory that is not published yet.

    Args:
        tensors: Contiguous tensors by name.
        path: Where; not atomic by itself, see `new_directory`.
        metadata: Texts for the header.

    Raises:
        StorageError: The disk refused.
    """
    # Imported on use: it brings torch.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except (OSError, SafetensorError) as error:
        # safetensors tells of a full disk with an error of its own that is no OSError.
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        refuse(error, Path(path), size)


def scratch_file(directory: str | os.PathLike[str], num_bytes: int) -> int:
    """Open a file without a name, which is gone when it is closed or the process ends.

    Args:
        directory: On the disk that holds it.
        num_bytes: Its length; the disk sets them aside at once.

    Returns:
        The handle, for reading and writing.

    Raises:
        StorageError: The directory cannot be written, or has not so many bytes free.
    """
    # Where a system has no files without names, a kill in this instant leaves one that may be deleted.
    with (
        refusing(Path(directory) / "scratch file", num_bytes),
        tempfile.TemporaryFile(dir=directory, prefix=".", suffix=PARTIAL) as file,
    ):
        if num_bytes and hasattr(os, "posix_fallocate"):  # without, a full disk is told when it is full
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return os.dup(file.fileno())


def write_at(handle: int, memory: memoryview, place: int) -> None:
    """Write bytes to a place of an open file, all of them.

    Raises:
        OSError: The disk refused.
    """
    while memory:
        count = os.pwrite(handle, memory, place)
        memory, place = memory[count:], place + count


def read_at(handle: int, memory: memoryview, place: int) -> int:
    """Fill memory from a place of an open file.

    Returns:
        Bytes that are missing because the file ends before.
    """
    while memory and (count := os.preadv(handle, [memory], place)):
        memory, place = memory[count:], place + count
    return len(memory)


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str], num_bytes: int) -> Iterator[None]:
    """Within the block an error of the system says what could not be written, and how much room there is.

    Raises:
        StorageError: In its place.
    """
    try:
        yield
    except OSError as error:
        refuse(error, Path(path), num_bytes)


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str], *, replace: bool = False, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Fill a directory under a partial name and give it its final name at the end.

    Args:
        path: The final name.
        replace: Whether an existing directory of that name is replaced (swapped by two renames).
        needed_bytes: What it will take, where that is known; an error names it.

    Yields:
        The partial directory to write into.

    Raises:
        StorageError: The name exists and `replace` is not set, or the disk refused; nothing is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    if path.exists() and not replace:
        raise StorageError("already exists", where=str(path), fix="choose another name or remove it")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        _publish(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        refuse(error, path, needed_bytes)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old{PARTIAL}")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    sync_directory(path.parent)
    if old.exists():
        _remove(old)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock that one process has at a time; it is gone when the process ends, however it ends.

    Args:
        path: A file that stands for the lock; it is made, and stays.
        waiting: Called once where another process holds it.

    Raises:
        StorageError: The file cannot be made.
    """
    with refusing(path, 0):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_directory(path: Path) -> None:
    """Delete a directory; a kill in the middle leaves nothing of it under its name.

    Raises:
        StorageError: The disk refused.
    """
    doomed = path.with_name(f".{path.name}{PARTIAL}")
    try:
        if doomed.exists():
            _remove(doomed)
        os.rename(path, doomed)
    except OSError as error:
        _refuse_to_remove(error, path)
    _remove(doomed)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        _refuse_to_remove(error, path)


def _refuse_to_remove(error: OSError, path: Path) -> NoReturn:
    if isinstance(error, StorageError):
        raise error
    raise StorageError(
        f"cannot be removed: {error.strerror}",
        where=str(path),
        fix="make it removable, or remove it by hand; what was written beside it is whole",
    ) from error


def remove_partials(directory: str | os.PathLike[str]) -> list[Path]:
    """Delete what interrupted writes left in a directory; return what was deleted.

    Raises:
        StorageError: The disk refused.
    """
    found = sorted(Path(directory).glob(f".*{PARTIAL}"))
    for path in found:
        _remove(path)
    return found


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush every file and directory below `path` to the disk."""
    for root, _, names in os.walk(path):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(root))


def sha256_json(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys, as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_file(path: str | os.PathLike[str], num_bytes: int | None = None) -> str:
    """Digest of a file's content, as 64 hex digits.

    Args:
        path: The file.
        num_bytes: Of so many bytes at its beginning, or of all that are there; None for the whole file.

    Raises:
        StorageError: The file cannot be read.
    """
    digest, left = hashlib.sha256(), num_bytes
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20 if left is None else min(left, 1 << 20)):
                digest.update(chunk)
                left = None if left is None else left - len(chunk)
    except OSError as error:
        raise StorageError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error
    return digest.hexdigest()


def safe_join(root: str | os.PathLike[str], name: str) -> Path:
    """Join a name found in a file to a directory, refusing names that would leave it.

    Raises:
        StorageError: The name is absolute, has `..`, or leads outside `root` through a link.
    """
    base = Path(root).resolve()
    path = (base / name).resolve()
    if not path.is_relative_to(base):
        raise StorageError(
            f"the name {name!r} leads outside its directory",
            where=str(base),
            fix="the file that names it is damaged",
        )
    return path


def refuse(
    error: Exception,
    path: Path,
    needed_bytes: int | None,
    what: str = "cannot be written",
    fix: str = "free some space, or choose a place that you may write to; nothing that was there is lost",
) -> NoReturn:
    """Tell that the disk refused: why, where, what was needed and what is free.

    Args:
        error: What the system said; a StorageError is raised as it is.
        path: What was written.
        needed_bytes: How much of it; None where that is not known.
        what: What could not be done.
        fix: What to do about it.

    Raises:
        StorageError: Always.
    """
    if isinstance(error, StorageError):  # told already, by a function of this file
        raise error
    needed = "" if needed_bytes is None else f"; {needed_bytes:,} bytes were needed"
    raise StorageError(
        f"{what}: {getattr(error, 'strerror', None) or error}{needed}{_free(path)}",
        where=str(path),
        fix=fix,
    ) from error


def _free(path: Path) -> str:
    for directory in path.absolute().parents:  # the nearest one that is there
        with contextlib.suppress(OSError):
            return f"; {shutil.disk_usage(directory).free:,} bytes are free there"
    return ""
