"""What a power cut leaves: files of the right length with zeros in them, or cut short, or with a bit turned.

A resume finds each by its digest, falls back to the checkpoint before it, and ends with the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft import files
from graft.config import build, read_assignments
from graft.errors import CheckpointError, StorageError
from graft.runs import RunDirectory
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.monitors import Silent

COMPARED = ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/graft.json")


def zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def tail_zeroed(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(data: bytes) -> bytes:
    return b""


def bit_turned(data: bytes) -> bytes:
    place = data.rindex(b"0") if b"0" in data else len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.fixture(scope="module")
def straight(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, each saved, whose record does not say yet that it is finished."""
    folder = tmp_path_factory.mktemp("straight")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": f"{i}"}) + "\n" for i in range(8)))
    words = [f"model.name={tiny_dir('llama', num_hidden_layers=1)}", f"data.train={rows}"]
    words += ["data.max_length=32", "adapter.rank=2", "training.batch_size=2", "training.max_steps=4"]
    words += ["training.save_steps=1", "training.keep_checkpoints=2", f"output={folder / 'run'}"]
    run_from_config(build(RunConfig, read_assignments(words)))
    return folder / "run"


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def unfinish(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))


class Listener(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize("tear", [zeroed, tail_zeroed, cut, emptied, bit_turned])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_torn_checkpoint_is_passed_over(
    name: str, tear: Callable[[bytes], bytes], copy: Path, straight: Path
) -> None:
    unfinish(copy)
    path = copy / "checkpoints" / "step-000004" / name
    path.write_bytes(tear(path.read_bytes()))
    listener = Listener()
    resume(copy, listener)
    assert any(line.startswith("passed over step-000004") for line in listener.told)
    assert any(line.startswith("goes on after step 3") for line in listener.told)
    for compared in COMPARED:
        assert (copy / compared).read_bytes() == (straight / compared).read_bytes(), compared


def test_every_byte_of_the_state_counts(copy: Path) -> None:
    from graft.training.checkpoint import load_checkpoint

    path = copy / "checkpoints" / "step-000004" / "state.json"
    data = path.read_bytes()
    whole = load_checkpoint(path.parent)
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found = load_checkpoint(path.parent)
        except CheckpointError:
            continue
        assert (found.position, found.settings) == (whole.position, whole.settings)  # a space, for one


def test_a_torn_log_is_found_by_its_digest(copy: Path, straight: Path) -> None:
    unfinish(copy)
    log = (copy / "metrics.jsonl").read_bytes()
    lines = log.splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(log[: -len(lines[-1])] + bytes(len(lines[-1])))
    listener = Listener()
    resume(copy, listener)
    assert any("metrics.jsonl is not what it was" in line for line in listener.told)
    assert (copy / "metrics.jsonl").read_bytes() == log
    unfinish(copy)
    (copy / "metrics.jsonl").write_bytes(zeroed(log))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        resume(copy)


@pytest.mark.parametrize("tear", [zeroed, emptied])
def test_a_torn_result_of_a_finished_run_is_written_again(
    tear: Callable[[bytes], bytes], copy: Path, straight: Path
) -> None:
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(tear(weights.read_bytes()))
    resume(copy)
    for compared in COMPARED:
        assert (copy / compared).read_bytes() == (straight / compared).read_bytes(), compared


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_filesystem_without_locks_is_told(number: int, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(StorageError, match=f"cannot be locked .*: {os.strerror(number)}"),
        RunDirectory(copy).lock(),
    ):
        pytest.fail("it went on without a lock")


def test_what_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "weights").write_text("old")
    real = os.rename

    def rename(one: Path, two: Path) -> None:
        if Path(two) == target and "old" not in Path(one).name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(one, two)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(StorageError, match="Input/output error; 3 bytes were needed; .* bytes are free there"),
        files.new_directory(target, replace=True, needed_bytes=3) as partial,
    ):
        (partial / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
