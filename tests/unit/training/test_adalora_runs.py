"""Runs with AdaLoRA: the loop takes ranks away, exactly, whatever the optimizer, and its audit knows why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.adapters.adalora import AdaLoraConfig
from graft.config import build, read_assignments
from graft.errors import ConfigError
from graft.runs import read_lines
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training

STEPS = 8
RANKS = 14
"""Layers of the tiny model that carry an adapter: seven linears in each of two blocks."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{i}: one and {i} more\n\n" for i in range(16)))
    return path


def config(directory: Path, rows: Path, out: Path, *more: str) -> RunConfig:
    words = [f"model.name={directory}", f"data.train={rows}", f"output={out}", f"training.max_steps={STEPS}"]
    words += ["training.batch_size=2", "data.max_length=64", "training.save_steps=1", "training.seed=3"]
    words += ["adapter.method=adalora", "adapter.rank=4", "adapter.target_rank=1"]
    words += ["adapter.allocation_interval=1", "training.learning_rate=1e-2", *more]
    return build(RunConfig, read_assignments(words))


class Killed(BaseException):
    """Stands for a kill: nobody handles it."""


def state_of(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step:06d}" / "state.safetensors").read_bytes()


OPTIMIZERS = {
    "adamw": (),
    "adamw_8bit": ("training.optimizer=adamw_8bit",),
    "paged": ("training.optimizer_memory=33000", "adapter.rank=12"),
    "accumulated": ("training.gradient_accumulation_steps=2", "training.batch_size=1"),
    "recomputed": ("training.gradient_checkpointing=full",),
}


@pytest.mark.parametrize("kill_at", [4, 7])
@pytest.mark.parametrize("how", OPTIMIZERS)
def test_killed_and_resumed_it_has_the_same_state(
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    kill_at: int,
) -> None:
    if kill_at == 7 and how not in ("adamw", "accumulated"):
        kill_at = 2
    more = OPTIMIZERS[how]
    whole = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "whole", *more))
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        if self.position.step == kill_at:
            raise Killed
        real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(Killed):
            run_from_config(config(tiny_dir("llama"), rows, tmp_path / "killed", *more))
    again = resume(tmp_path / "killed")
    for at in (STEPS - 1, STEPS):
        assert state_of(tmp_path / "whole", at) == state_of(tmp_path / "killed", at)
    assert whole.adapter is not None
    assert again.adapter is not None
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((whole.adapter / n).read_bytes() == (again.adapter / n).read_bytes() for n in names)
    state = load_file(tmp_path / "whole" / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors")
    assert sum(float(value.sum()) for key, value in state.items() if key.endswith(".kept")) == RANKS
    assert sum(key.endswith((".sensitivity", ".uncertainty")) for key in state) == 2 * 3 * RANKS


def test_the_run_ends_with_the_ranks_asked_for_and_says_so(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run"))
    lines = [line for line in read_lines(run.directory / "metrics.jsonl") if "loss" in line]
    # The figures of a step are those before its choice: the last choice is after step 8 - 2.
    assert [lines[0]["ranks"], lines[-1]["ranks"]] == [4 * RANKS, RANKS]
    assert all(later["ranks"] <= earlier["ranks"] for earlier, later in zip(lines, lines[1:], strict=False))
    assert all(line["regularization"] > 0 for line in lines)
    assert lines[-1]["regularization"] < lines[0]["regularization"], "P and Q become more orthonormal"
    assert run.adapter is not None
    written = json.loads((run.adapter / "adapter_config.json").read_text())
    assert sum(map(sum, written["rank_pattern"].values())) == RANKS
    audit = json.loads((run.directory / "audit.json").read_text())
    assert audit["passed"]


def test_the_loss_in_the_log_is_without_the_penalty(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """The first loss is the base's, whatever the weight of the penalty."""
    first = {}
    for weight in ("0", "0.5", "5"):
        words = [f"adapter.orthogonal_weight={weight}", "training.max_steps=4"]
        run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / weight, *words))
        first[weight] = read_lines(run.directory / "metrics.jsonl")[0]
    assert first["0"]["loss"] == first["0.5"]["loss"] == first["5"]["loss"]
    assert "regularization" not in first["0"]
    assert first["5"]["regularization"] == pytest.approx(10 * first["0.5"]["regularization"], rel=1e-5)


def importances(run: Path, step: int) -> dict[str, torch.Tensor]:
    state = load_file(run / "checkpoints" / f"step-{step:06d}" / "state.safetensors")
    return {key: value for key, value in state.items() if key.endswith((".sensitivity", ".uncertainty"))}


def test_importance_is_that_of_the_whole_step_before_clipping(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """One batch of two, or two of one: the same numbers; clipped to nothing or not at all: the same bits."""
    found = {}
    ways = {
        "one": ("training.batch_size=2", "training.max_grad_norm=0"),
        "two": (
            "training.batch_size=1",
            "training.gradient_accumulation_steps=2",
            "training.max_grad_norm=0",
        ),
        "clipped": ("training.batch_size=2", "training.max_grad_norm=1e-3"),
    }
    for name, words in ways.items():
        more = (*words, "data.packing=false", "training.keep_checkpoints=9")
        run_from_config(config(tiny_dir("llama"), rows, tmp_path / name, *more))
        found[name] = importances(tmp_path / name, 1)
    for key, value in found["one"].items():
        assert torch.equal(value, found["clipped"][key]), key
        torch.testing.assert_close(value, found["two"][key], atol=1e-9, rtol=1e-3)


def test_layers_that_lose_everything_at_once_raise_no_alarm(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """Without the penalty nothing of such a layer has a gradient."""
    words = ["adapter.orthogonal_weight=0", "adapter.initial_steps=0", "adapter.final_steps=7"]
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *words))
    state = load_file(run.directory / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors")
    empty = [key for key, value in state.items() if key.endswith(".kept") and not value.any()]
    assert empty
    assert json.loads((run.directory / "audit.json").read_text())["passed"]


def test_ranks_stay_in_the_recovery_phase(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    words = ["quantization.quant_type=nf4", "training.recovery_steps=3"]
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *words))
    lines = [line for line in read_lines(run.directory / "metrics.jsonl") if "loss" in line]
    assert [line["ranks"] for line in lines[-3:]] == [RANKS] * 3
    assert run.adapter is not None
    written = json.loads((run.adapter / "adapter_config.json").read_text())
    assert sum(map(sum, written["rank_pattern"].values())) == RANKS


def test_a_schedule_without_a_step_to_act_in_is_refused(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    words = ["adapter.initial_steps=5", "adapter.final_steps=3"]
    with pytest.raises(ConfigError, match="of 8 steps the first 5 and the last 3") as caught:
        run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *words))
    assert caught.value.where == "adapter.initial_steps"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_rank", 13),
        ("rank", 0),
        ("beta1", 1.0),
        ("beta2", 0),
        ("allocation_interval", 0),
        ("initial_steps", -1),
        ("total_steps", 0),
        ("orthogonal_weight", -0.1),
        ("rank_pattern", ("q_proj=13",)),
        ("rank_pattern", ("q_proj=1.5",)),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        AdaLoraConfig(**{field: value})
    assert caught.value.where == f"adapter.{field}"
