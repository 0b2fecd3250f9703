"""The loop: gradients of accumulated batches, what ends it, what it writes, and going on exactly."""

from __future__ import annotations

import json
import math
import os
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.config import build, read_assignments
from graft.data.loader import Loader
from graft.data.masking import Sample
from graft.errors import CheckpointError, DataError, StopRequested, StorageError, TrainingError
from graft.evaluate.loss import token_losses
from graft.models.load import load
from graft.runs import RunDirectory, read_lines
from graft.training.build import resume, run_from_config, train
from graft.training.config import RunConfig, TrainingConfig
from graft.training.job import Job, num_steps
from graft.training.loop import Training
from graft.training.monitors import Silent
from graft.training.schedule import warmup_steps


def samples(count: int, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, 30, (1,), generator=generator))
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        made.append(Sample(ids, [-100, -100, *ids[2:]], "row"))
    return made


def config(model: Path, rows: Path, out: Path, *more: str) -> RunConfig:
    words = [f"model.name={model}", f"data.train={rows}", f"output={out}", "data.max_length=64"]
    words += ["adapter.rank=4", "training.batch_size=2", "training.learning_rate=1e-2", *more]
    return build(RunConfig, read_assignments(words))


def test_experts_wait_for_their_first_token(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    sizes = {"num_local_experts": 12, "num_experts_per_tok": 1, "intermediate_size": 16}
    base = tiny_dir("mixtral", **sizes)
    more = ["quantization=nf4", "training.max_steps=3", "training.batch_size=1", "data.packing=false"]
    run = run_from_config(config(base, rows, tmp_path / "run", *more))
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    moved = [name for name, tensor in tensors.items() if ".experts." in name and tensor.abs().max() > 0]
    assert 0 < len([name for name in moved if "lora_B" in name]) < 2 * 12 * 3  # some had no token at all


def unfinish(run: Path) -> None:
    """As if a kill had come before the record said that the run is finished."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))


CLOSE = 2e-5
"""Sums of float32 in another order, through two layers with large random weights; a wrong weighting of
tokens or a leak between samples is off by a tenth or more."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def gradients(
    model: Any, config: TrainingConfig, loader: Loader, run: RunDirectory
) -> dict[str, torch.Tensor]:
    """Gradients of the first step, as the loop makes them."""
    parameters = adapter_tensors(model)
    training = Training(Job(model, parameters, loader, None, config, 1e-3, run, Silent()))
    training._accumulate(next(training._steps()))
    return {name: p.grad.clone() for name, p in parameters.items()}


