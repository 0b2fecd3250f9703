"""The weights that come with graft: whole, small, and of the shape that the scripts say."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open

import graft

Script = Callable[[str], ModuleType]
PACKAGE = Path(str(resources.files("graft"))) / "builtin"


def test_it_loads_and_its_numbers_are_finite() -> None:
    base = graft.load("builtin")
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 4_000_000
    assert all(torch.isfinite(parameter).all() for parameter in base.model.parameters())


def test_it_is_stored_in_bfloat16_and_stays_small() -> None:
    with safe_open(PACKAGE / "base" / "model.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file()) < 12 << 20


def test_its_shape_and_template_are_those_of_the_scripts(script: Script) -> None:
    config = json.loads((PACKAGE / "base" / "config.json").read_text(encoding="utf-8"))
    shape = script("build").SHAPE
    assert {name: config[name] for name in shape} == shape
    template = (PACKAGE / "base" / "chat_template.jinja").read_text(encoding="utf-8")
    assert template.strip() == script("tokenizer").CHAT_TEMPLATE.strip()


def test_it_has_learned_more_than_the_frequencies_of_pieces() -> None:
    base = graft.load("builtin", dtype="float32")
    text = (
        "She was very much surprised to see that the old man had gone out of the house and into the garden."
    )
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    shuffled = ids[
        :, [0, *(torch.randperm(ids.shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1)]
    ]
    with torch.no_grad():
        losses = [base.model(input_ids=row, labels=row).loss for row in (ids, shuffled)]
    assert losses[0] < losses[1] - 1
