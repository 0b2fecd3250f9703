"""Runs that learn from preferences: they learn, resume to the same bytes, and refuse what cannot act."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.config import build, read_assignments
from graft.errors import ConfigError, StopRequested
from graft.evaluate.kinds import measure
from graft.runs import read_lines
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def config(tiny_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    rows = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1} or so"}
        for a in range(5)
        for b in range(4)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(name: str, *more: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"data.eval={rows}"]
        words += [f"output={tmp_path / name}", "data.max_length=32", "adapter.rank=4", "training.loss=dpo"]
        words += ["training.batch_size=4", "training.max_steps=6", "training.learning_rate=1e-2"]
        return build(RunConfig, read_assignments([*words, *more]))

    return make


@pytest.mark.parametrize("more", [(), ("data.packing=false",), ("training.loss=ipo",), ("quantization=nf4",)])
def test_the_chosen_answers_gain(more: tuple[str, ...], config: Callable[..., RunConfig]) -> None:
    words = ("training.max_steps=12", "training.gradient_accumulation_steps=2", "training.eval_steps=6")
    run = run_from_config(config("run", *words, *more))
    lines = read_lines(run.directory / "metrics.jsonl")
    steps, evaluations = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    names = ("reward_chosen", "reward_rejected", "reward_margin", "preference_accuracy")
    assert all(name in line for line in steps for name in names)
    # The base is passed without gradients, by other operations: float32 rounds a reward of 0.1 nats apart.
    assert abs(steps[0]["reward_margin"]) < 1e-7, "the first step starts at the base"
    assert evaluations[-1]["eval_loss"] < steps[0]["loss"]
    assert evaluations[-1]["eval_reward_margin"] > 0.0
    assert evaluations[-1]["eval_preference_accuracy"] == 1.0
    audit = json.loads((run.directory / "audit.json").read_text())
    assert audit["passed"]


def test_stop_and_resume_give_the_same_bytes(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("adapter.dropout=0.2", "training.eval_steps=2")
    straight = run_from_config(config("straight", *more))
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(StopRequested):
            run_from_config(config("stopped", *more))
    torch.manual_seed(999)
    resume(tmp_path / "stopped")
    for name in ("metrics.jsonl", ADAPTER):
        assert (tmp_path / "stopped" / name).read_bytes() == (straight.directory / name).read_bytes(), name


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_first_step_loses_what_the_base_itself_would(
    loss: str, packing: str, config: Callable[..., RunConfig]
) -> None:
    """At the base h = 0: dpo loses -log sigmoid(0) a pair, ipo (0 - 1 / (2 beta))^2."""
    words = (f"training.loss={loss}", f"data.packing={packing}", "training.dpo_beta=0.25")
    more = ("training.max_steps=1", "training.gradient_accumulation_steps=2", "data.max_length=16")
    run = run_from_config(config("run", *words, *more))
    first, last = read_lines(run.directory / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2) if loss == "dpo" else (1 / (2 * 0.25)) ** 2, rel=1e-5)
    assert last["eval_loss"] < first["loss"]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_one_step_of_two_batches_is_one_of_a_large_batch(
    packing: str, config: Callable[..., RunConfig]
) -> None:
    words = ("training.max_steps=1", "data.shuffle=false", f"data.packing={packing}", "data.max_length=8")
    more = (("training.batch_size=2", "training.gradient_accumulation_steps=2"), ("training.batch_size=4",))
    firsts = []
    for number, way in enumerate(more):
        run = run_from_config(config(f"run{number}", *words, *way))
        firsts.append(read_lines(run.directory / "metrics.jsonl")[0])
    assert firsts[0]["num_tokens"] == firsts[1]["num_tokens"]
    assert firsts[0]["grad_norm"] == pytest.approx(firsts[1]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("training.dpo_beta=0",), "dpo_beta"),
        (("training.dpo_beta=.nan",), "dpo_beta"),
        (("training.dpo_label_smoothing=0.5",), "dpo_label_smoothing"),
        (("training.loss=ipo", "training.dpo_label_smoothing=0.1"), "dpo_label_smoothing"),
        (("training.loss=cross_entropy", "training.dpo_beta=0.2"), "dpo_beta"),
        (("adapter=",), "loss"),
        (("data.loss_on=all",), "loss_on"),
        (("data.format=messages",), "format"),
        (("task=classification",), "loss"),
    ],
)
def test_what_cannot_act_is_refused(
    words: tuple[str, ...], field: str, config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=field):
        config("run", *words)


def test_evaluation_of_a_file_agrees_with_the_run(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from graft.cli.opening import open_model
    from graft.data.config import DataConfig

    run = run_from_config(config("run"))
    last = read_lines(run.directory / "metrics.jsonl")[-1]
    opened = open_model(None, run.adapter)
    data = DataConfig(max_length=32)
    found = measure(opened.base.model, opened.base.tokenizer, str(tmp_path / "pairs.jsonl"), (), data=data)
    assert found.metrics["preference_accuracy"] == last["eval_preference_accuracy"]
    assert found.metrics["log_ratio_margin"] * 0.1 == pytest.approx(last["eval_reward_margin"], rel=1e-5)
    assert found.num_rows == 20
    with pytest.raises(ConfigError, match="'loss' is not one of preferences"):
        measure(
            opened.base.model,
            opened.base.tokenizer,
            str(tmp_path / "pairs.jsonl"),
            ("preference_accuracy", "loss"),
            data=data,
        )
    bare = open_model(str(config("x").model.name), None).base
    with pytest.raises(ConfigError, match="there is none"):
        measure(bare.model, bare.tokenizer, str(tmp_path / "pairs.jsonl"), (), data=data)
