"""Runs from every start: audited, stopped and resumed to the same bits, their adapters plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.adapters.attach import adapters_of, attach
from graft.adapters.attached import start_tensors
from graft.adapters.lora import LoraConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter
from graft.config import build, read_assignments
from graft.errors import ConfigError
from graft.models.load import load
from graft.runs import read_lines
from graft.training import inputs
from graft.training.build import resume, run_from_config, train
from graft.training.config import RunConfig
from graft.training.loop import Training
from graft.training.monitors import Silent

INITS = ("orthogonal", "pissa", "olora", "eva", "lora_ga")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{i}: one and {i} more\n\n" for i in range(8)))
    return path


def config(directory: Path, rows: Path, out: Path, *more: str) -> RunConfig:
    words = [f"model.name={directory}", f"data.train={rows}", f"output={out}", "training.max_steps=3"]
    words += ["training.batch_size=2", "data.max_length=64", "training.save_steps=1", "adapter.rank=4", *more]
    return build(RunConfig, read_assignments(words))


class Killed(BaseException):
    """Stands for a kill: nobody handles it."""


def kill_before_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        if self.position.step == number:
            raise Killed
        real(self, batches)

    monkeypatch.setattr(Training, "_step", step)


def tensors_of(adapter: Path | None) -> bytes:
    assert adapter is not None
    return (adapter / "adapter_model.safetensors").read_bytes()


class Told(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


CASES = [
    *(("lora", init, False) for init in INITS if init != "olora"),
    *(("lora", init, True) for init in ("olora", "lora_ga", "loftq")),
    ("dora", "eva", True),
    ("lora_fa", "eva", False),
]


@pytest.mark.parametrize(("method", "init", "quantized"), CASES)
def test_a_run_passes_its_audit_and_resumes_to_the_same_bits(
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    init: str,
    quantized: bool,
) -> None:
    directory = tiny_dir("llama")
    more = [
        f"adapter.method={method}",
        f"adapter.init={init}",
        "training.audit=full",
        "training.learning_rate=1e-2",
    ]
    more += ["quantization.quant_type=nf4"] if quantized else []
    told = Told()
    whole = run_from_config(config(directory, rows, tmp_path / "whole", *more), told)
    assert any(line.startswith(f"init {init}: made in") for line in told.said) == (init != "orthogonal")
    audit = json.loads((whole.directory / "audit.json").read_text())
    assert audit["end"]["base"] == "unchanged"
    with monkeypatch.context() as patch:
        kill_before_step(2, patch)
        with pytest.raises(Killed):
            run_from_config(config(directory, rows, tmp_path / "killed", *more))
    with monkeypatch.context() as patch:  # the start comes from the checkpoint
        patch.setattr("graft.adapters.initializers.principal_factors", None)
        patch.setattr("graft.adapters.starts.make_starts", None)
        patch.setattr(inputs, "passes", None)
        assert tensors_of(resume(tmp_path / "killed").adapter) == tensors_of(whole.adapter)
    if init == "eva":  # without a checkpoint the start is made again
        with monkeypatch.context() as patch:
            kill_before_step(0, patch)
            with pytest.raises(Killed):
                run_from_config(config(directory, rows, tmp_path / "early", *more))
        assert tensors_of(resume(tmp_path / "early").adapter) == tensors_of(whole.adapter)
    assert whole.adapter is not None
    report = merge(whole.adapter, tmp_path / "merged")
    assert report.adapter_effect > 1e-3
    gap = report.candidate("dequantized").gap if quantized else report.logit_gap
    if not quantized:
        assert gap < 1e-4


def test_the_first_loss_is_that_of_the_base_and_what_is_saved_has_the_last_one(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    losses = {}
    for init in ("kaiming", "pissa", "eva", "lora_ga"):
        more = [f"adapter.init={init}", f"data.eval={rows}", "training.eval_steps=3"]
        run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / init, *more))
        lines = read_lines(run.directory / "metrics.jsonl")
        losses[init] = next(line["loss"] for line in lines if "loss" in line)
        last = next(line["eval_loss"] for line in lines if "eval_loss" in line)
        assert run.adapter is not None
        base = load(tiny_dir("llama"))
        load_adapter(base.model, run.adapter)
        again = train_nothing(base, rows, tmp_path / f"{init}-again")
        assert again == pytest.approx(last, abs=1e-4), init
    assert all(loss == pytest.approx(losses["kaiming"], abs=1e-5) for loss in losses.values())


def train_nothing(base: Any, rows: Path, out: Path) -> float:
    from graft.data.config import DataConfig
    from graft.data.loader import Loader
    from graft.data.prepare import prepare
    from graft.evaluate.loss import evaluate_loss

    data = prepare(str(rows), base.tokenizer, DataConfig(max_length=64))
    return evaluate_loss(base.model, Loader(data.samples, 2, 64, packing=True, shuffle=False).epoch(0)).loss


@pytest.mark.parametrize("init", ["pissa", "eva", "lora_ga"])
def test_a_start_in_memory_comes_back_with_the_checkpoint(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
    batches = None if init == "pissa" else [{"input_ids": ids, "labels": ids}]

    def start() -> Any:
        base = load(tiny_dir("llama"))
        attach(base.model, LoraConfig(rank=4, init=init), seed=99, batches=batches)  # type: ignore[arg-type]
        return base

    how: dict[str, Any] = {"data": rows, "batch_size": 2, "max_steps": 3, "save_steps": 1}
    whole = train(start(), output=tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        kill_before_step(2, patch)
        with pytest.raises(Killed):
            train(start(), output=tmp_path / "killed", **how)
    assert tensors_of(resume(tmp_path / "killed").adapter) == tensors_of(whole.adapter)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_recovery_goes_on_from_the_same_start(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    more = [f"adapter.init={init}", "quantization=nf4", "training.recovery_steps=3", f"data.eval={rows}"]
    whole = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        kill_before_step(4, patch)
        with pytest.raises(Killed):
            run_from_config(config(tiny_dir("llama"), rows, tmp_path / "killed", *more))
    assert tensors_of(resume(tmp_path / "killed").adapter) == tensors_of(whole.adapter)
    assert whole.adapter is not None
    base = load(tiny_dir("llama"))
    load_adapter(base.model, whole.adapter)
    assert train_nothing(base, rows, tmp_path) == pytest.approx(
        whole.metrics["eval_loss_dense_after"], abs=1e-4
    )


def test_loftq_has_no_recovery_on_the_dense_base(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    more = ["adapter.init=loftq", "quantization=nf4", "training.recovery_steps=3"]
    with pytest.raises(ConfigError, match="makes up for the rounding"):
        run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()
    first = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "first", *more[:2]))
    assert first.adapter is not None
    base = load(tiny_dir("llama"), quantization="nf4")
    load_adapter(base.model, first.adapter, trainable=True)
    with pytest.raises(ConfigError, match="makes up for the rounding"):
        train(base, data=rows, output=tmp_path / "second", recovery_steps=3)


@pytest.mark.parametrize("loss", ["dpo", "class"])
@pytest.mark.parametrize("init", ["pissa", "eva", "lora_ga"])
def test_starts_serve_other_objectives(
    tiny_dir: Callable[..., Path], tmp_path: Path, init: str, loss: str
) -> None:
    """Preferences are measured from the base under the adapter: the first loss is ln 2."""
    path = tmp_path / "rows.jsonl"
    if loss == "dpo":
        lines = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]
        more = ["training.loss=dpo"]
    else:
        lines = [{"text": f"a text of {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(6)]
        more = ["task=classification"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_from_config(config(tiny_dir("llama"), path, tmp_path / "run", f"adapter.init={init}", *more))
    first = next(line["loss"] for line in read_lines(run.directory / "metrics.jsonl") if "loss" in line)
    if loss == "dpo":
        assert first == pytest.approx(0.693147, abs=1e-4)


def test_what_a_start_takes_is_predicted(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    found = {}
    for init in ("kaiming", "pissa"):
        run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / init, f"adapter.init={init}"))
        found[init] = json.loads((run.directory / "run.json").read_text())["predicted_memory"]
    base = load(tiny_dir("llama"))
    made = attach(base.model, LoraConfig(rank=4, init="pissa"))
    kept = sum(4 * tensor.numel() for tensor in start_tensors(base.model).values())
    assert kept == 4 * made.num_trainable
    assert found["pissa"]["base"] - found["kaiming"]["base"] == kept
    assert found["pissa"]["activations"] > found["kaiming"]["activations"]
    assert adapters_of(base.model)
