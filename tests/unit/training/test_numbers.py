"""Numbers that go wrong: float16, spikes, weights that are not finite, operations without one order."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from graft.config import build, read_assignments
from graft.errors import AdapterError, CheckpointError, ConfigError, TrainingError
from graft.models.load import load
from graft.runs import read_lines
from graft.training import loop, phases
from graft.training.build import resume, run_from_config, train
from graft.training.config import RunConfig, TrainingConfig
from graft.training.loop import Training
from graft.training.random_state import random_state, restore_random_state, seed_all
from graft.training.scaling import CEILING, FLOOR, PATIENCE, LossScale
from graft.training.spikes import LEAST, WINDOW, spike

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def config(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(name: str, *more: str) -> RunConfig:
        model = tiny_dir("llama", num_hidden_layers=1)
        words = [f"model.name={model}", f"data.train={rows}", f"output={tmp_path / name}"]
        words += ["data.max_length=64", "data.packing=false", "training.batch_size=2"]
        words += ["training.max_steps=4", "training.learning_rate=1e-2", "training.save_steps=2"]
        words += [] if "adapter=" in more else ["adapter.rank=4"]
        return build(RunConfig, read_assignments([*words, *more]))

    return make


def after_step(number: int, act: Callable[[Training], Any], patch: pytest.MonkeyPatch) -> None:
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == number:
            act(self)

    patch.setattr(Training, "_step", step)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


# float16.


def test_the_scale_follows_its_rule() -> None:
    scale = LossScale(4.0)
    assert scale.after(math.nan, applied=False) is None, "no factor mends a loss that is not finite"
    assert scale.factor == 4.0
    assert "loss scale of 4" in str(scale.after(1.0, applied=False))
    assert "loss scale of 2" in str(scale.after(1.0, applied=False))
    assert scale.factor == FLOOR
    assert scale.after(1.0, applied=False) is None, "at the floor a bad step is a bad step"
    for _ in range(PATIENCE):
        assert scale.after(1.0, applied=True) is None
    assert (scale.factor, scale.num_good) == (2 * FLOOR, 0)
    top = LossScale(CEILING, PATIENCE)
    top.after(1.0, applied=True)
    assert top.factor == CEILING


@pytest.mark.parametrize("more", [(), ("quantization=nf4",), ("adapter=", "training.learning_rate=1e-4")])
def test_float16_trains_as_float32_does(more: tuple[str, ...], config: Callable[..., RunConfig]) -> None:
    wanted = losses(run_from_config(config("float32", *more)).directory)
    run = run_from_config(config("float16", "model.dtype=float16", *more))
    found = losses(run.directory)
    # float16 rounds to 2**-11 of a value; what a step that overflowed does not do is small in so few steps.
    assert found[0] == pytest.approx(wanted[0], rel=2**-11)
    assert found == pytest.approx(wanted, rel=2**-6 if "adapter=" in more else 2**-9)
    still = losses(
        run_from_config(
            config("still", *more, "training.learning_rate=1e-30", "training.audit=none")
        ).directory
    )
    assert found[-1] < still[-1], "the same batch, by a model that did not move"
    lines = read_lines(run.directory / "metrics.jsonl")
    assert all(line["loss_scale"] in (2.0**16, 2.0**15) for line in lines if "loss" in line)
    if run.adapter:
        tensors = load_file(run.adapter / "adapter_model.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_small_gradients_need_the_scale(config: Callable[..., RunConfig]) -> None:
    norms = []
    for factor in (1.0, 2.0**16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "token_losses", _made_small(loop.token_losses))
            patch.setattr(LossScale.__init__, "__defaults__", (factor, 0))
            run = run_from_config(config(f"scale{factor}", "model.dtype=float16", "training.audit=none"))
        norms.append(read_lines(run.directory / "metrics.jsonl")[0]["grad_norm"])
    assert norms[1] > 0
    assert abs(norms[0] / norms[1] - 1) > 0.1, "without it, most of the gradient is lost"


def _made_small(real: Any) -> Any:
    def token_losses(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        loss, count = real(model, batch)
        return loss * 2.0**-22, count

    return token_losses


def test_an_overflow_lowers_the_scale_and_is_not_bad(config: Callable[..., RunConfig]) -> None:
    huge = LossScale(2.0**40)

    def oversized(training: Training) -> None:
        training.position.scale.factor = huge.factor

    with pytest.MonkeyPatch.context() as patch:
        after_step(1, oversized, patch)
        more = ("model.dtype=float16", "training.max_steps=40", "training.max_nonfinite_steps=2")
        run = run_from_config(config("run", *more))
    lines = read_lines(run.directory / "metrics.jsonl")
    lowered = [line for line in lines if "overflowed at a loss scale" in line.get("skipped", "")]
    assert len(lowered) > 2, "more in a row than bad steps may be"
    assert "loss scale of 1.09951e+12" in lowered[0]["skipped"]
    assert run.metrics["overflow_steps"] == len(lowered)
    assert run.metrics["skipped_steps"] == 0
    assert "samples" not in lowered[0]


def test_the_scale_is_in_the_checkpoint(config: Callable[..., RunConfig]) -> None:
    more = ("adapter=", "model.dtype=float16", "training.learning_rate=1e-3")
    straight = run_from_config(config("straight", *more))
    made = config("run", *more)
    with pytest.MonkeyPatch.context() as patch:
        after_step(3, _die, patch)
        with pytest.raises(ZeroDivisionError):
            run_from_config(made)
    resume(made.output)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (Path(made.output) / name).read_bytes() == (straight.directory / name).read_bytes()
    state = json.loads((straight.directory / "checkpoints/step-000004/state.json").read_text())
    lines = read_lines(straight.directory / "metrics.jsonl")
    assert state["position"]["scale"]["factor"] == lines[-1]["loss_scale"]


def _die(training: Training) -> None:
    raise ZeroDivisionError


# Spikes.


def test_a_spike_is_measured_by_median_and_spread() -> None:
    generator = random.Random(0)
    recent = [2.0 + 0.1 * generator.gauss(0, 1) for _ in range(WINDOW)]
    middle = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in recent)
    assert spike(middle + 5.9 * spread, list(recent), 6.0) is None
    found = spike(middle + 6.1 * spread, recent, 6.0)
    assert found == {"median": middle, "deviations": pytest.approx(6.1)}
    assert len(recent) == WINDOW
    assert spike(100.0, list(recent), None) is None
    assert spike(100.0, [1.0] * (LEAST - 1), 6.0) is None
    assert spike(1.02, [1.0] * LEAST, 6.0) is None, "the unit is at least a hundredth of the median"


def test_a_spike_is_logged_with_its_samples(
    config: Callable[..., RunConfig], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.write_text(rows.read_text() + json.dumps({"prompt": "add 1 and 1: ", "completion": "ZZZZ"}) + "\n")
    real = loop.token_losses

    def far(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        loss, count = real(model, batch)
        return (loss * 20 if batch.sample_ids == [[30]] else loss), count

    monkeypatch.setattr(loop, "token_losses", far)
    more = ("training.max_steps=62", "training.batch_size=1")
    straight = run_from_config(config("straight", *more))
    spikes = [line for line in read_lines(straight.directory / "metrics.jsonl") if "spike" in line]
    assert ["rows.jsonl:31"] in [line["samples"] for line in spikes]
    made = config("run", *more)
    with monkeypatch.context() as patch:
        after_step(spikes[-1]["step"] - 1, _die, patch)
        with pytest.raises(ZeroDivisionError):
            run_from_config(made)
    resume(made.output)
    log = (Path(made.output) / "metrics.jsonl").read_bytes()
    assert log == (straight.directory / "metrics.jsonl").read_bytes()


def test_a_step_that_was_not_applied_names_its_samples(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.token_losses, []

    def poisoned(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        loss, count = real(model, batch)
        calls.append(batch.sample_ids)
        return (loss * math.nan if len(calls) == 2 else loss), count

    monkeypatch.setattr(loop, "token_losses", poisoned)
    run = run_from_config(config("run"))
    lines = read_lines(run.directory / "metrics.jsonl")
    assert lines[1]["samples"] == [f"rows.jsonl:{index + 1}" for row in calls[1] for index in row]
    assert "samples" not in lines[0]


# Weights that are not finite.


def poison(training: Training) -> None:
    next(iter(training.job.parameters.values())).data.view(-1)[0] = math.inf


@pytest.mark.parametrize("more", [(), ("adapter=",)])
def test_weights_that_are_not_finite_are_never_saved(
    more: tuple[str, ...], config: Callable[..., RunConfig]
) -> None:
    made = config("run", "training.save_steps=1", *more)
    out = Path(made.output)
    with pytest.MonkeyPatch.context() as patch:
        after_step(3, poison, patch)
        with pytest.raises(TrainingError, match="holds NaN or infinite values") as caught:
            run_from_config(made)
    assert "checkpoint step-000002 stands" in caught.value.where
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    run = resume(out)
    assert run.metrics["steps"] == 4


@pytest.mark.parametrize("more", [(), ("adapter=",)])
def test_a_result_poisoned_after_the_last_step_is_not_written(
    more: tuple[str, ...], config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config("run", *more)
    out, real = Path(made.output), phases.use_best

    def poisoned(job: Any, *rest: Any) -> str:
        next(iter(job.parameters.values())).data.view(-1)[0] = math.nan
        return real(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(phases, "use_best", poisoned)
        with pytest.raises((AdapterError, TrainingError), match="NaN|not finite|infinite"):
            run_from_config(made)
    assert not (out / "adapter").exists()
    assert not (out / "model").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    resume(out)
    assert (out / ("model" if more else "adapter")).is_dir()


def test_a_model_beyond_float16_is_not_written_in_it(
    config: Callable[..., RunConfig], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(config("run").model.name, dtype="float16")
    real = phases.use_best

    def enlarged(job: Any, *rest: Any) -> str:
        next(iter(job.parameters.values())).data.view(-1)[0] = 1e5
        return real(job, *rest)

    monkeypatch.setattr(phases, "use_best", enlarged)
    with pytest.raises(TrainingError, match="NaN or infinite"):
        train(base, data=rows, output=tmp_path / "run", max_steps=2, learning_rate=1e-4)
    assert not (tmp_path / "run" / "model").exists()


# One order.


def test_deterministic_runs_have_the_same_bits_and_leave_torch_as_it_was(
    config: Callable[..., RunConfig],
) -> None:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        after_step(1, lambda _: seen.append(torch.are_deterministic_algorithms_enabled()), patch)
        runs = [
            run_from_config(config(name, "training.deterministic=true", "adapter.dropout=0.2"))
            for name in ("one", "two")
        ]
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    one, two = [(run.directory / ADAPTER).read_bytes() for run in runs]
    assert one == two


def test_an_operation_without_one_order_is_refused_by_its_name(config: Callable[..., RunConfig]) -> None:
    real = loop.token_losses

    def unordered(model: Any, batch: Any) -> Any:
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))  # which of the two stays?
        return real(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "token_losses", unordered)
        with pytest.raises(TrainingError, match="put_ has no deterministic form") as caught:
            run_from_config(config("run", "training.deterministic=true"))
        assert caught.value.where == "training.deterministic"
        assert not torch.are_deterministic_algorithms_enabled()
        run_from_config(config("other"))


def test_a_deterministic_run_keeps_its_threads(config: Callable[..., RunConfig]) -> None:
    made = config("run", "training.deterministic=true")
    with pytest.MonkeyPatch.context() as patch:
        after_step(3, _die, patch)
        with pytest.raises(ZeroDivisionError):
            run_from_config(made)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(CheckpointError, match=f"{before + 1} threads now, {before} before"):
            resume(made.output)
    finally:
        torch.set_num_threads(before)
    resume(made.output)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_thresholds_out_of_range(value: float) -> None:
    with pytest.raises(ConfigError, match="loss_spike_threshold"):
        TrainingConfig(loss_spike_threshold=value)


# Random numbers.


def test_every_stream_goes_on_where_it_was() -> None:
    def draw() -> list[float]:
        torch_draw = torch.rand(3).tolist() + torch.randn(3).tolist()
        return [*torch_draw, random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn()]

    seed_all(2**63 - 1)
    draw()
    stored = random_state()
    wanted = draw()
    seed_all(5)
    random.gauss(0, 1)
    restore_random_state({name: value.clone() for name, value in stored.items()})
    assert draw() == wanted


def test_a_forward_pass_that_draws_from_python_and_numpy_resumes_exactly(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.token_losses

    def layer_drop(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        loss, count = real(model, batch)
        return loss * (0.5 + random.random() + numpy.random.rand()), count

    monkeypatch.setattr(loop, "token_losses", layer_drop)
    straight = run_from_config(config("straight"))
    made = config("run")
    with monkeypatch.context() as patch:
        after_step(3, _die, patch)
        with pytest.raises(ZeroDivisionError):
            run_from_config(made)
    random.seed()
    numpy.random.seed(1)
    resume(made.output)
    for name in ("metrics.jsonl", ADAPTER):
        assert (Path(made.output) / name).read_bytes() == (straight.directory / name).read_bytes()
