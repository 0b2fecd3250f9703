"""Whole runs with paged state: the same files as without, also when stopped, killed and gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.config import build, read_assignments
from graft.errors import ConfigError, StopRequested, StorageError
from graft.training import state_file
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training

PAGED = "training.optimizer_memory=40KB"
ADAPTER, STATE = "adapter/adapter_model.safetensors", "checkpoints/step-000006/state.safetensors"


@pytest.fixture
def words(tiny_dir: Callable[..., Path], tmp_path: Path, rows: Path) -> Callable[..., list[str]]:
    def make(name: str, *more: str) -> list[str]:
        found = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / name}"]
        found += ["data.max_length=64", "adapter.rank=64", "training.batch_size=2", "training.max_steps=6"]
        return [*found, "training.learning_rate=1e-2", "training.save_steps=3", *more]

    return make


@pytest.fixture
def config(words: Callable[..., list[str]]) -> Callable[..., RunConfig]:
    return lambda name, *more: build(RunConfig, read_assignments(words(name, *more)))


def stopped(made: RunConfig, number: int) -> Path:
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == number:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(StopRequested):
            run_from_config(made)
    torch.manual_seed(999)
    return Path(made.output)


def same_files(one: Path, two: Path) -> None:
    for name in ("metrics.jsonl", ADAPTER, STATE):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "sgd", "lion"])
def test_a_run_writes_the_same_bytes(optimizer: str, config: Callable[..., RunConfig]) -> None:
    more = [f"training.optimizer={optimizer}", "training.lora_plus_ratio=4"]
    more += ["training.sgd_momentum=0.9"] if optimizer == "sgd" else []
    plain = run_from_config(config("plain", *more)).directory
    paged = run_from_config(config("paged", *more, PAGED)).directory
    same_files(plain, paged)
    told = json.loads((paged / "run.json").read_text())["derived"]["optimizer"]
    assert f"the rest in a file in {paged}" in told
    assert not [path for path in paged.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("before", "after"), [(PAGED, "null"), ("training.seed=0", "40KB"), (PAGED, "50KB")])
def test_paging_may_change_when_a_run_goes_on(
    before: str, after: str, config: Callable[..., RunConfig]
) -> None:
    straight = run_from_config(config("straight")).directory
    out = stopped(config("stopped", before), 4)
    record = json.loads((out / "run.json").read_text())
    record["config"]["training"]["optimizer_memory"] = None if after == "null" else after
    (out / "run.json").write_text(json.dumps(record))
    resume(out)
    same_files(out, straight)


def test_a_killed_run_leaves_no_spill_and_goes_on(
    config: Callable[..., RunConfig], words: Callable[..., list[str]], tmp_path: Path
) -> None:
    straight = run_from_config(config("straight")).directory
    code = (
        "import os, signal, sys\n"
        "from graft.config import build, read_assignments\n"
        "from graft.training.build import run_from_config\n"
        "from graft.training.config import RunConfig\n"
        "from graft.training.flat_state import FlatState\n"
        "real, calls = FlatState._work, []\n"
        "def work(self, *given):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 60: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *given)\n"
        "FlatState._work = work\n"
        "run_from_config(build(RunConfig, read_assignments(sys.argv[1:])))\n"
    )
    given = words("killed", PAGED, "training.save_steps=1")
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    out = tmp_path / "killed"
    assert {path.name for path in out.iterdir()} <= {
        "run.json", "metrics.jsonl", "timings.jsonl", "spectra.jsonl", "audit.json", "checkpoints", "lock"
    }  # fmt: skip
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps, "it was killed in the middle"
    assert steps[-1] < "step-000006"
    resume(out)
    same_files(out, straight)


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_to_spill_stops_before_the_first_step(config: Callable[..., RunConfig]) -> None:
    with (
        largest_file(60_000),
        pytest.raises(StorageError, match=r"[\d,]+ bytes were needed; [\d,]+ bytes are free"),
    ):
        run_from_config(config("run", PAGED))


def test_a_budget_that_holds_nothing_stops_before_the_first_step(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"5,000 bytes, and the smallest page takes 32,768"):
        run_from_config(config("run", "training.optimizer_memory=5KB"))


def test_saving_makes_one_tensor_at_a_time(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is made for the file nothing is alive when the next is asked for."""
    import weakref

    made: list[Any] = []
    real = state_file.Pending.__init__

    def watch(self: Any, dtype: Any, shape: Any, load: Callable[[], torch.Tensor]) -> None:
        def loaded() -> torch.Tensor:
            assert all(reference() is None for reference in made[:-1])
            tensor = load()
            made.append(weakref.ref(tensor))
            return tensor

        real(self, dtype, shape, loaded)

    monkeypatch.setattr(state_file.Pending, "__init__", watch)
    run_from_config(config("run", PAGED))
    assert len(made) > 20
