"""Figures of a step: operations against torch's own counter, groups, speed, what goes where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.config import build, read_assignments
from graft.data.loader import Batch
from graft.evaluate.loss import token_losses
from graft.models.load import load
from graft.runs import read_lines
from graft.training.build import run_from_config
from graft.training.choices import trained_tensors
from graft.training.config import RunConfig
from graft.training.figures import groups
from graft.training.flops import product_rate, step_cost
from graft.training.groups import Treatment


def batch_of(tokens: int, rows: int, labelled: int) -> Batch:
    ids = torch.randint(3, 200, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -labelled:] = ids[:, -labelled:]
    positions = torch.arange(tokens).expand(rows, tokens)
    return Batch(ids, positions, labels, rows * tokens, rows * labelled, [[n] for n in range(rows)])


def counted(model: Any, batch: Batch) -> float:
    """What torch counts in the forward and backward pass: all products, attention as it is computed."""
    with FlopCounterMode(display=False) as counter:
        loss, _ = token_losses(model, batch)
        loss.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_operations_are_those_that_torch_counts(
    tiny_dir: Callable[..., Path], family: str, method: str
) -> None:
    """Sizes at which matrices rule; what differs is the attention, which torch computes in full, not causal,
    and the gradient of the first block's input, which nobody needs."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384}
    base = load(str(tiny_dir(family, **sizes)))
    adapter = None
    if method == "lora":
        adapter = attach(base.model, LoraConfig(rank=8, target_modules="all-linear"), seed=0)
    parameters = trained_tensors(base.model, adapter)
    batch = batch_of(48, 4, 24)
    ours = step_cost(base.model, parameters, recomputed=False).of([batch])
    torchs = counted(base.model.train(), batch)
    assert ours == pytest.approx(torchs, rel=0.1)


def test_operations_by_the_formula(tiny_dir: Callable[..., Path]) -> None:
    """Field formula: (4 + rho) P + 4 f V d + (7 + rho) s q L + 6 Pl for each token."""
    base = load(str(tiny_dir("llama")))
    adapter = attach(base.model, LoraConfig(rank=4, target_modules="all-linear"), seed=0)
    config = base.model.config
    d, ff, layers, vocabulary = 32, 64, 2, 264
    per_block = 2 * d * d + 2 * d * (d // 2) + 3 * d * ff
    blocks = layers * per_block
    trained = sum(p.numel() for p in adapter_tensors(base.model, adapter.name).values())
    batch = batch_of(40, 2, 10)
    for rho, recomputed in ((0, False), (2, True)):
        found = step_cost(base.model, adapter_tensors(base.model), recomputed).of([batch])
        attention = (7 + rho) * 40 * d * config.num_hidden_layers
        wanted = 80 * ((4 + rho) * blocks + attention + 6 * trained) + 20 * 4 * vocabulary * d
        assert found == pytest.approx(wanted)


def test_blocks_below_the_lowest_adapter_need_no_gradient(tiny_dir: Callable[..., Path]) -> None:
    base = load(str(tiny_dir("llama")))
    attach(base.model, LoraConfig(rank=4, target_modules="all-linear", layers=[1]), seed=0)
    cost = step_cost(base.model, adapter_tensors(base.model), recomputed=False)
    per_block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    trained = sum(p.numel() for p in adapter_tensors(base.model).values())
    assert cost.per_token == pytest.approx((2 + 4) * per_block + 6 * trained)


def test_groups_are_those_of_the_optimizer_split_by_rate() -> None:
    treated = {
        "a": Treatment(group="lora_A"),
        "b": Treatment(group="lora_A"),
        "c": Treatment(group="lora_B", rate=16.0),
        "d": Treatment(group="embedding"),
        "e": Treatment(group="embedding", rate=0.5),
    }
    assert groups(treated) == {
        "lora_A": ["a", "b"],
        "lora_B": ["c"],
        "embedding at 1 of the rate": ["d"],
        "embedding at 0.5 of the rate": ["e"],
    }


def test_the_product_leaves_the_random_stream_alone(tiny_dir: Callable[..., Path]) -> None:
    base = load(str(tiny_dir("llama")))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    found = product_rate(base.model, torch.float32, torch.device("cpu"), 100)
    assert torch.equal(torch.rand(3), wanted)
    assert found.shape == (100, 32, 64)
    assert found.flops_per_second > 0


@pytest.fixture
def run(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> Path:
    words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / 'run'}"]
    words += ["data.max_length=64", "data.packing=false", "adapter.rank=4", "training.batch_size=4"]
    words += ["training.max_steps=5", "training.lora_plus_ratio=4", "training.learning_rate=1e-3"]
    return run_from_config(build(RunConfig, read_assignments(words))).directory


def test_every_figure_is_where_it_belongs(run: Path) -> None:
    metrics, timings = read_lines(run / "metrics.jsonl"), read_lines(run / "timings.jsonl")
    for line in metrics:
        named = line["groups"]
        assert (
            named["lora_B"]["learning_rate"]
            == 4 * line["learning_rate"]
            == 4 * named["lora_A"]["learning_rate"]
        )
        norms = [group["grad_norm"] for group in named.values()]
        assert math.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-5)
        assert not {"seconds", "achieved", "memory_bytes"} & line.keys()
    record = json.loads((run / "run.json").read_text())
    rate = record["speed"]["product_flops_per_second"]
    for line in timings:
        assert line["num_padded_tokens"] >= line["num_tokens"]
        assert line["peak_memory_bytes"] >= line["memory_bytes"] > 0
        assert line["achieved"] == pytest.approx(line["flops_per_second"] / rate, rel=1e-6)
    seconds = sum(line["seconds"] for line in timings[1:])
    wanted = sum(line["num_tokens"] for line in timings[1:]) / seconds
    assert record["speed"]["tokens_per_second"] == pytest.approx(wanted, abs=0.06)
    shares = sum(line["achieved"] * line["seconds"] for line in timings[1:]) / seconds
    assert record["speed"]["achieved"] == pytest.approx(shares, abs=6e-5)
    assert "GFLOP/s in products" in record["derived"]["machine"]
