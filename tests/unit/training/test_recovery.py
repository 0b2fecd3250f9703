"""The recovery phase: on which base the adapter is, what is measured, the same bytes after any stop."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.adapters.peft_format import load_adapter
from graft.config import build, read_assignments
from graft.data.config import DataConfig
from graft.data.loader import Loader
from graft.data.prepare import prepare
from graft.errors import ConfigError, StopRequested, TrainingError
from graft.evaluate.loss import evaluate_loss
from graft.models.load import load
from graft.models.quantize import quantize
from graft.quant.linear import quantized_modules
from graft.runs import read_lines
from graft.training import phases
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig, TrainingConfig
from graft.training.loop import Training
from graft.training.recovery import recovery_training

ADAPTER = "adapter/adapter_model.safetensors"
LATER = ("quantization=nf4", "training.recovery_steps=4")


@pytest.fixture
def config(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(name: str, *more: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"data.eval={rows}"]
        words += [f"output={tmp_path / name}", "data.max_length=64", "adapter.rank=4"]
        words += ["training.batch_size=2", "training.max_steps=6", "training.learning_rate=1e-2"]
        return build(RunConfig, read_assignments([*words, *LATER, *more]))

    return make


def loss_of(run: Any, rows: Path, quantization: str | None, adapter: Path) -> float:
    base = load(
        json.loads((run.directory / "run.json").read_text())["config"]["model"]["name"],
        quantization=quantization,
    )
    load_adapter(base.model, adapter)
    data = prepare(str(rows), base.tokenizer, DataConfig(max_length=64))
    return evaluate_loss(base.model, Loader(data.samples, 2, 64, packing=True, shuffle=False).epoch(0)).loss


def test_the_losses_are_those_of_either_base(
    config: Callable[..., RunConfig], rows: Path, tiny_dir: Callable[..., Path]
) -> None:
    run = run_from_config(config("run"))
    assert run.adapter is not None
    only = run_from_config(config("only", "training.recovery_steps=0"))
    assert only.adapter is not None
    found = run.metrics
    assert (found["recovery_start"], found["recovery_steps"], found["steps"]) == (6, 4, 10)
    # What stands at the switch is the run without recovery.
    assert found["eval_loss_quantized"] == pytest.approx(loss_of(only, rows, "nf4", only.adapter), rel=1e-5)
    assert found["eval_loss_dense_before"] == pytest.approx(loss_of(only, rows, None, only.adapter), rel=1e-5)
    assert found["eval_loss_dense_after"] == pytest.approx(loss_of(run, rows, None, run.adapter), rel=1e-5)
    assert found["eval_loss_dense_after"] < found["eval_loss_dense_before"] != found["eval_loss_quantized"]
    side = json.loads((run.adapter / "graft.json").read_text())
    assert side["base"]["quantization"] == ""
    assert json.loads(side["facts"]["recovery"]["trained_before_on"])["quant_type"] == "nf4"
    assert side["facts"]["recovery"]["eval_loss_dense_after"] == found["eval_loss_dense_after"]
    assert side["base"]["weights"] == load(tiny_dir("llama")).fingerprint.weights
    lines = read_lines(run.directory / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    # A tenth of the run's: one step of warm-up, then half a cosine over the three that are left.
    cosine = [(1 + math.cos(math.pi * done / 3)) / 2 for done in range(3)]
    assert rates[6:] == pytest.approx([1e-3, *(1e-3 * share for share in cosine)])
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    for name in ("audit.json", "audit-recovery.json"):
        assert json.loads((run.directory / name).read_text())["passed"]
    assert "eval_loss_dense_after" in (run.directory / "report.html").read_text()


def test_the_model_that_trains_is_dense(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, kinds = Training._step, []

    def step(self: Training, batches: Any) -> None:
        kinds.append(bool(quantized_modules(self.job.model)))
        real(self, batches)

    monkeypatch.setattr(Training, "_step", step)
    run_from_config(config("run"))
    assert kinds == [True] * 6 + [False] * 4


def test_rates_of_groups_fall_with_the_others() -> None:
    config = TrainingConfig(
        learning_rate=1e-3, embedding_learning_rate=1e-4, recovery_steps=5, recovery_learning_rate=1e-5
    )
    phase, rate = recovery_training(config, 1e-3)
    assert (rate, phase.learning_rate, phase.max_steps) == (1e-5, 1e-5, 5)
    assert phase.embedding_learning_rate == pytest.approx(1e-6)


@pytest.mark.parametrize("stop_at", [2, 6, 7, 9])
def test_a_stop_in_either_phase(
    stop_at: int, config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("adapter.dropout=0.2", "training.eval_steps=3", "training.load_best_at_end=true")
    more = (*more, "training.optimizer_memory=40KB") if stop_at == 7 else more
    straight = run_from_config(config("straight", *more))
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(StopRequested):
            run_from_config(config("stopped", *more))
    torch.manual_seed(999)
    resume(tmp_path / "stopped")
    same(tmp_path / "stopped", straight.directory)


def same(one: Path, two: Path) -> None:
    for name in ("metrics.jsonl", ADAPTER, "adapter/graft.json"):
        first, second = (one / name).read_bytes(), (two / name).read_bytes()
        assert first == second, name


@pytest.mark.parametrize("where", ["to_dense_base", "begin_recovery", "after"])
def test_a_kill_between_the_phases(
    where: str, config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_from_config(config("straight"))

    class Killed(Exception):
        pass

    name = "begin_recovery" if where == "after" else where
    real = getattr(phases, name)

    def dies(*args: Any) -> Any:
        if where == "after":
            real(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phases, name, dies)
        with pytest.raises(Killed):
            run_from_config(config("killed"))
    torch.manual_seed(999)
    resume(tmp_path / "killed")
    same(tmp_path / "killed", straight.directory)


def test_the_weights_before_recovery_may_be_the_best(config: Callable[..., RunConfig]) -> None:
    more = ("training.load_best_at_end=true", "training.max_grad_norm=0")
    run = run_from_config(config("run", *more, "training.recovery_learning_rate=3"))
    assert run.metrics["best_eval_step"] == 6
    assert run.metrics["eval_loss_dense_after"] == run.metrics["eval_loss_dense_before"]
    only = run_from_config(config("only", "training.recovery_steps=0", *more))
    assert (run.directory / ADAPTER).read_bytes() == (only.directory / ADAPTER).read_bytes()


def test_it_follows_an_early_stop_and_needs_no_evaluation_data(config: Callable[..., RunConfig]) -> None:
    more = ("training.early_stopping_patience=1", "training.eval_steps=1")
    run = run_from_config(config("run", *more, "training.early_stopping_min_delta=100"))
    assert run.metrics["recovery_start"] < 6
    bare = run_from_config(config("bare", "data.eval="))
    assert bare.metrics["recovery_steps"] == 4
    assert bare.metrics["eval_loss_dense_after"] is None


def test_in_python_the_base_becomes_the_dense_one(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = graft.load(tiny_dir("llama"), quantization="nf4")
    graft.attach(base.model, graft.LoraConfig(rank=4))
    run = graft.train(
        base, data=rows, output=tmp_path / "run", max_steps=3, recovery_steps=2, learning_rate=1e-2
    )
    assert run.metrics["steps"] == 5
    assert base.quantization is None
    assert not quantized_modules(base.model)


@pytest.mark.parametrize(
    "words",
    [
        ("quantization=",),
        ("training.recovery_steps=-1",),
        ("training.recovery_steps=0", "training.recovery_learning_rate=1e-4"),
        ("training.recovery_learning_rate=0",),
        ("training.recovery_learning_rate=.inf",),
    ],
)
def test_what_cannot_act_is_refused(words: tuple[str, ...], config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="recovery"):
        config("run", *words)


def test_a_base_that_is_stored_quantized_is_refused(
    config: Callable[..., RunConfig], tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    quantize(tiny_dir("llama"), "nf4", tmp_path / "packed")
    with pytest.raises(ConfigError, match="no dense base to recover on"):
        run_from_config(config("run", f"model.name={tmp_path / 'packed'}"))
    assert not (tmp_path / "run").exists()


def test_files_that_changed_meanwhile_are_refused(
    config: Callable[..., RunConfig], tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    shutil.copytree(tiny_dir("llama"), tmp_path / "base")
    other = tiny_dir("llama", initializer_range=0.1)
    real = phases.measured

    def swapping(job: Any) -> Any:
        shutil.copy(other / "model.safetensors", tmp_path / "base" / "model.safetensors")
        return real(job)

    monkeypatch.setattr(phases, "measured", swapping)
    with pytest.raises(TrainingError, match=r"the weights of .* are"):
        run_from_config(config("run", f"model.name={tmp_path / 'base'}"))
