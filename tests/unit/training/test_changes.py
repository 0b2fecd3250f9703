"""What may change on resume: what is named, and nothing else; it is recorded and holds from its step on."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.config import build, read_assignments
from graft.errors import CheckpointError, ConfigError, StopRequested
from graft.runs import read_lines
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training


@pytest.fixture
def config(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(name: str, *more: str) -> RunConfig:
        model = tiny_dir("llama", num_hidden_layers=1)
        words = [f"model.name={model}", f"data.train={rows}", f"output={tmp_path / name}"]
        words += ["data.max_length=64", "data.packing=false", "adapter.rank=4", "training.batch_size=2"]
        words += ["training.max_steps=4", "training.learning_rate=1e-2", "training.save_steps=1"]
        return build(RunConfig, read_assignments([*words, *more]))

    return make


def stopped(made: RunConfig | Path, number: int, **changes: Any) -> Path:
    """The directory of a run that was stopped after some steps."""
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == number:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_step", step)
        go_on = functools.partial(resume, made, **changes) if isinstance(made, Path) else None
        with pytest.raises(StopRequested, match=f"after step {number} of"):
            go_on() if go_on else run_from_config(made)  # type: ignore[arg-type]
    torch.manual_seed(999)
    return made if isinstance(made, Path) else Path(made.output)


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return record


def test_a_change_that_is_not_named_is_refused_with_its_flag(config: Callable[..., RunConfig]) -> None:
    out = stopped(config("run"), 2)
    with pytest.raises(ConfigError, match=r"training\.learning_rate was 0\.01, would be 0\.001") as caught:
        resume(out, settings=read_assignments(["training.learning_rate=1e-3", "adapter.dropout=0.5"]))
    assert "adapter.dropout was 0.0, would be 0.5" in caught.value.what
    flags = "--allow-change training.learning_rate --set training.learning_rate=0.001"
    assert caught.value.fix.endswith(
        f"graft train --resume {out} --allow-change adapter.dropout --set adapter.dropout=0.5 {flags}"
    )
    assert "changes" not in record_of(out)


def test_a_named_change_holds_from_its_step_on_and_is_recorded(config: Callable[..., RunConfig]) -> None:
    straight = run_from_config(config("straight"))
    out = stopped(config("run"), 2)
    given = {"settings": read_assignments(["training.learning_rate=1e-3"])}
    resume(out, **given, allow_changes=["training.learning_rate"])
    rates = [line["learning_rate"] for line in read_lines(out / "metrics.jsonl")]
    before = [line["learning_rate"] for line in read_lines(straight.directory / "metrics.jsonl")]
    assert rates == pytest.approx([*before[:2], *(rate / 10 for rate in before[2:])])
    record = record_of(out)
    change = {"what": "training.learning_rate", "from": 0.01, "to": 0.001, "after_step": 2}
    assert record["changes"] == [change]
    assert record["config"]["training"]["learning_rate"] == 0.001
    run_ids = [
        json.loads((run / "adapter" / "graft.json").read_text())["facts"]["run"]
        for run in (out, straight.directory)
    ]
    assert run_ids[0] != run_ids[1]


def test_a_change_is_not_named_again_after_a_kill(config: Callable[..., RunConfig]) -> None:
    given = {"settings": read_assignments(["training.learning_rate=1e-3"])}
    given |= {"allow_changes": ["training.learning_rate"]}  # type: ignore[dict-item]
    straight = stopped(config("straight"), 2)
    resume(straight, **given)
    out = stopped(config("run"), 2)
    stopped(out, 3, **given)
    (out / "checkpoints" / "step-000003" / "state.json").write_text("{")  # back to where the change was made
    resume(out)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/graft.json"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name


def test_before_the_change_it_must_be_named_again(config: Callable[..., RunConfig]) -> None:
    out = stopped(config("run", "training.keep_checkpoints=3"), 2)
    given = {"settings": read_assignments(["training.learning_rate=1e-3"])}
    stopped(out, 3, **given, allow_changes=["training.learning_rate"])
    for step in (2, 3):
        (out / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"since step-000001: training\.learning_rate was 0\.01, is 0\.001"
    ):
        resume(out)
    resume(out, allow_changes=["training.learning_rate"])
    assert [change["after_step"] for change in record_of(out)["changes"]] == [1]


def test_data_that_changed_is_named(config: Callable[..., RunConfig], rows: Path) -> None:
    out = stopped(config("run"), 2)
    rows.write_text(rows.read_text().replace('"8"', '"9"'))
    with pytest.raises(CheckpointError, match="training data was") as caught:
        resume(out)
    assert caught.value.fix.endswith(f"graft train --resume {out} --allow-change 'training data'")
    resume(out, allow_changes=["training data"])
    assert [change["what"] for change in record_of(out)["changes"]] == ["training data"]
    assert record_of(out)["status"] == "finished"


def test_a_tokenizer_that_changed_is_named(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    import shutil

    made = config("run")
    model = tmp_path / "model"
    shutil.copytree(made.model.name, model)
    out = stopped(config("run", f"model.name={model}"), 2)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="base tokenizer was"):
        resume(out)
    resume(out, allow_changes=["base tokenizer"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("training.learning_rat", "did you mean"),
        ("training.save_steps", "leave it out"),
        ("training.learning_rate", "leave it out, or --set a value"),
    ],
)
def test_names_that_allow_nothing_are_refused(name: str, told: str, config: Callable[..., RunConfig]) -> None:
    out = stopped(config("run"), 2)
    with pytest.raises(ConfigError) as caught:
        resume(out, allow_changes=[name])
    assert told in caught.value.fix
    assert name in caught.value.what


def test_what_changes_nothing_needs_no_name(config: Callable[..., RunConfig]) -> None:
    straight = run_from_config(config("straight"))
    out = stopped(config("run"), 2)
    resume(out, settings=read_assignments(["training.keep_checkpoints=1", "training.log_steps=1"]))
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (straight.directory / name).read_bytes()
    with pytest.raises(ConfigError, match="goes on in its own directory"):
        resume(out, settings=read_assignments(["output=elsewhere"]))


def test_a_finished_run_goes_on_for_more_steps(config: Callable[..., RunConfig]) -> None:
    run = run_from_config(config("run", "training.lr_scheduler=constant"))
    longer = {"settings": read_assignments(["training.max_steps=6"])}
    resume(run.directory, **longer, allow_changes=["training.max_steps"])
    straight = run_from_config(config("straight", "training.lr_scheduler=constant", "training.max_steps=6"))
    name = "adapter/adapter_model.safetensors"
    assert (run.directory / name).read_bytes() == (straight.directory / name).read_bytes()


def test_another_batch_size_goes_on_after_the_rows_that_were_seen(config: Callable[..., RunConfig]) -> None:
    out = stopped(config("run"), 3)
    seen: list[list[list[int]]] = []
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        seen.append(batches[0].sample_ids)
        real(self, batches)

    given = {"settings": read_assignments(["training.batch_size=3"])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_step", step)
        resume(out, **given, allow_changes=["training.batch_size"])
        loader_rows = [row for batch in seen for row in batch]
        seen.clear()
        run_from_config(config("straight", "training.batch_size=3"))
    assert loader_rows == [row for batch in seen[2:3] for row in batch]  # six rows were seen


@pytest.mark.parametrize("name", ["training.optimizer=lion", "adapter.rank=8"])
def test_what_cannot_be_carried_over_is_refused_though_named(
    name: str, config: Callable[..., RunConfig]
) -> None:
    out = stopped(config("run"), 2)
    with pytest.raises(CheckpointError):
        resume(out, settings=read_assignments([name]), allow_changes=[name.partition("=")[0]])
    assert "changes" not in record_of(out)
    resume(out)


def test_a_change_from_the_command_line(
    config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    from graft.cli.main import run

    out = stopped(config("run"), 2)
    words = ["train", "--resume", str(out), "--set", "training.learning_rate=1e-3", "--quiet", "--json"]
    assert run(words) == 2
    told = json.loads(capsys.readouterr().out)["error"]
    flags = told["fix"].partition("graft ")[2].split()
    assert run([*flags, "--quiet", "--json"]) == 0, "the flags that are told do it"
    assert json.loads(capsys.readouterr().out)["metrics"]["steps"] == 4
    assert [change["to"] for change in record_of(out)["changes"]] == [0.001]
