"""Out of memory in a step: fewer rows at a time with the same gradients, told, and gone on with exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.config import build, read_assignments
from graft.data.loader import Batch, Loader
from graft.data.masking import Sample
from graft.errors import StopRequested, TrainingError
from graft.models.load import load
from graft.runs import RunDirectory, read_lines
from graft.training import loop
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig, TrainingConfig
from graft.training.job import Job
from graft.training.loop import Training
from graft.training.monitors import Silent
from graft.training.splitting import is_out_of_memory, pieces

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError(ALLOCATOR + " to allocate 4 bytes."), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError(ALLOCATOR), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, answer: bool) -> None:
    assert is_out_of_memory(error) is answer


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def batches_of(*lengths: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    samples = [Sample(row, [-100, *row[1:]]) for row in ids]
    return list(Loader(samples, len(samples), 64, packing=False, shuffle=False).epoch(0))


def test_pieces_are_the_batch_in_its_order() -> None:
    (batch,) = batches_of(9, 20, 5, 14, 30)
    for rows in (1, 2, 3, 5, 9):
        cut = list(pieces([batch], rows))
        assert max(len(piece.input_ids) for piece in cut) <= rows
        for name in ("input_ids", "position_ids", "labels"):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in cut]), getattr(batch, name))
        assert sum(piece.num_labelled_tokens for piece in cut) == batch.num_labelled_tokens
    batch.labels[1] = -100
    assert len(list(pieces([batch], 1))) == 4


class Full:
    """Stands for `token_losses`: memory is out where a pass has more than `rows` rows."""

    def __init__(self, rows: int, error: Exception, *, late: bool = False) -> None:
        self.rows, self.error, self.late, self.passes = rows, error, late, list[int]()
        self.real = loop.token_losses

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        count = len(batch.input_ids)
        self.passes.append(count)
        if count > self.rows and not self.late:
            raise self.error
        loss, number = self.real(model, batch)
        if count > self.rows:
            loss.register_hook(self.fail)  # in the backward pass, with gradients of earlier passes there
        return loss, number

    def fail(self, grad: torch.Tensor) -> None:
        raise self.error


def training_on(directory: Path, place: Path, monitor: Any) -> tuple[Training, dict[str, nn.Parameter]]:
    base = load(directory)
    attach(base.model, LoraConfig(rank=4), seed=1)
    parameters = adapter_tensors(base.model)
    for name, parameter in parameters.items():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    samples = [Sample(ids.tolist(), [-100, *ids[1:].tolist()]) for ids in batches_of(*[24] * 8)[0].input_ids]
    loader = Loader(samples, 8, 64, packing=False)
    job = Job(
        base.model, parameters, loader, None, TrainingConfig(max_steps=1), 1e-3, RunDirectory(place), monitor
    )
    return Training(job), parameters


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError(ALLOCATOR)])
def test_a_split_step_has_the_same_loss_and_gradients(
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
    error: Exception,
) -> None:
    found = []
    for rows in (8, 3):
        monitor = Heard()
        training, parameters = training_on(tiny_dir("llama"), tmp_path, monitor)
        full = Full(rows, error, late=late)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "token_losses", full)
            loss = training._accumulate(next(training._steps()))
        found.append((loss, {name: p.grad.clone() for name, p in parameters.items()}))
    assert full.passes == [8, 4, 2, 2, 2, 2]
    assert training.position.splits == [[0, 4], [0, 2]]
    assert json.loads((tmp_path / "splits.json").read_text()) == [[0, 4], [0, 2]]
    assert len(monitor.said) == 2
    assert "8 rows of 24 tokens" in monitor.said[0]
    (whole, expected), (parts, got) = found
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, gradient in expected.items():
        # Sums of float32 in another order.
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-6, name


def test_gradients_of_passes_before_the_failing_one_do_not_count_twice(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rows in (8, 4):
        training, parameters = training_on(tiny_dir("llama"), tmp_path, Silent())
        (batch,) = next(training._steps())
        full = Full(rows, MemoryError())
        with monkeypatch.context() as patch:
            patch.setattr(loop, "token_losses", full)
            training._accumulate([*list(pieces([batch], 2))[:1], batch])
        found.append({name: p.grad.clone() for name, p in parameters.items()})
    assert full.passes == [2, 8, 2, 4, 4]
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 1e-6, name


def test_a_row_that_does_not_fit_ends_the_run_with_the_numbers(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, parameters = training_on(tiny_dir("llama"), tmp_path, Silent())
    monkeypatch.setattr(loop, "token_losses", Full(0, RuntimeError(ALLOCATOR)))
    with pytest.raises(
        TrainingError, match=r"single row of 24 tokens .* MiB were held .*DefaultCPUAllocator"
    ):
        training._accumulate(next(training._steps()))
    assert all(parameter.grad is None for parameter in parameters.values())


def test_another_error_is_not_taken_for_one(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, _ = training_on(tiny_dir("llama"), tmp_path, Silent())
    full = Full(0, RuntimeError("a defect"))
    monkeypatch.setattr(loop, "token_losses", full)
    with pytest.raises(RuntimeError, match="a defect"):
        training._accumulate(next(training._steps()))
    assert full.passes == [8]


def run_config(directory: Path, rows: Path, out: Path) -> RunConfig:
    words = [f"model.name={directory}", f"data.train={rows}", f"output={out}", "data.packing=false"]
    words += ["adapter.rank=4", "adapter.dropout=0.1", "training.batch_size=4", "training.max_steps=6"]
    return build(RunConfig, read_assignments([*words, "training.save_steps=2"]))


class Scarce:
    """Memory is out in the third step, once."""

    def __init__(self) -> None:
        self.real, self.seen = loop.token_losses, 0

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        self.seen += 1
        if self.seen == 3:
            raise MemoryError
        return self.real(model, batch)


@pytest.mark.parametrize("killed", [True, False])
def test_a_resumed_run_splits_at_the_same_step(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_losses", Scarce())
        run_from_config(run_config(tiny_dir("llama"), rows, tmp_path / "whole"))
    last = 3 if killed else 4

    class Stopping(Silent):
        def step(self, record: dict[str, Any], num_tokens: int) -> None:
            if record["step"] == last:
                raise KeyboardInterrupt if killed else StopRequested("now")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_losses", Scarce())
        with pytest.raises((KeyboardInterrupt, StopRequested)):
            run_from_config(run_config(tiny_dir("llama"), rows, tmp_path / "part"), Stopping())
    # Memory is there again, and yet the third step is made as it was made.
    resume(tmp_path / "part")
    names = ("metrics.jsonl", "adapter/adapter_model.safetensors", "splits.json")
    for name in names:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    record = json.loads((tmp_path / "part" / "run.json").read_text())
    assert record["results"]["splits"] == [[2, 2]]
    assert len([line for line in read_lines(tmp_path / "part" / "metrics.jsonl") if "loss" in line]) == 6
