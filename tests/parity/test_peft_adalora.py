"""AdaLoRA beside PEFT's: the same ranks from the same gradients, files with fewer ranks both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft.models.load as models
from graft.adapters.adalora import AdaLoraConfig, BudgetSchedule
from graft.adapters.attach import adapter_tensors, attach
from graft.adapters.effect import adapted_layers
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.steering import steering_of

pytestmark = [
    # PEFT warns of layers without a rank, and calls transformers by names that will go.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
TARGETS = ("q_proj", "v_proj", "down_proj")
TOLERANCE = 1e-5
STEPS = 12
SCHEDULE = {"initial_steps": 2, "final_steps": 3, "allocation_interval": 2}


def ours(**changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(rank=5, target_rank=2, alpha=7, target_modules=TARGETS, **SCHEDULE, **changes)


def theirs(directory: Path) -> Any:
    from peft import AdaLoraConfig as Theirs
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = Theirs(
        task_type="CAUSAL_LM", init_r=5, target_r=2, lora_alpha=7, target_modules=list(TARGETS), tinit=2,
        tfinal=3, deltaT=2, total_step=STEPS,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return get_peft_model(plain, config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same_steps(mine: Any, other: Any, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same values and gradients on both sides, and what each makes of lora_E after every step."""
    steering = steering_of(mine, STEPS)
    assert steering is not None
    tensors = adapter_tensors(mine)
    twins = {
        key.removeprefix("base_model.model.").replace(".default", ""): p
        for key, p in other.named_parameters()
        if "lora_" in key
    }
    assert tensors.keys() == twins.keys()
    generator = torch.Generator().manual_seed(5)
    found = []
    for step in range(1, steps + 1):
        for key, tensor in tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator)
            with torch.no_grad():
                tensor.add_(0.02 * drawn)
                twins[key].copy_(tensor)
            tensor.grad = 1e-2 * torch.randn(tensor.shape, generator=generator)
            twins[key].grad = tensor.grad.clone()
        steering.before_update(step)
        steering.after_step(step)
        if step == STEPS - SCHEDULE["final_steps"]:
            # PEFT leaves the gradients of the last choice out of it; algorithm 1 of the paper does not.
            other.base_model.rankallocator.update_ipt(other.base_model.model)
        other.base_model.update_and_allocate(step)
        found.append(
            tuple(
                torch.cat([side[key].detach() for key in tensors if "lora_E" in key])
                for side in (tensors, twins)
            )
        )
    return found  # type: ignore[return-value]


def test_the_same_gradients_leave_the_same_ranks(tiny_dir: Callable[..., Path]) -> None:
    base = models.load(tiny_dir("llama"))
    attach(base.model, ours())
    left = []
    for step, (mine, other) in enumerate(same_steps(base.model, theirs(tiny_dir("llama")), STEPS), 1):
        assert torch.equal(mine, other), step
        left.append(int((mine != 0).sum()))
    assert left[1] == 6 * 5
    assert left[-1] == 6 * 2
    assert sorted(set(left), reverse=True) != [30, 12], "ranks go step by step"


def test_the_budget_is_that_of_the_paper_and_of_peft(tiny_dir: Callable[..., Path]) -> None:
    other = theirs(tiny_dir("llama")).base_model.rankallocator
    schedule = BudgetSchedule.of(ours(), {str(i): 5 for i in range(6)}, STEPS)
    for step in range(1, STEPS + 1):
        assert schedule.budget(step) == other.budget_schedule(step)[0]
    # Section 3.3: 72 matrices from 12 to 8 over 3,000 steps, the first 500 and the last 1,500 at rest.
    config = AdaLoraConfig(rank=12, target_rank=8, initial_steps=500, final_steps=1500)
    long = BudgetSchedule.of(config, {str(i): 12 for i in range(72)}, 3000)
    for step in (500, 600, 750, 1000, 1250, 1500, 3000):
        share = min(1.0, max(0.0, (step - 500) / 1000))
        assert long.budget(step) == int(576 + 288 * (1 - share) ** 3)


def test_ranks_left_are_read_both_ways(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """A layer that lost all of its ranks among them."""
    base = models.load(tiny_dir("llama"))
    attach(base.model, ours())
    other = theirs(tiny_dir("llama"))
    same_steps(base.model, other, STEPS)
    layers = adapted_layers(base.model, "default")
    last: Any = layers["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        last.kept.zero_()
        last.lora_E.zero_()
    save_adapter(base.model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sum(sum(ranks) for ranks in written["rank_pattern"].values()) < 12
    assert not any(written["rank_pattern"]["model.layers.1.mlp.down_proj.lora_E"])

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"), dtype=torch.float32)
    read = PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(base.model), logits(read), atol=TOLERANCE, rtol=TOLERANCE)

    other.save_pretrained(tmp_path / "theirs")
    again = models.load(tiny_dir("llama"))
    made = load_adapter(again.model, tmp_path / "theirs")
    assert sum(len(layer.lora_E) for layer in adapted_layers(again.model, "default").values()) == 12
    torch.testing.assert_close(logits(again.model), logits(other), atol=TOLERANCE, rtol=TOLERANCE)
    assert made.config.target_rank == 2

    mine = models.load(tiny_dir("llama"))
    load_adapter(mine.model, tmp_path / "ours", trainable=True)
    # Of fewer ranks sums are made in another order.
    torch.testing.assert_close(logits(mine.model), logits(base.model), atol=TOLERANCE, rtol=TOLERANCE)
    save_adapter(mine.model, tmp_path / "again")
    names = ("adapter_model.safetensors",)
    assert all((tmp_path / "ours" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_saved_as_lora_it_is_the_same_function(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = models.load(tiny_dir("llama"))
    attach(base.model, ours(save_as="lora"))
    same_steps(base.model, theirs(tiny_dir("llama")), STEPS)
    save_adapter(base.model, tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"), dtype=torch.float32)
    read = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    torch.testing.assert_close(logits(base.model), logits(read), atol=TOLERANCE, rtol=TOLERANCE)
    again = models.load(tiny_dir("llama"))
    assert load_adapter(again.model, tmp_path / "a").config.method == "lora"
    torch.testing.assert_close(logits(again.model), logits(base.model), atol=TOLERANCE, rtol=TOLERANCE)


def test_numbers_that_acted_since_the_last_choice_are_saved(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Between two choices a rank without leave may act again; the file has the function as it is."""
    base = models.load(tiny_dir("llama"))
    attach(base.model, dataclasses.replace(ours()))
    same_steps(base.model, theirs(tiny_dir("llama")), 4)
    layer: Any = adapted_layers(base.model, "default")["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        layer.kept.zero_()
        layer.lora_E.fill_(0.5)
    save_adapter(base.model, tmp_path / "a")
    again = models.load(tiny_dir("llama"))
    load_adapter(again.model, tmp_path / "a")
    assert torch.equal(logits(again.model), logits(base.model))