@pytest.mark.parametrize("packing", [True, False])
def test_accumulated_gradient_is_that_of_one_batch(
    tiny_dir: Callable[..., Path], tmp_path: Path, packing: bool
) -> None:
    made = samples(12)
    found = []
    for batch_size, accumulation in ((12, 1), (1, 12), (5, 3)):
        base = load(tiny_dir("llama"))
        attach(base.model, LoraConfig(rank=4), seed=1)
        for name, parameter in adapter_tensors(base.model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        loader = Loader(made, batch_size, 40, packing, shuffle=False)
        settings = TrainingConfig(gradient_accumulation_steps=accumulation, max_steps=1)
        run = RunDirectory(tmp_path)
        found.append(gradients(base.model, settings, loader, run))
        base.model.zero_grad()
    whole = found[0]
    for parts in found[1:]:
        for name, gradient in whole.items():
            assert relative_error(parts[name], gradient) < CLOSE, name


def test_packed_loss_and_gradient_equal_unpacked(tiny_dir: Callable[..., Path], tiny_family: str) -> None:
    base = load(tiny_dir(tiny_family))
    attach(base.model, LoraConfig(rank=4), seed=1)
    for parameter in adapter_tensors(base.model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    made, found = samples(9), []
    for packing, batch_size in ((False, 1), (False, 9), (True, 1), (True, 3)):
        total = 0.0
        for batch in Loader(made, batch_size, 64, packing, shuffle=False).epoch(0):
            loss, _ = token_losses(base.model, batch)
            loss.backward()
            total += float(loss.detach())
        parameters = adapter_tensors(base.model)
        found.append((total, {name: p.grad.clone() for name, p in parameters.items()}))
        base.model.zero_grad()
    for total, grads in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-6)
        for name, gradient in found[0][1].items():
            assert relative_error(grads[name], gradient) < CLOSE, name


def test_gradient_checkpointing_changes_nothing(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    weights = []
    for name, value in (("plain", "false"), ("recomputed", "true")):
        out = tmp_path / name
        more = ("training.max_steps=4", "adapter.dropout=0.1", f"training.gradient_checkpointing={value}")
        run_from_config(config(tiny_dir("llama"), rows, out, *more))
        weights.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_loss_falls_and_files_are_there(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    run = run_from_config(
        config(tiny_dir("llama"), rows, tmp_path / "run", f"data.eval={rows}", "training.num_epochs=6")
    )
    lines = read_lines(run.directory / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert len(evals) == 6
    assert evals[-1] < evals[0]
    record = json.loads((run.directory / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["results"]["steps"] == len(losses)
    assert "as asked" in record["derived"]["learning_rate"]
    assert (run.directory / "report.html").read_text().startswith("<!doctype html>")
    assert run.adapter is not None
    side = json.loads((run.adapter / "graft.json").read_text())
    assert side["facts"]["data"] == record["identity"]["training data"]


def test_full_fine_tuning_writes_a_model(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    made = config(tiny_dir("llama"), rows, tmp_path / "run", "adapter=", "training.max_steps=3")
    run = run_from_config(made)
    assert run.model is not None
    before, after = load(tiny_dir("llama")), load(run.model)
    assert after.fingerprint.weights != before.fingerprint.weights
    changed = [
        name
        for (name, a), (_, b) in zip(
            before.model.named_parameters(), after.model.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    ]
    # Rows of the embedding that no text uses stay; every tensor as a whole moved.
    assert len(changed) == len(list(after.model.parameters()))


def test_qlora_leaves_the_codes_alone(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    base = load(tiny_dir("llama"), quantization="nf4")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    attach(base.model, LoraConfig(rank=4))
    train(base, data=rows, output=tmp_path / "run", max_steps=3, learning_rate=1e-2)
    after = {name.replace(".base_layer", ""): value for name, value in base.model.state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    moved = [
        float(p.detach().abs().max()) for name, p in adapter_tensors(base.model).items() if "lora_B" in name
    ]
    assert min(moved) > 0


def test_bfloat16_base_keeps_the_adapter_in_float32(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    made = config(tiny_dir("llama"), rows, tmp_path / "run", "model.dtype=bfloat16", "training.max_steps=3")
    run = run_from_config(made)
    assert run.adapter is not None
    stored = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_stop_and_resume_equal_an_uninterrupted_run(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (
        "training.batch_size=1",
        "training.num_epochs=2",
        "training.gradient_accumulation_steps=2",
        "adapter.dropout=0.2",
        f"data.eval={rows}",
        "training.eval_steps=3",
        "training.save_steps=4",
    )
    straight = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "straight", *more))
    step = Training._step
    for stop_at in (1, 3, 6):
        out = tmp_path / f"stopped{stop_at}"

        def stopping(self: Training, batches: Any, stop_at: int = stop_at) -> None:
            step(self, batches)
            if self.position.step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Training, "_step", stopping)
        with pytest.raises(StopRequested, match=f"after step {stop_at} of") as caught:
            run_from_config(config(tiny_dir("llama"), rows, out, *more))
        assert "--resume" in caught.value.fix
        assert caught.value.exit_code == 3
        monkeypatch.setattr(Training, "_step", step)
        torch.manual_seed(999)  # a new process has another random state; the checkpoint brings the old one
        resumed = resume(out)
        for file in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            assert (out / file).read_bytes() == (straight.directory / file).read_bytes(), (stop_at, file)
        assert resumed.metrics["steps"] == straight.metrics["steps"]


def test_damaged_newest_checkpoint_falls_back(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    more = ("training.max_steps=6", "training.save_steps=2", "training.keep_checkpoints=3")
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *more))
    adapter = (run.directory / "adapter" / "adapter_model.safetensors").read_bytes()
    metrics = (run.directory / "metrics.jsonl").read_bytes()
    newest = run.directory / "checkpoints" / "step-000006" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(bytes(data))
    (run.directory / "checkpoints" / "step-000004" / "state.json").write_text("{")
    unfinish(run.directory)
    told: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            told.append(text)

    resume(run.directory, Listener())
    assert any("passed over step-000006" in line for line in told)
    assert any("passed over step-000004" in line for line in told)
    assert any("goes on after step 2" in line for line in told)
    assert (run.directory / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (run.directory / "metrics.jsonl").read_bytes() == metrics


def test_changed_data_is_refused_on_resume(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", "training.max_steps=2"))
    rows.write_text(rows.read_text().replace('"8"', '"9"'))
    unfinish(run.directory)
    with pytest.raises(CheckpointError, match="training data was"):
        resume(run.directory)


def test_second_process_is_refused(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", "training.max_steps=1"))
    unfinish(run.directory)
    with (
        RunDirectory(run.directory).lock(),
        pytest.raises(CheckpointError, match="is being written by process"),
    ):
        resume(run.directory)


def test_existing_run_is_not_overwritten(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    made = config(tiny_dir("llama"), rows, tmp_path / "run", "training.max_steps=1")
    run_from_config(made)
    with pytest.raises(StorageError, match="holds a run already"):
        run_from_config(made)


def test_nan_never_reaches_the_weights(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graft.training.loop as loop

    real, calls = loop.token_losses, []

    def poisoned(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        loss, count = real(model, batch)
        calls.append(1)
        return (loss * math.nan if len(calls) in (2, 3) else loss), count

    monkeypatch.setattr(loop, "token_losses", poisoned)
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", "training.max_steps=5"))
    lines = read_lines(run.directory / "metrics.jsonl")
    assert [line["loss"] is None for line in lines] == [False, True, True, False, False]
    assert run.metrics["skipped_steps"] == 2
    assert run.adapter is not None
    for tensor in load_file(run.adapter / "adapter_model.safetensors").values():
        assert torch.isfinite(tensor).all()


def test_bad_steps_apart_do_not_add_up(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graft.training.loop as loop

    real, calls = loop.token_losses, []

    def poisoned(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        loss, count = real(model, batch)
        calls.append(1)
        return (loss * math.nan if len(calls) in (1, 2, 4, 5) else loss), count

    monkeypatch.setattr(loop, "token_losses", poisoned)
    more = ("training.max_steps=6", "training.max_nonfinite_steps=3")
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *more))
    assert run.metrics["skipped_steps"] == 4


def test_infinite_gradient_is_not_applied(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graft.training.loop as loop

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * math.inf

    real = loop.token_losses
    monkeypatch.setattr(loop, "token_losses", lambda m, b: (Overflow.apply(real(m, b)[0]), 1))
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        run_from_config(config(tiny_dir("llama"), rows, out, "training.max_nonfinite_steps=3"))
    assert "nothing is saved" in caught.value.where
    assert not (out / "adapter").exists()


def test_early_stopping_keeps_the_best(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graft.training.loop as loop

    planned = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])
    real = loop.evaluate_loss

    def scripted(model: Any, batches: Any) -> Any:
        report = real(model, batches)
        return type(report)(loss=next(planned), perplexity=1.0, num_tokens=report.num_tokens)

    monkeypatch.setattr(loop, "evaluate_loss", scripted)
    run = run_from_config(
        config(
            tiny_dir("llama"),
            rows,
            tmp_path / "run",
            f"data.eval={rows}",
            "training.eval_steps=2",
            "training.max_steps=40",
            "training.early_stopping_patience=3",
            "training.keep_checkpoints=1",
        )
    )
    assert run.metrics["stopped_early"]
    assert run.metrics["steps"] == 10
    assert run.metrics["best_eval_step"] == 4
    best = load_file(run.directory / "checkpoints" / "step-000004" / "state.safetensors")
    assert run.adapter is not None
    stored = load_file(run.adapter / "adapter_model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, best[f"trained|{name.removeprefix('base_model.model.')}"])
    kept = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000010"]


def test_nothing_to_learn_is_told_before_the_model_loads(
    tmp_path: Path, tiny_dir: Callable[..., Path]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "x" * 100, "completion": "y"}) + "\n")
    broken = tmp_path / "model"
    source = tiny_dir("llama")
    broken.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="none of 1 rows can be learned from"):
        run_from_config(config(broken, rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("epochs", "accumulation", "expected"), [(1, 1, 5), (2, 1, 10), (2, 2, 6), (0.5, 1, 3), (1.5, 2, 5)]
)
def test_number_of_steps(epochs: float, accumulation: int, expected: int) -> None:
    loader = Loader(samples(9), 2, 64, packing=False)
    settings = TrainingConfig(num_epochs=epochs, gradient_accumulation_steps=accumulation)
    assert num_steps(loader, settings) == expected


def test_a_run_of_a_billion_epochs_begins_at_once() -> None:
    loader = Loader(samples(9), 2, 64, packing=False)
    settings = TrainingConfig(num_epochs=1e9, gradient_accumulation_steps=2)
    tracemalloc.start()
    try:
        steps = num_steps(loader, settings)
        warmup = warmup_steps(settings, steps)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert steps == 3_000_000_000
    assert warmup == 90_000_000
    assert most < 1_000_000, "bytes: nothing is made for each step or epoch"


def test_a_run_of_a_billion_epochs_steps_and_stops(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training._step

    def stopping(self: Training, batches: Any) -> None:
        step(self, batches)
        if self.position.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Training, "_step", stopping)
    with pytest.raises(StopRequested, match="after step 3 of"):
        run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", "training.num_epochs=1e9"))
