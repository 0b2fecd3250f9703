"""The initial weights of the built-in base: with the circuit they repeat what they have seen."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

Script = Callable[[str], ModuleType]
PERIOD = 24


@pytest.fixture(scope="module")
def model(script: Script) -> Any:
    torch.manual_seed(3)
    shape = script("build").SHAPE | {"vocab_size": 512}
    return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager")).eval()


def repetition_accuracy(model: Any) -> float:
    """Share of right guesses in rows of random tokens that start again every `PERIOD`."""
    cycles = torch.randint(4, 512, (6, PERIOD), generator=torch.Generator().manual_seed(5))
    rows = cycles.repeat(1, 4)
    with torch.no_grad():
        guesses = model(input_ids=rows).logits.argmax(-1)
    return float((guesses[:, PERIOD + 1 : -1] == rows[:, PERIOD + 2 :]).float().mean())


def test_the_circuit_repeats_what_it_has_seen(script: Script, model: Any) -> None:
    before = repetition_accuracy(model)
    script("circuit").write_induction_circuit(model)
    assert before < 0.1
    assert repetition_accuracy(model) > 0.95


def test_the_heads_look_where_they_should(script: Script, model: Any) -> None:
    circuit = script("circuit")
    rows = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:PERIOD].repeat(1, 2) + 4
    with torch.no_grad():
        attentions = model(input_ids=rows, output_attentions=True).attentions
    layer, head = circuit.PREVIOUS
    after = torch.arange(1, 2 * PERIOD)
    assert attentions[layer][0, head, after, after - 1].mean() > 0.9
    layer, head = circuit.INDUCTION[0]
    again = torch.arange(PERIOD, 2 * PERIOD)
    assert attentions[layer][0, head, again, again - PERIOD + 1].mean() > 0.9
