"""A whole run against the same run written out plainly: transformers' model, torch's AdamW, the formulas."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from graft.config import build, read_assignments
from graft.data.loader import Batch, Loader
from graft.runs import read_lines
from graft.training.build import run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training

PEAK, STEPS, WARMUP, FLOOR, CLIP = 3e-3, 7, 3, 0.1, 4.0
SAME = 1e-4
"""Sums of float32 in another order, over seven steps of AdamW, whose first steps are as large for small
gradients as for large ones; a wrong rate, weighting or clipping is off by a hundredth or more."""


FLAT = ("constant", "inverse_sqrt")
"""Shapes without a floor."""


def rate(step: int, shape: str) -> float:
    """Linear warm-up that moves in its first step, then from the peak towards the floor."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    fallen = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "cosine_with_restarts": (1 + math.cos(math.pi * (2 * done % 1))) / 2,
        "linear": 1 - done,
        "wsd": 1 - math.sqrt(max(0.0, (step - (STEPS - 3)) / 3)),  # 0.4 of the steps, rounded up
        "constant": 1.0,
        "inverse_sqrt": math.sqrt(WARMUP / step),
    }[shape]
    return PEAK * (FLOOR + (1 - FLOOR) * fallen) if shape not in FLAT else PEAK * fallen


def group_loss(model: Any, batches: list[Batch]) -> torch.Tensor:
    """Mean over all labelled tokens of the batches together."""
    losses = []
    for batch in batches:
        logits = model(input_ids=batch.input_ids).logits[:, :-1]  # padding is at the ends, which nothing sees
        targets = batch.labels[:, 1:]
        losses.append(
            functional.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="none")
        )
    return torch.cat(losses).mean()


def plain_run(directory: Path, loader: Loader, shape: str) -> tuple[list[dict[str, float]], Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight  # rows of other tokens have no gradient against the decay
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim == 1 or p is embedding]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    records: list[dict[str, float]] = []
    num_tokens = 0
    for epoch in itertools.count():
        batches = list(loader.epoch(epoch))
        for begin in range(0, len(batches), 2):
            group = batches[begin : begin + 2]
            loss = group_loss(model, group)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for settings in optimizer.param_groups:
                settings["lr"] = rate(len(records), shape)
            optimizer.step()
            optimizer.zero_grad()
            num_tokens += sum(batch.num_tokens for batch in group)
            records.append(
                {
                    "step": len(records) + 1,
                    "loss": loss.item(),
                    "grad_norm": norm.item(),
                    "learning_rate": rate(len(records), shape),
                    "num_tokens": num_tokens,
                }
            )
            if len(records) == STEPS:
                return records, model
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    "shape", ["cosine", "linear", "constant", "cosine_with_restarts", "wsd", "inverse_sqrt"]
)
def test_a_run_is_what_the_formulas_say(
    shape: str, tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lengths that differ much, and five rows: the third batch of an epoch is alone in its step, and short.
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "p" * n + ": ", "completion": "answer " * n} for n in (1, 2, 4, 6, 7)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / 'run'}"]
    words += ["data.max_length=100", "data.packing=false"]
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": PEAK,
        "lr_scheduler": shape,
        "warmup_steps": WARMUP,
        "min_lr_ratio": 0.0 if shape in FLAT else FLOOR,
        "decay_ratio": 0.4 if shape == "wsd" else "null",
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "max_grad_norm": CLIP,
        "seed": 5,
    }
    words += [f"training.{name}={value}" for name, value in settings.items()]
    loaders: list[Loader] = []
    real = Training.run

    def run(self: Training) -> Any:
        loaders.append(self.job.loader)
        return real(self)

    monkeypatch.setattr(Training, "run", run)
    found = run_from_config(build(RunConfig, read_assignments(words)))
    records, model = plain_run(tiny_dir("llama"), loaders[0], shape)
    norms = [record["grad_norm"] for record in records]
    assert min(norms) < CLIP < max(norms), "some steps are clipped, some are not"
    logged = read_lines(found.directory / "metrics.jsonl")
    assert len(logged) == STEPS
    for ours, plain in zip(logged, records, strict=True):
        assert ours.keys() - plain.keys() <= {"groups"}
        assert {name: ours[name] for name in plain} == pytest.approx(plain, rel=SAME), ours["step"]
    assert found.model is not None
    trained: Any = AutoModelForCausalLM.from_pretrained(found.model, dtype=torch.float32)
    start: Any = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"), dtype=torch.float32)
    ours, plain, before = (each.state_dict() for each in (trained, model, start))
    for name in before:
        moved = float((plain[name] - before[name]).norm())
        assert moved > 0, name
        assert float((ours[name] - plain[name]).norm()) < 1e-2 * moved, name
