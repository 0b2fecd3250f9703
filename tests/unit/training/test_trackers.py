"""Trackers: fed from the run's logs, each step once, whatever happens to the run or to them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from graft.config import build, read_assignments
from graft.errors import ConfigError, StopRequested, TrainingError
from graft.runs import RunDirectory, read_lines
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training
from graft.training.trackers import base, feed
from graft.training.trackers.base import TrackedRun, check_names, check_tracker, make_tracker
from graft.training.trackers.points import Points, Tail


class Kept:
    """A tracker that keeps its points in this process, as a server would; may be told to fail."""

    points: ClassVar[list[tuple[int, dict[str, float]]]] = []
    ends: ClassVar[list[str]] = []
    fail_at: ClassVar[set[int]] = set()
    refuses: ClassVar[bool] = False
    slow_seconds: ClassVar[float] = 0.0

    def open(self, run: TrackedRun) -> int:
        if self.refuses:
            raise ConnectionError("no server there")
        type(self).run = run
        return self.points[-1][0] if self.points else 0

    def log(self, step: int, figures: Mapping[str, float], clock_seconds: float) -> None:
        time.sleep(self.slow_seconds)
        if step in self.fail_at:
            self.fail_at.discard(step)
            raise TimeoutError(f"lost at {step}")
        assert clock_seconds > 1.6e9
        self.points.append((step, dict(figures)))

    def close(self, status: str) -> None:
        self.ends.append(status)


OURS = f"{__name__}:Kept"


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(feed, "FIRST_PAUSE_SECONDS", 0.05)
    Kept.points, Kept.ends, Kept.fail_at, Kept.refuses, Kept.slow_seconds = [], [], set(), False, 0.0
    return Kept


def _this_module() -> Any:
    module = type(sys)(__name__)
    module.Kept = Kept  # type: ignore[attr-defined]
    return module


@pytest.fixture
def config(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(name: str, *more: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / name}"]
        words += ["data.max_length=64", "adapter.rank=4", "training.batch_size=2", "training.max_steps=6"]
        words += [f"data.eval={rows}", "training.eval_steps=3", "training.spectrum_steps=2"]
        return build(RunConfig, read_assignments([*words, f"training.trackers=[{OURS!r}]", *more]))

    return make


def check_points(run: Path) -> None:
    """Each step of the log once, in order, with its figures."""
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [step for step, _ in Kept.points] == [line["step"] for line in steps]
    for (_, figures), line in zip(Kept.points, steps, strict=True):
        assert figures["loss"] == line["loss"]
        assert figures["lora_B/grad_norm"] == line["groups"]["lora_B"]["grad_norm"]
        assert {"tokens_per_second", "achieved", "memory_bytes"} <= figures.keys()
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert {step: f["eval_loss"] for step, f in Kept.points if "eval_loss" in f} == evaluations
    spectra = {line["step"] for line in read_lines(run / "spectra.jsonl")}
    assert {step for step, f in Kept.points if "spectrum/effective_rank_mean" in f} == spectra


def test_every_step_once_with_all_its_figures(config: Callable[..., RunConfig]) -> None:
    run = run_from_config(config("run")).directory
    check_points(run)
    assert Kept.ends == ["finished"]
    record = json.loads((run / "run.json").read_text())
    assert record["trackers"] == {OURS: {"last_step": 6, "failure": None}}
    assert Kept.run.id == record["tracking_id"]  # type: ignore[attr-defined]
    assert Kept.run.settings["training.max_steps"] == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_sends_no_step_twice(
    config: Callable[..., RunConfig], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(StopRequested):
            run_from_config(config("run"))
    assert Kept.ends == ["stopped"]
    assert len(Kept.points) <= at
    resume(config("run").output)
    assert Kept.ends == ["stopped", "finished"]
    check_points(Path(config("run").output))


def test_a_tracker_that_has_more_than_the_checkpoint_gets_only_the_rest(
    config: Callable[..., RunConfig],
) -> None:
    """A kill after step 6 with a checkpoint at step 3: the tracker has what will be made again."""
    run = run_from_config(config("run", "training.save_steps=3", "training.keep_checkpoints=9")).directory
    Kept.points[:] = Kept.points[:5]
    for step in (6,):
        for file in (run / "checkpoints" / f"step-{step:06d}").iterdir():
            file.unlink()
        (run / "checkpoints" / f"step-{step:06d}").rmdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    resume(run)
    check_points(run)


def test_a_failure_in_the_middle_is_told_once_and_made_good(
    config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    from graft.training.monitors import Console

    Kept.fail_at = {2, 4}
    run = run_from_config(config("run"), Console()).directory
    check_points(run)
    told = capsys.readouterr().err
    assert told.count("failed after step 1: TimeoutError: lost at 2") == 1
    assert json.loads((run / "run.json").read_text())["trackers"][OURS] == {"last_step": 6, "failure": None}


def test_a_tracker_that_stays_dead_costs_the_run_nothing(config: Callable[..., RunConfig]) -> None:
    Kept.fail_at = set(range(3, 400))

    class Dead(Kept):
        def log(self, step: int, figures: Mapping[str, float], clock_seconds: float) -> None:
            if step >= 3:
                raise TimeoutError("gone")
            super().log(step, figures, clock_seconds)

    sys.modules[__name__].Dead = Dead  # type: ignore[attr-defined]
    name = f"{__name__}:Dead"
    run = run_from_config(config("run", f"training.trackers=[{name!r}]")).directory
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["trackers"][name] == {"last_step": 2, "failure": "TimeoutError: gone"}
    assert "TimeoutError: gone" in (run / "report.html").read_text()


def test_a_slow_tracker_is_waited_for_only_so_long(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(feed.CLOSE_SECONDS, "finished", 0.05)
    Kept.slow_seconds = 0.5
    run = run_from_config(config("run")).directory
    record = json.loads((run / "run.json").read_text())
    assert "did not answer in time" in record["trackers"][OURS]["failure"]


def test_a_new_run_is_refused_without_its_tracker_and_a_resumed_one_is_not(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    Kept.refuses = True
    with pytest.raises(TrainingError, match="no server there"):
        run_from_config(config("refused"))
    Kept.refuses = False
    run = run_from_config(config("run")).directory
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    Kept.refuses = True
    resume(run)
    told = json.loads((run / "run.json").read_text())["trackers"][OURS]["failure"]
    assert told == "ConnectionError: no server there"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["tensorbord"], "did you mean 'tensorboard'"),
        (["nothing_there:Tracker"], "Python finds the package"),
        (["json:Tracker"], "Python finds the package"),
        (["wandb", "wandb"], "leave one out"),
    ],
)
def test_names_that_lead_nowhere(names: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_names(names)
    assert told in str(error.value)


def test_a_missing_package_is_told_before_the_run(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base.PACKAGES, "mlflow", ("no_such_module", "mlflow-skinny", "MlflowTracker"))
    with pytest.raises(ConfigError, match="needs no_such_module") as error:
        run_from_config(config("run", "training.trackers=[mlflow]"))
    assert error.value.fix == "pip install mlflow-skinny"
    assert not Path(config("run").output).exists()


def test_what_is_no_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks open, log or close"):
        make_tracker("collections:OrderedDict")


def test_the_check_for_authors(tmp_path: Path) -> None:
    check_tracker(Kept, tmp_path)

    class Forgets(Kept):
        def open(self, run: TrackedRun) -> int:
            return 7

    with pytest.raises(AssertionError, match="a new run must return 0"):
        check_tracker(Forgets, tmp_path)


def test_tensorboard_files_hold_each_point_once(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboardX.record_writer", reason="tensorboardX is not installed")
    assert reader
    check_tracker(lambda: make_tracker("tensorboard"), tmp_path)
    made = config("run", "training.trackers=[tensorboard]")
    run = run_from_config(made).directory
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    resume(run)
    found = scalars(run / "tensorboard")
    lines = read_lines(run / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in found["loss"]] == [step for step, _ in losses]
    assert [value for _, value in found["loss"]] == pytest.approx([value for _, value in losses])
    assert [step for step, _ in found["eval_loss"]] == [3, 6]
    assert [step for step, _ in found["spectrum/effective_rank_mean"]] == [2, 4, 6]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What event files hold: records of length (8), its checksum (4), an event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_mlflow_goes_on_where_its_history_ends(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    check_tracker(lambda: make_tracker("mlflow"), tmp_path)
    run = run_from_config(config("run", "training.trackers=[mlflow]")).directory
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    resume(run)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("graft").experiment_id
    (found,) = client.search_runs([experiment], f"tags.`graft.id` = '{record['tracking_id']}'")
    assert found.info.status == "FINISHED"
    assert found.data.params["training.max_steps"] == "6"
    history = client.get_metric_history(found.info.run_id, "loss")
    lines = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert [(point.step, point.value) for point in history] == [
        (line["step"], line["loss"]) for line in lines
    ]


def test_wandb_offline_holds_each_row_once(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_from_config(config("run", "training.trackers=[wandb]")).directory
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    resume(run)
    steps = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            row = wandb_internal_pb2.Record.FromString(data).history
            if row.item:
                steps.append(row.step.num)
    assert steps == [1, 2, 3, 4, 5, 6]


def leveldb_records(data: bytes) -> list[bytes]:
    """A log of LevelDB after the 7 bytes of W&B: blocks of 32 KiB; pieces with checksum, length, kind."""
    found, piece, at = [], b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            found.append(piece)
            piece = b""
    return found


def test_a_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b"one\ntwo\nthr")
    assert tail.read() == [b"one", b"two"]
    assert tail.read() == []
    with open(path, "ab") as file:
        file.write(b"ee\n" + b"x" * 5000 + b"\n")
    assert tail.read(1) == [b"three"]
    assert tail.read(1) == [b"x" * 5000]
    assert tail.offset == path.stat().st_size


def test_a_step_waits_for_its_evaluation(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    points = Points(run)
    run.metrics_path.write_text('{"step": 1, "loss": 2.0, "learning_rate": 0.1}\n')
    assert list(points.read()) == []
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 1, "eval_loss": 1.5, "best": true}\n{"step": 2, "loss": null, "skipped": "x"}\n')
    (first,) = points.read()
    assert first.figures == {"loss": 2.0, "learning_rate": 0.1, "eval_loss": 1.5}
    (second,) = points.read(final=True)
    assert second.figures == {"skipped": 1.0}
