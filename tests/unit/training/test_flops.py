"""Operations of a step that learns classes or preferences: by the formula, by torch's counter, in a run."""

from __future__ import annotations

import json
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
from graft.data.loader import Batch, Loader
from graft.data.samples import IGNORED, Sample
from graft.evaluate.preferences import PreferenceLoss
from graft.models.classifier import as_classifier
from graft.models.load import load
from graft.runs import read_lines
from graft.training.build import run_from_config
from graft.training.config import RunConfig
from graft.training.flops import step_cost
from graft.training.objectives import Classes, Objective, Preferences

D, FF, LAYERS, VOCABULARY = 32, 64, 2, 264
BLOCKS = LAYERS * (2 * D * D + 2 * D * (D // 2) + 3 * D * FF)
"""Numbers in the matrices of the tiny llama's blocks."""


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (count,), generator=generator).tolist()


def pairs(prompt: int, chosen: int, rejected: int, count: int) -> list[Sample]:
    found = []
    for seed in range(count):
        for number, size in enumerate((chosen, rejected)):
            answer = ids(size, 10 * seed + number)
            found.append(Sample([*ids(prompt, seed), *answer], [IGNORED] * prompt + answer))
    return found


def texts(length: int, count: int, classes: int) -> list[Sample]:
    return [Sample(ids(length, n), [IGNORED] * (length - 1) + [n % classes]) for n in range(count)]


def only_batch(samples: list[Sample], kind: Any, packing: bool) -> Batch:
    (batch,) = Loader(samples, len(samples), 200, packing, kind=kind).epoch(0)
    return batch


def adapted(directory: Path, classes: int = 0) -> tuple[Any, dict[str, Any]]:
    base = load(str(directory))
    if classes:
        as_classifier(base, [str(n) for n in range(classes)])
    saved = ("score",) if classes else ()
    attach(base.model, LoraConfig(rank=4, target_modules="all-linear", modules_to_save=saved))
    return base.model, dict(adapter_tensors(base.model))


def in_factors(parameters: dict[str, Any]) -> int:
    return sum(p.numel() for name, p in parameters.items() if "lora_" in name)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("rho", "recomputed"), [(0, False), (2, True)])
def test_preferences_pass_the_base_too_over_both_answers(
    tiny_dir: Callable[..., Path], packing: bool, rho: int, recomputed: bool
) -> None:
    """(6 + rho) P + 6 V d f + (9 + rho) s q L + 6 Pl: the base adds 2 P, 2 V d f and 2 s q L."""
    model, parameters = adapted(tiny_dir("llama"))
    batch = only_batch(pairs(prompt=7, chosen=5, rejected=9, count=3), "pair", packing)
    tokens, labelled = 3 * (7 + 5 + 7 + 9), 3 * (5 + 9)
    mean_length = tokens / 6
    wanted = tokens * ((6 + rho) * BLOCKS + 6 * in_factors(parameters))
    wanted += tokens * mean_length * (9 + rho) * D * LAYERS + labelled * 6 * VOCABULARY * D
    assert step_cost(model, parameters, recomputed, base_passes=1).of([batch]) == pytest.approx(wanted)


def test_a_classifier_has_a_product_with_its_classes_at_one_token_of_a_text(
    tiny_dir: Callable[..., Path],
) -> None:
    """4 P + 7 s q L + 6 Pl for each token, 6 d k for each text; no product with the vocabulary."""
    model, parameters = adapted(tiny_dir("llama"), classes=3)
    batch = only_batch(texts(length=11, count=4, classes=3), "class", packing=True)
    wanted = 44 * (4 * BLOCKS + 7 * 11 * D * LAYERS + 6 * in_factors(parameters)) + 4 * 6 * D * 3
    assert step_cost(model, parameters, recomputed=False).of([batch]) == pytest.approx(wanted)


def test_a_module_that_trains_in_full_is_in_the_pass_of_the_base_as_it_was(
    tiny_dir: Callable[..., Path],
) -> None:
    base = load(str(tiny_dir("llama")))
    attach(base.model, LoraConfig(rank=4, target_modules=("q_proj",), modules_to_save=("o_proj",)))
    parameters = adapter_tensors(base.model)
    costs = [step_cost(base.model, parameters, False, passes).per_token for passes in (0, 1)]
    assert costs[1] - costs[0] == pytest.approx(2 * BLOCKS)


@pytest.mark.parametrize("kind", ["pair", "class"])
def test_operations_are_those_that_torch_counts(tiny_dir: Callable[..., Path], kind: str) -> None:
    """Torch computes attention in full, not causal, and the gradient of the first block's input."""
    directory = tiny_dir("llama", num_hidden_layers=4, hidden_size=128, intermediate_size=384)
    model, parameters = adapted(directory, classes=0 if kind == "pair" else 3)
    objective: Objective = Preferences(PreferenceLoss()) if kind == "pair" else Classes(3)
    samples = pairs(24, 24, 24, 2) if kind == "pair" else texts(48, 4, 3)
    batch = only_batch(samples, kind, packing=False)
    with FlopCounterMode(display=False) as counter:
        objective.loss(model.train(), batch).backward()
    ours = step_cost(model, parameters, False, objective.base_passes).of([batch])
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


FACTORS = LAYERS * 4 * (2 * (D + D) + 2 * (D + D // 2) + 3 * (D + FF))
"""Numbers in factors of rank 4 on all linears."""


@pytest.mark.parametrize("kind", ["pair", "class"])
def test_a_run_counts_what_it_learns(tiny_dir: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Each byte is a token, and an answer ends with one more."""
    rows = tmp_path / "rows.jsonl"
    answers = {"chosen": "67", "rejected": "8901"}
    lines = [
        {"prompt": f"{n}-45", **answers} if kind == "pair" else {"text": f"{n}-4567", "label": "ab"[n % 2]}
        for n in range(4)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / 'run'}"]
    words += ["adapter.rank=4", "adapter.target_modules=all-linear", "data.packing=false"]
    words += ["training.loss=dpo" if kind == "pair" else "task=classification"]
    words += ["training.max_steps=1", "training.batch_size=4", "training.gradient_checkpointing=false"]
    run = run_from_config(build(RunConfig, read_assignments(words)))
    (line,) = read_lines(run.directory / "timings.jsonl")
    if kind == "pair":
        tokens = 4 * (4 + 3 + 4 + 5)
        wanted = tokens * (6 * BLOCKS + 9 * (tokens / 8) * D * LAYERS + 6 * FACTORS)
        wanted += 4 * (3 + 5) * 6 * VOCABULARY * D
    else:
        tokens = 4 * 6
        wanted = tokens * (4 * BLOCKS + 7 * 6 * D * LAYERS + 6 * FACTORS) + 4 * 6 * D * 2
    assert line["num_tokens"] == tokens
    assert line["flops_per_second"] * line["seconds"] == pytest.approx(wanted)


def test_mlps_in_tiles_are_computed_once_more_and_not_twice(tiny_dir: Callable[..., Path]) -> None:
    model, parameters = adapted(tiny_dir("llama"))
    batch = only_batch(pairs(5, 6, 7, 2), "pair", packing=False)

    def cost(recomputed: bool, tiled: bool) -> float:
        return step_cost(model, parameters, recomputed, tiled=tiled).of([batch])

    mlps = LAYERS * 3 * D * FF
    assert cost(False, True) - cost(False, False) == pytest.approx(2 * mlps * batch.num_tokens)
    assert cost(True, True) == cost(True, False)
