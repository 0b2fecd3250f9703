"""A disk that refuses: the error says where and what to do, what was saved stands, a resume ends the same."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from graft import files
from graft.adapters.attach import attach
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import save_adapter
from graft.config import build, read_assignments
from graft.errors import StorageError
from graft.models.load import load
from graft.runs import LineLog
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond this, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpoint_that_does_not_fit(tiny_dir: Callable[..., Path], tmp_path: Path, method: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": f"{i}"}) + "\n" for i in range(8)))

    def config(name: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / name}"]
        words += ["training.max_steps=3", "training.batch_size=2", "data.max_length=64"]
        return build(RunConfig, read_assignments(words + (["adapter.rank=4"] if method == "lora" else [])))

    straight = run_from_config(config("straight"))
    out = tmp_path / "refused"
    with largest_file(8000), pytest.raises(StorageError, match="checkpoint cannot be written") as caught:
        run_from_config(config("refused"))
    assert f"--resume {out}" in caught.value.fix
    assert not list((out / "checkpoints").iterdir())
    resume(out)
    result = straight.adapter or straight.model
    assert result is not None
    weights = next(result.glob("*.safetensors")).relative_to(straight.directory)
    for name in ("metrics.jsonl", weights):
        assert (out / name).read_bytes() == (straight.directory / name).read_bytes()


def test_adapter_that_does_not_fit_leaves_the_old_one(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=4))
    save_adapter(base.model, tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    with largest_file(8000), pytest.raises(StorageError, match="cannot be written"):
        save_adapter(base.model, tmp_path / "adapter")
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_log_on_a_full_disk() -> None:
    log = LineLog(Path("/dev/full"))
    with pytest.raises(StorageError, match="No space left"):
        log.write({"step": 1})
    log.close()


def test_tensors_on_a_full_disk_say_how_many_bytes(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(StorageError, match="4,000 bytes were needed"):
        files.write_tensors({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")
