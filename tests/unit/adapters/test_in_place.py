"""Adapters merged into a model in memory: what is restored, what is refused meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.adapters.attached import base_state, trained_tensors
from graft.adapters.fold import merge_into
from graft.errors import AdapterError

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))

CONFIGS: dict[str, Callable[[], Any]] = {
    "tied embedding": lambda: graft.LoraConfig(rank=3, target_modules=("embed_tokens", "q_proj")),
    "tied head": lambda: graft.LoraConfig(rank=3, target_modules=("lm_head",)),
    "both halves": lambda: graft.DoraConfig(rank=3, target_modules=("lm_head", "embed_tokens")),
    "saved modules": lambda: graft.LoraConfig(rank=2, modules_to_save=("embed_tokens", "norm")),
    "biases": lambda: graft.Ia3Config(target_modules=("k_proj", "v_proj"), feedforward_modules=()),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(directory: Path, config: Any, **how: Any) -> Any:
    model = graft.load(directory, **how).model
    graft.attach(model, config)
    shake(model, "default", 2)
    return model


def shake(model: Any, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in trained_tensors(model, name).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_tied_saved_or_a_bias_comes_back(tiny_dir: Callable[..., Path], case: str) -> None:
    model = adapted(tiny_dir("qwen2"), CONFIGS[case]())
    before = {key: tensor.clone() for key, tensor in base_state(model)}
    live = logits(model)
    graft.merge_in_place(model)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    untied = case != "biases"
    assert model.config.tie_word_embeddings != untied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) != untied
    graft.unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_state(model))
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), live)
    graft.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_subtracting_would_not_restore_the_base(tiny_dir: Callable[..., Path]) -> None:
    """The trap that keeping the base's own parameters avoids is real on this very model."""
    model = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4, alpha=8), dtype="bfloat16")
    layer = model.model.layers[0].mlp.down_proj
    own = layer.base_layer.weight.clone()
    with torch.no_grad():
        update = layer.adapters["default"].merged_weight(layer.base, own.float()) - own.float()
    graft.merge_in_place(model)
    subtracted = (layer.base_layer.weight.float() - update).to(own.dtype)
    assert not torch.equal(subtracted, own)
    graft.unmerge(model)
    assert torch.equal(layer.base_layer.weight, own)


def test_merging_and_unmerging_again_changes_nothing_more(tiny_dir: Callable[..., Path]) -> None:
    model = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4))
    graft.merge_in_place(model)
    merged = {key: tensor.clone() for key, tensor in base_state(model)}
    with pytest.raises(AdapterError, match="already merged"):
        graft.merge_in_place(model)
    assert all(torch.equal(tensor, merged[key]) for key, tensor in base_state(model))
    graft.unmerge(model)
    with pytest.raises(AdapterError, match="no adapter is merged"):
        graft.unmerge(model)
    graft.merge_in_place(model)
    assert all(torch.equal(tensor, merged[key]) for key, tensor in base_state(model))


REFUSED: dict[str, Callable[[Any, Path], Any]] = {
    "disabled": lambda model, path: graft.disabled(model).__enter__(),
    "set_active": lambda model, path: graft.set_active(model, None),
    "attach": lambda model, path: graft.attach(model, graft.LoraConfig(), "second"),
    "load_adapter": lambda model, path: graft.load_adapter(model, path / "a", "second"),
    "detach": lambda model, path: graft.detach(model),
    "save_adapter": lambda model, path: graft.save_adapter(model, path / "b"),
    "merge_into": lambda model, path: merge_into(model),
}


@pytest.mark.parametrize("act", REFUSED)
def test_what_needs_the_base_is_refused_while_merged(
    tiny_dir: Callable[..., Path], tmp_path: Path, act: str
) -> None:
    model = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4))
    graft.save_adapter(model, tmp_path / "a")
    live = logits(model)
    graft.merge_in_place(model)
    with pytest.raises(AdapterError, match="is merged into the weights") as caught:
        REFUSED[act](model, tmp_path)
    assert "unmerge" in caught.value.fix
    graft.unmerge(model)
    assert torch.equal(logits(model), live)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_another_adapter_goes_on_acting(tiny_dir: Callable[..., Path]) -> None:
    model = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4))
    graft.attach(model, graft.LoraConfig(rank=2), "second")
    shake(model, "second", 7)
    graft.set_active(model, ("default", "second"))
    live = logits(model)
    graft.merge_in_place(model)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="'default' is merged"):
        graft.merge_in_place(model, "second")
    graft.unmerge(model)
    assert torch.equal(logits(model), live)


def test_refusals_leave_the_model_as_it_was(tiny_dir: Callable[..., Path]) -> None:
    quantized = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4), quantization="nf4")
    with pytest.raises(AdapterError, match="is quantized"):
        graft.merge_in_place(quantized)
    with graft.disabled(quantized):
        pass  # nothing is merged

    halves = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4), dtype="float16")
    with torch.no_grad():
        halves.model.layers[1].mlp.down_proj.adapters["default"].lora_B.mul_(1e7)
    before = {key: tensor.clone() for key, tensor in base_state(halves)}
    with pytest.raises(AdapterError, match="too large for float16"):
        graft.merge_in_place(halves)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_state(halves))

    cast = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4))
    graft.merge_in_place(cast)
    cast.to(torch.bfloat16)
    with pytest.raises(AdapterError, match="bfloat16 now"):
        graft.unmerge(cast)
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        graft.merge_in_place(adapted(tiny_dir("llama"), graft.LoraConfig()), "other")
