"""Settings of a run that change what it ends with: each is seen to act in the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.config import build, read_assignments
from graft.runs import read_lines
from graft.training import inputs, loop
from graft.training.build import run_from_config
from graft.training.config import RunConfig


@pytest.fixture
def losses(tiny_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., list[float]]:
    """The losses of a short run with these settings."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": f"{i}"}) + "\n" for i in range(8)))

    def run(*words: str) -> list[float]:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        given = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"data.eval={rows}"]
        given += [f"output={out}", "data.max_length=64", "data.shuffle=false", "training.max_steps=2", *words]
        run_from_config(build(RunConfig, read_assignments(given)))
        return [line["loss"] for line in read_lines(out / "metrics.jsonl") if "loss" in line]

    return run


def test_dtype_of_full_fine_tuning(losses: Callable[..., list[float]]) -> None:
    whole, halved = losses("model.dtype=float32"), losses("model.dtype=bfloat16")
    assert whole[0] != halved[0]
    assert halved[0] == pytest.approx(whole[0], rel=0.05)  # eight bits of mantissa, a few layers


def test_seed_decides_the_dropout(
    losses: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = inputs.install
    monkeypatch.setattr(inputs, "install", lambda *what, **how: real(*what, **{**how, "seed": 0}))
    # The same start and order for both seeds; lora_B begins at zero, so dropout is seen in the second loss.
    words = ("adapter.rank=2", "adapter.dropout=0.5", "training.learning_rate=0.1")
    one, again, two = (losses(*words, f"training.seed={seed}") for seed in (1, 1, 2))
    assert one == again
    assert one[0] == two[0]
    assert one[1] != two[1]


@pytest.mark.parametrize(("delta", "steps"), [("0.0", 8), ("0.3", 4)])
def test_what_counts_as_better_decides_when_it_stops(
    delta: str, steps: int, losses: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = iter([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3])
    real = loop.evaluate_loss

    def scripted(model: Any, batches: Any) -> Any:
        report = real(model, batches)
        return type(report)(loss=next(planned), perplexity=1.0, num_tokens=report.num_tokens)

    monkeypatch.setattr(loop, "evaluate_loss", scripted)
    words = ["training.max_steps=8", "training.eval_steps=1", "training.early_stopping_patience=3"]
    # 2.9, 2.8 and 2.7 are less than 0.3 (and a rounding) below 3.0, the best so far.
    if delta != "0.0":
        words.append(f"training.early_stopping_min_delta={delta}01")
    assert len(losses("adapter.rank=2", *words)) == steps
