"""Runs with every adapter method: audited, stopped and resumed to the same bits, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.adapters.attach import attach
from graft.adapters.attached import fixed_tensors, trained_tensors
from graft.adapters.base import METHODS, config_classes, ships_quantized
from graft.adapters.lora_fa import LoraFaConfig
from graft.adapters.merge import merge
from graft.adapters.vera import VeraConfig
from graft.config import build, read_assignments
from graft.models.load import load, load_tokenizer
from graft.training.build import resume, run_from_config, train
from graft.training.config import RunConfig
from graft.training.loop import Training


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{i}: one and {i} more\n\n" for i in range(8)))
    return path


def config(directory: Path, rows: Path, out: Path, *more: str) -> RunConfig:
    words = [f"model.name={directory}", f"data.train={rows}", f"output={out}", "training.max_steps=3"]
    words += ["training.batch_size=2", "data.max_length=64", "training.save_steps=1", *more]
    return build(RunConfig, read_assignments(words))


def words_of(name: str, directory: Path) -> list[str]:
    """What a method cannot do without: for rows some tokens of the data."""
    if name != "trainable_tokens":
        return []
    return [f"adapter.token_indices={tokens_of(directory)}"]


def tokens_of(directory: Path) -> str:
    found = sorted(set(load_tokenizer(directory)("one and more").input_ids))
    return str(found).replace(" ", "")


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


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        pytest.param(name, quantized, id=f"{name}-{'nf4' if quantized else 'dense'}")
        for name, method in METHODS.items()
        for quantized in (False, True)
        if not (quantized and ships_quantized(method))  # which takes dense bases only
    ],
)
def test_a_run_passes_its_audit_and_resumes_to_the_same_bits(
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    quantized: bool,
) -> None:
    more = [
        f"adapter.method={name}",
        *words_of(name, tiny_dir("llama")),
        *(["quantization.quant_type=nf4"] if quantized else []),
    ]
    resumes_to_the_same_bits(tiny_dir("llama"), rows, tmp_path, monkeypatch, more, quantized=quantized)


def resumes_to_the_same_bits(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    *,
    quantized: bool,
) -> None:
    whole = run_from_config(config(base, rows, tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        kill_before_step(2, patch)
        with pytest.raises(Killed):
            run_from_config(config(base, rows, tmp_path / "killed", *more))
    assert tensors_of(resume(tmp_path / "killed").adapter) == tensors_of(whole.adapter)
    assert whole.adapter is not None
    report = merge(whole.adapter, tmp_path / "merged")
    gap = report.candidate("dequantized").gap if quantized else report.logit_gap
    assert report.adapter_effect > 0
    if not quantized:
        assert gap < 1e-4


EXTRAS = {
    "tokens": ("qwen2", []),
    "biases": ("gpt2", ["adapter.bias=all", "adapter.lora_bias=true"]),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", EXTRAS)
def test_what_trains_beside_lora_does_so_in_a_run(
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    quantized: bool,
) -> None:
    family, more = EXTRAS[name]
    if name == "tokens":
        more = [f"adapter.trainable_token_indices={tokens_of(tiny_dir(family))}"]
    more = [*more, *(["quantization.quant_type=nf4"] if quantized else [])]
    resumes_to_the_same_bits(tiny_dir(family), rows, tmp_path, monkeypatch, more, quantized=quantized)


def test_a_run_of_qa_lora_ends_in_a_model_with_the_codes_of_its_base(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    words = ["adapter.method=qa_lora", "quantization.quant_type=int4", "quantization.blocksize=32"]
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *words, "model.dtype=float32"))
    assert run.adapter is not None
    report = merge(run.adapter, tmp_path / "merged")
    assert report.folded_into == "quantized"
    assert report.logit_gap < 1e-5 < report.adapter_effect
    merged = load(tmp_path / "merged")
    assert merged.quantization is not None
    assert (merged.quantization.quant_type, merged.quantization.blocksize) == ("int4", 32)


@pytest.mark.parametrize("name", ["lora_fa", "vera"])
def test_fixed_tensors_of_a_model_in_memory_come_back_with_the_checkpoint(
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """They follow from a seed that no configuration has, and without them the trained ones mean nothing."""
    made: Any = LoraFaConfig(rank=4) if name == "lora_fa" else VeraConfig(rank=8)

    def start() -> Any:
        base = load(tiny_dir("llama"))
        attach(base.model, made, seed=99)
        with torch.no_grad():
            for tensor in fixed_tensors(base.model).values():
                tensor.mul_(1.25)
        return base

    how: dict[str, Any] = {"data": rows, "batch_size": 2, "max_steps": 3, "save_steps": 1}
    whole = train(start(), output=tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        kill_before_step(2, patch)
        with pytest.raises(Killed):
            train(start(), output=tmp_path / "killed", **how)
    assert tensors_of(resume(tmp_path / "killed").adapter) == tensors_of(whole.adapter)


def test_what_is_frozen_is_neither_trained_nor_counted(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    adapter = attach(model, LoraFaConfig(rank=4))
    assert adapter.num_trainable == sum(tensor.numel() for tensor in trained_tensors(model).values())
    assert all(key.endswith("lora_B.weight") for key in trained_tensors(model))
    assert all(key.endswith("lora_A.weight") for key in fixed_tensors(model))
    assert not any(tensor.requires_grad for tensor in fixed_tensors(model).values())


def test_methods_of_vectors_have_rates_of_their_own(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    import json

    for name in config_classes():
        run = run_from_config(
            config(
                tiny_dir("llama"),
                rows,
                tmp_path / name,
                f"adapter.method={name}",
                *words_of(name, tiny_dir("llama")),
            )
        )
        derived = json.loads((run.directory / "run.json").read_text())["derived"]
        told = " ".join(str(value) for value in derived.values())
        assert ("usual for adapters" in told) == (name not in ("vera", "ia3", "adalora"))
