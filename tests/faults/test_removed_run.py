"""A run directory that is taken away while the run writes into it: told with its name, nothing made anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.config import build, read_assignments
from graft.errors import StorageError
from graft.training import phases
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training


@pytest.fixture
def config(tiny_dir: Callable[..., Path], tmp_path: Path) -> Callable[[str], RunConfig]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": f"{i}"}) + "\n" for i in range(8)))

    def make(name: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / name}"]
        words += ["training.max_steps=4", "training.batch_size=2", "training.save_steps=1"]
        return build(RunConfig, read_assignments([*words, "data.max_length=64", "adapter.rank=4"]))

    return make


def after_step(number: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == number:
            act()

    monkeypatch.setattr(Training, "_step", step)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_removed_while_training(
    step: int, config: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    after_step(step, lambda: shutil.rmtree(out), monkeypatch)
    with pytest.raises(StorageError, match="removed or moved .* left there: nothing") as caught:
        run_from_config(config("run"))
    assert caught.value.where == str(out)
    assert not out.exists()


def test_moved_while_training_goes_on_from_its_new_place(
    config: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_from_config(config("straight"))
    with monkeypatch.context() as patch:
        after_step(2, lambda: os.rename(tmp_path / "run", tmp_path / "moved"), patch)
        with pytest.raises(StorageError, match="removed or moved") as caught:
            run_from_config(config("run"))
    assert "--resume" in caught.value.fix
    assert not (tmp_path / "run").exists()
    resume(tmp_path / "moved")
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "moved" / name).read_bytes() == (straight.directory / name).read_bytes()


def test_a_removed_log_is_told_with_what_stands(
    config: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(3, (tmp_path / "run" / "metrics.jsonl").unlink, monkeypatch)
    with pytest.raises(StorageError, match="left there: checkpoints/step-000001, checkpoints/step-000002\n"):
        run_from_config(config("run"))
    assert not (tmp_path / "run" / "adapter").exists()


def test_removed_before_the_result_is_written(
    config: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "run", phases.use_best

    def remove(*arguments: Any) -> str:
        told = real(*arguments)
        shutil.rmtree(out)
        return told

    monkeypatch.setattr(phases, "use_best", remove)
    with pytest.raises(StorageError, match="left there: nothing"):
        run_from_config(config("run"))
    assert not out.exists()


def test_removed_while_the_result_is_written(
    config: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft.training import results

    out, real = tmp_path / "run", results.save_adapter

    def remove(*arguments: Any, **named: Any) -> None:
        shutil.rmtree(out)
        real(*arguments, **named)

    monkeypatch.setattr(results, "save_adapter", remove)
    with pytest.raises(StorageError, match="left there: adapter\n"):
        run_from_config(config("run"))
    assert sorted(path.name for path in out.iterdir()) == ["adapter"]


def test_removed_while_a_checkpoint_is_written(
    config: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft.training import checkpoint

    out, real = tmp_path / "run", checkpoint.write_state

    def remove(*arguments: Any, **named: Any) -> None:
        shutil.rmtree(out)
        real(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write_state", remove)
    with pytest.raises(StorageError, match="removed or moved"):
        run_from_config(config("run"))
    assert not out.exists()
