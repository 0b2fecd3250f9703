"""Going on exactly: in other precisions, from a stop inside an evaluation, and what may change between."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.config import build, read_assignments
from graft.data.loader import Batch
from graft.errors import CheckpointError, StopRequested
from graft.training import loop
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training
from graft.training.monitors import Console


@pytest.fixture
def config(tiny_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"add {a} and {b}: ", "completion": f"{a + b}"} for a in range(5) for b in range(5)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(name: str, *more: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / name}"]
        words += ["data.max_length=64", "adapter.rank=4", "training.batch_size=2", "training.max_steps=6"]
        return build(RunConfig, read_assignments([*words, "training.learning_rate=1e-2", *more]))

    return make


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stop_after(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == number:
            interrupt()

    monkeypatch.setattr(Training, "_step", step)


def stopped(made: RunConfig, number: int) -> Path:
    """The directory of a run that was stopped after some steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(number, patch)
        with pytest.raises(StopRequested, match=f"after step {number} of"):
            run_from_config(made)
    torch.manual_seed(999)  # a new process has another random state
    return Path(made.output)


def same_files(one: Path, two: Path, *names: str) -> None:
    for name in ("metrics.jsonl", *names):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


ADAPTER = "adapter/adapter_model.safetensors"


def test_full_fine_tuning_in_bfloat16(config: Callable[..., RunConfig]) -> None:
    more = ("adapter=", "model.dtype=bfloat16", "training.learning_rate=1e-3")
    straight = run_from_config(config("straight", *more))
    record = json.loads((straight.directory / "run.json").read_text())
    assert "matrix products in torch.bfloat16" in record["derived"]["precision"]
    out = stopped(config("stopped", *more), 3)
    resume(out)
    same_files(out, straight.directory, "model/model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "sgd", "lion"])
def test_every_optimizer(optimizer: str, config: Callable[..., RunConfig]) -> None:
    more = (f"training.optimizer={optimizer}", "adapter.rank=128", "training.lora_plus_ratio=4")
    more += ("training.sgd_momentum=0.9",) if optimizer == "sgd" else ()
    straight = run_from_config(config("straight", *more))
    out = stopped(config("stopped", *more), 3)
    resume(out)
    same_files(out, straight.directory, ADAPTER)
    states = [run / "checkpoints" / "step-000006" / "state.safetensors" for run in (out, straight.directory)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_stop_while_an_evaluation_is_under_way(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (f"data.eval={tmp_path / 'rows.jsonl'}", "training.eval_steps=2", "adapter.dropout=0.2")
    more = (*more, "data.packing=false", "training.save_steps=3")
    straight = run_from_config(config("straight", *more))
    real, evaluations, batches_seen = loop.evaluate_loss, [], []

    def evaluate(model: Any, batches: Iterator[Batch]) -> Any:
        evaluations.append(1)

        def interrupted() -> Iterator[Batch]:
            for number, batch in enumerate(batches):
                batches_seen.append(number)
                if len(evaluations) == 2 and number == 1:
                    interrupt()
                yield batch

        return real(model, interrupted())

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_loss", evaluate)
        with pytest.raises(StopRequested, match="after step 4 of"):
            run_from_config(config("stopped", *more))
    assert batches_seen[-1] == 1, "the evaluation ended at the signal, with batches left"
    torch.manual_seed(999)
    resume(tmp_path / "stopped")
    same_files(tmp_path / "stopped", straight.directory, ADAPTER)


@pytest.mark.parametrize(
    "words",
    [
        "cosine min_lr_ratio=0.1",
        "linear",
        "constant warmup_ratio=0.5",
        "cosine_with_restarts num_cycles=2 warmup_steps=2",
        "wsd decay_ratio=0.5 warmup_steps=1",
        "inverse_sqrt warmup_steps=2",
    ],
)
def test_in_the_middle_of_a_schedule(words: str, config: Callable[..., RunConfig]) -> None:
    more = [f"training.{word}" for word in f"lr_scheduler={words}".split()]
    straight = run_from_config(config("straight", *more))
    for stop_at in (1, 4):  # in the warm-up or at its end, and in the second cycle or the decay
        out = stopped(config(f"stopped{stop_at}", *more), stop_at)
        resume(out)
        same_files(out, straight.directory, ADAPTER)


def test_another_schedule_is_refused(config: Callable[..., RunConfig]) -> None:
    out = stopped(config("run", "training.lr_scheduler=wsd"), 2)
    change(out, "training", "decay_ratio", 0.5)
    with pytest.raises(CheckpointError, match=r"training\.decay_ratio was None, is 0\.5"):
        resume(out)


def change(run: Path, section: str, name: str, value: object) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["config"][section][name] != value
    record["config"][section][name] = value
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "packing", False),
        ("data", "max_length", 63),
        ("training", "batch_size", 4),
        ("training", "max_steps", 8),
        ("training", "seed", 1),
        ("adapter", "alpha", 3.0),
        ("adapter", "dropout", 0.5),
    ],
)
def test_changed_settings_are_refused(
    section: str, name: str, value: object, config: Callable[..., RunConfig]
) -> None:
    out = stopped(config("run"), 2)
    before = json.loads((out / "run.json").read_text())["config"][section][name]
    change(out, section, name, value)
    with pytest.raises(CheckpointError, match="settings changed since step-000002") as caught:
        resume(out)
    assert f"{section}.{name} was {before!r}, is {value!r}" in caught.value.what
    change(out, section, name, before)
    resume(out)


def test_packing_switched_on_is_refused(config: Callable[..., RunConfig]) -> None:
    out = stopped(config("run", "data.packing=false"), 2)
    change(out, "data", "packing", True)
    with pytest.raises(CheckpointError, match=r"data\.packing was False, is True"):
        resume(out)


def test_what_is_only_shown_or_kept_may_change(config: Callable[..., RunConfig]) -> None:
    straight = run_from_config(config("straight"))
    out = stopped(config("run", "training.log_steps=5"), 2)
    change(out, "training", "log_steps", 1)
    change(out, "training", "save_steps", 2)
    change(out, "training", "keep_checkpoints", 1)
    shown = io.StringIO()
    resume(out, Console(log_steps=1, stream=shown))
    assert [f"step {n}/6 " in shown.getvalue() for n in range(1, 7)] == [False, False, True, True, True, True]
    same_files(out, straight.directory, ADAPTER)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000006"]


def test_a_checkpoint_of_another_format_is_told(config: Callable[..., RunConfig]) -> None:
    out = stopped(config("run"), 2)
    path = out / "checkpoints" / "step-000002" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    shown = io.StringIO()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        resume(out, Console(stream=shown))
    assert "passed over step-000002: is of format 1, not 3" in shown.getvalue()
