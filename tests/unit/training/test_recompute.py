"""Gradient checkpointing: the same bits, less kept, and no product made again that nobody needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.config import build, read_assignments
from graft.data.loader import Batch, Loader
from graft.data.masking import Sample
from graft.errors import ConfigError
from graft.evaluate.loss import token_losses
from graft.models.load import load
from graft.models.recipes import Kept
from graft.training.config import RunConfig
from graft.training.recompute import every, recomputed


def make_batch(packing: bool) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (30, 9, 20, 31)]
    return next(
        Loader([Sample(row, [-100, *row[1:]]) for row in ids], 4, 40, packing, shuffle=False).epoch(0)
    )


def model_of(kind: str, directory: Path, dtype: str) -> tuple[Any, dict[str, nn.Parameter]]:
    base = load(directory, dtype=dtype, quantization="nf4" if kind == "qlora" else None)
    if kind == "full":
        base.model.requires_grad_(True)
        return base.model.train(), dict(base.model.named_parameters())
    attach(base.model, LoraConfig(rank=4, dropout=0.2), seed=1)
    for parameter in adapter_tensors(base.model).values():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    return base.model.train(), adapter_tensors(base.model)


def gradients(model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch) -> list[torch.Tensor]:
    torch.manual_seed(5)
    loss, _ = token_losses(model, batch)
    loss.backward()
    after = torch.rand(1)  # the stream of random numbers stands where it stood
    found = [loss.detach(), after, *(p.grad.clone() for p in parameters.values() if p.grad is not None)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
@pytest.mark.parametrize("choice", ["full", 2])
def test_same_bits(tiny_dir: Callable[..., Path], kind: str, packing: bool, choice: str | int) -> None:
    directory = tiny_dir("llama", num_hidden_layers=4)
    model, parameters = model_of(kind, directory, "float32" if kind == "full" else "bfloat16")
    plain = gradients(model, parameters, make_batch(packing))
    with recomputed(model, choice, Kept()) as count:
        assert count == (4 if choice == "full" else 2)
        found = gradients(model, parameters, make_batch(packing))
    assert len(found) == len(parameters) + 2
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "qwen3", "phi3"])
def test_same_bits_on_other_families(tiny_dir: Callable[..., Path], family: str) -> None:
    model, parameters = model_of("lora", tiny_dir(family), "float32")
    plain = gradients(model, parameters, make_batch(packing=True))
    with recomputed(model, True, Kept()) as count:
        assert count == 2
        found = gradients(model, parameters, make_batch(packing=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert not any("gradient_checkpointing" in vars(m) for m in model.modules() if m is not model.base_model)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_last_product_of_a_block_is_not_made_again(
    tiny_dir: Callable[..., Path], quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parameters = model_of("qlora" if quantized else "lora", tiny_dir("llama"), "float32")
    made: Counter[str] = Counter()
    for path, module in model.named_modules():
        inner = getattr(module, "base_layer", None)
        if inner is not None:
            count_products(inner, path.rsplit(".", 1)[-1], made, monkeypatch)
    gradients(model, parameters, make_batch(packing=True))
    assert set(made.values()) == {2}  # two blocks, one forward pass
    made.clear()
    with recomputed(model, "full", Kept()):
        gradients(model, parameters, make_batch(packing=True))
    assert made["down_proj"] == 2
    assert {name: made[name] for name in made if name != "down_proj"} == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 4
    )


def count_products(layer: Any, name: str, made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count finished products of one frozen layer."""
    real = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = real(x)
        made[name] += 1  # not reached where the recomputation stopped at what the product saves
        return result

    monkeypatch.setattr(layer, "forward", forward)


def test_inputs_of_blocks_are_all_that_is_kept(tiny_dir: Callable[..., Path]) -> None:
    model, _ = model_of("lora", tiny_dir("llama", num_hidden_layers=6), "float32")
    batch = make_batch(packing=True)
    put: list[torch.Tensor] = []

    class Watched(Kept):
        def put(self, tensor: torch.Tensor) -> Any:
            put.append(tensor)
            return super().put(tensor)

    kept: list[torch.Tensor] = []
    with (
        recomputed(model, "full", Watched()),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        token_losses(model, batch)
    rows, width = batch.input_ids.shape
    assert [tuple(tensor.shape) for tensor in put] == 6 * [(rows, width, 32)]
    own = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    large = [t for t in kept if t.numel() >= rows * width * 32 and t.data_ptr() not in own]
    assert len(large) < 10  # the final norm's and the loss's


@pytest.mark.parametrize(
    ("choice", "number"), [(True, 1), ("full", 1), (False, 0), ("none", 0), (3, 3), (1, 1)]
)
def test_choices(choice: Any, number: int) -> None:
    assert every(choice) == number


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("false", False), ("full", "full"), ("none", "none"), ("2", 2)]
)
def test_the_field_reads(word: str, value: Any) -> None:
    made = build(RunConfig, read_assignments([f"training.gradient_checkpointing={word}"]))
    assert made.training.gradient_checkpointing is value or made.training.gradient_checkpointing == value
    assert type(made.training.gradient_checkpointing) is type(value)


@pytest.mark.parametrize("word", ["0", "-1", "some", "1.5", "null"])
def test_the_field_refuses(word: str) -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        build(RunConfig, read_assignments([f"training.gradient_checkpointing={word}"]))
