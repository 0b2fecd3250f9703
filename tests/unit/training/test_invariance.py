"""However a step is cut into batches and rows, its loss and its update are the same to 1e-6."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.data.loader import Loader
from graft.data.samples import Sample
from graft.models.load import load
from graft.runs import RunDirectory, read_lines
from graft.training.config import TrainingConfig
from graft.training.job import Job
from graft.training.loop import Training
from graft.training.monitors import Silent

CLOSE = 1e-6
"""Relative, in float32 with its 6e-8: sums of the same products in another order, in one layer with
weights of an ordinary size (0.02). A token that weighs wrongly or sees its neighbour moves both far more."""


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 30, (12,), generator=generator).tolist()
    made = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(ids, [-100, -100, *ids[2:]], f"rows.jsonl:{n}") for n, ids in enumerate(made)]


def one_step(
    model: Path, out: Path, optimizer: str, batch_size: int, accumulation: int, max_length: int, packing: bool
) -> tuple[float, torch.Tensor]:
    """Loss of the first step and what it added to every trained number."""
    base = load(model)
    attach(base.model, LoraConfig(rank=4), seed=1)
    parameters = adapter_tensors(base.model)
    for name in sorted(parameters):
        torch.nn.init.normal_(parameters[name], std=0.1, generator=torch.Generator().manual_seed(len(name)))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    # An epsilon as large as the gradients: AdamW's first update else is a sign, which no tolerance holds.
    extra = {"adam_epsilon": 1e-2} if optimizer == "adamw" else {}
    settings = TrainingConfig(
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optimizer=optimizer,
        warmup_ratio=0.0,  # type: ignore[arg-type]
        lr_scheduler="constant",
        learning_rate=1.0,
        max_grad_norm=0.1,
        audit="none",
        **extra,  # type: ignore[arg-type]
    )
    loader = Loader(samples(), batch_size, max_length, packing, shuffle=False)
    run = RunDirectory.create(out)
    run.write_record({})
    Training(Job(base.model, parameters, loader, None, settings, 1.0, run, Silent())).run()
    change = torch.cat(
        [(parameters[name].detach() - before[name]).flatten().double() for name in sorted(before)]
    )
    return read_lines(run.metrics_path)[0]["loss"], change


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_loss_and_update_of_one_step(optimizer: str, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_dir("llama", num_hidden_layers=1, initializer_range=0.02)
    cuts = {
        "one batch": (12, 1, 32, False),
        "one by one": (1, 12, 32, False),
        "a ragged last batch": (5, 3, 32, False),
        "wider rows": (12, 1, 64, False),
        "packed": (12, 1, 64, True),
        "packed, one row at a time": (1, 12, 64, True),
    }
    found = {
        name: one_step(model, tmp_path / name.replace(" ", "-"), optimizer, *cut)
        for name, cut in cuts.items()
    }
    loss, update = found["one batch"]
    assert update.norm() > 0.01
    for name, (other, change) in found.items():
        assert other == pytest.approx(loss, rel=CLOSE), name
        assert float((change - update).norm() / update.norm()) < CLOSE, name
