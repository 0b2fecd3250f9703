"""Predicted memory: each term by its own formula, and the whole beside what a process really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.kernels.cpu.elementwise import is_compiled
from graft.kernels.wide import is_wide
from graft.models.load import load
from graft.models.recipes import AHEAD_BYTES
from graft.planner import LIBRARIES_BYTES, Shapes, Step, predict, shapes_of

STEP = Step(rows=4, tokens=32)


def shapes(directory: Path, **how: Any) -> Shapes:
    base = load(directory, dtype="bfloat16", **how)
    attach(base.model, LoraConfig(rank=4), seed=1)
    return shapes_of(base.model, adapter_tensors(base.model))


def test_terms_of_a_small_model_are_those_counted_by_hand(tiny_dir: Callable[..., Path]) -> None:
    found = shapes(tiny_dir("llama"))
    width, inner, keys, vocabulary, layers = 32, 64, 16, 264, 2
    linears = 2 * width * width + 2 * width * keys + 3 * width * inner
    rotary = 2 * 4 * 4  # two buffers of float32 frequencies
    assert found.base_bytes == 2 * (layers * (linears + 2 * width) + width + 2 * vocabulary * width) + rotary
    sides = 2 * (width + width) + 2 * (width + keys) + 3 * (width + inner)
    assert found.adapter_numbers == layers * 4 * sides
    terms = predict(found, STEP)
    assert terms.optimizer == 8 * found.adapter_numbers
    assert terms.gradients == terms.adapter == 4 * found.adapter_numbers
    product_bytes = 4 if is_wide(torch.bfloat16, "cpu") else 2
    block = 2 * (2 * width + 2 * width + 2 * keys + 2 * inner) + 4 * 4 + product_bytes * 7 * 4
    assert terms.activations == 4 * 32 * layers * block
    copy_bytes = 0 if is_compiled(torch.empty(1, dtype=torch.bfloat16)) else 4
    assert terms.logits == 4 * 32 * vocabulary * (copy_bytes + 3 * 2)
    assert terms.libraries == LIBRARIES_BYTES
    named = [value for name, value in terms.to_dict().items() if name != "peak_bytes"]
    assert terms.peak_bytes <= sum(named)
    assert "activations" in terms.describe()


def test_codes_count_as_they_are_stored(tiny_dir: Callable[..., Path]) -> None:
    directory = tiny_dir("llama", hidden_size=64, intermediate_size=128)
    dense, packed = shapes(directory), shapes(directory, quantization="nf4")
    base = load(directory, dtype="bfloat16", quantization="nf4")
    own = {id(t): t for t in [*base.model.parameters(), *base.model.buffers()]}.values()
    assert packed.base_bytes == sum(t.numel() * t.element_size() for t in own)
    assert packed.base_bytes < 0.65 * dense.base_bytes
    assert packed.adapter_numbers == dense.adapter_numbers


def test_each_setting_moves_its_own_term(tiny_dir: Callable[..., Path]) -> None:
    found = shapes(tiny_dir("llama", num_hidden_layers=6))
    plain = predict(found, STEP)
    assert predict(found, replace(STEP, optimizer="adamw_8bit")).optimizer < 0.3 * plain.optimizer
    assert predict(found, replace(STEP, optimizer="sgd")).optimizer == 0
    assert predict(found, replace(STEP, optimizer_memory=100)).optimizer == 100
    assert predict(found, replace(STEP, rows=8)).activations == 2 * plain.activations
    assert predict(found, replace(STEP, labelled=0.25)).logits == plain.logits // 4
    kept = [predict(found, replace(STEP, recomputed_every=n)).activations for n in (1, 2, 3, 0)]
    assert kept == sorted(kept)
    assert predict(found, STEP, device_type="cuda").libraries == 0
    tiled = predict(found, replace(STEP, mlp_tile=8))
    inner, layers, tokens = 64, 6, 4 * 32
    product_bytes = 4 if is_wide(torch.bfloat16, "cpu") else 2
    assert plain.activations - tiled.activations == tokens * layers * (2 * 2 * inner + product_bytes * 3 * 4)
    assert tiled.passing == tokens * 32 * 12  # hidden states are the widest now
    away = predict(found, replace(STEP, offloaded=True))
    block = plain.activations // layers
    assert away.activations == block + tokens * layers * (4 * 4 + product_bytes * 7 * 4) + AHEAD_BYTES
    held = predict(found, STEP, held_bytes=found.base_bytes + 4 * found.adapter_numbers + 77)
    assert held == replace(plain, libraries=77, peak_bytes=plain.peak_bytes - LIBRARIES_BYTES + 77)


def test_what_is_trained_whole_counts_once(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    found = shapes_of(model, dict(model.named_parameters()))
    numbers = sum(p.numel() for p in model.parameters())
    assert found.base_numbers_trained == numbers
    assert found.adapter_numbers == 0
    terms = predict(found, STEP)
    assert terms.adapter == 0
    assert terms.gradients == 4 * numbers


def test_shapes_need_no_numbers(tiny_dir: Callable[..., Path]) -> None:
    base = load(tiny_dir("llama"), dtype="bfloat16")
    real = shapes_of(base.model, {})
    empty = shapes_of(base.model.to("meta"), {})
    assert replace(empty, scratch_bytes=0) == replace(real, scratch_bytes=0)


PROGRAM = """
import json, sys
from graft.config import build, read_assignments
from graft.training.build import run_from_config
from graft.training.config import RunConfig
run = run_from_config(build(RunConfig, read_assignments(sys.argv[1:])))
print(json.dumps(run.metrics))
"""


def test_the_prediction_is_near_what_a_process_takes(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = " ".join(f"number {i}" for i in range(120))
    rows.write_text("".join(json.dumps({"text": f"{i}: {text}"}) + "\n" for i in range(16)))
    words = [f"data.train={rows}", f"output={tmp_path / 'run'}", "adapter.rank=8", "data.max_length=256"]
    words += ["training.batch_size=4", "training.max_steps=2", "training.audit=none"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads(done.stdout.splitlines()[-1])
    # Libraries are most of it, and the first step loads more of them.
    assert metrics["predicted_memory_bytes"] == pytest.approx(metrics["peak_memory_bytes"], rel=0.1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["predicted_memory"]["peak_bytes"] == metrics["predicted_memory_bytes"]
    assert "predicted_memory_bytes" in (tmp_path / "run" / "report.html").read_text()
