"""A file or directory is whole under its name, or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from graft import files
from graft.errors import StorageError


def test_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*9 bytes were needed.*bytes are free"):
        files.write_text(path, "new words")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_new_directory_appears_only_when_filled(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with files.new_directory(path) as partial:
        (partial / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"
    with pytest.raises(StorageError, match="already exists"):
        files.new_directory(path).__enter__()


def test_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    def fill_and_fail() -> None:
        with files.new_directory(tmp_path / "out") as partial:
            (partial / "x").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_replaced_directory_swaps(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("old", "new"):
        with files.new_directory(path, replace=True) as partial:
            (partial / "x").write_text(text)
    assert (path / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_remove_partials(tmp_path: Path) -> None:
    (tmp_path / f".a.1{files.PARTIAL}").mkdir()
    (tmp_path / f".b.1{files.PARTIAL}").write_text("")
    (tmp_path / "kept").write_text("")
    assert len(files.remove_partials(tmp_path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x"])
def test_safe_join_refuses(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="leads outside"):
        files.safe_join(root, name)


def test_safe_join_accepts(tmp_path: Path) -> None:
    assert files.safe_join(tmp_path, "a/b") == tmp_path.resolve() / "a" / "b"


def test_read_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(StorageError, match="line 2"):
        files.read_json(tmp_path / "x.json")
