"""Biases that train with LoRA: the base's, those of all modules, one of lora_B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
import graft.models.load as models
from graft.adapters.attach import adapter_tensors, adapters_of, attach, detach, disabled, set_active
from graft.adapters.attached import trained_tensors
from graft.adapters.base import METHODS
from graft.adapters.checks import check_layer, sample_layers
from graft.adapters.effect import idle_layers
from graft.adapters.fold import merge_into
from graft.adapters.lora import LoraConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import save_adapter
from graft.errors import AdapterError, ConfigError, TargetError

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
TARGETS = {"qwen2": ("q_proj", "k_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}
BIASES = {
    # Queries and keys of two blocks, 32 and 16 wide.
    ("qwen2", "lora_only"): 2 * (32 + 16),
    # Values, 16 wide, besides; nothing else of this family has a bias.
    ("qwen2", "all"): 2 * (32 + 16 + 16),
    # c_attn is 3 * 32 wide, the last linear of the MLP 32.
    ("gpt2", "lora_only"): 2 * (96 + 32),
    # Of each block the other linears (32 and 128) and two norms besides, then the last norm.
    ("gpt2", "all"): 2 * (96 + 32 + 32 + 128 + 32 + 32) + 32,
}
cases = pytest.mark.parametrize(("family", "bias"), BIASES)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(tensors: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


@cases
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_biases_train_and_the_base_keeps_its_own(
    tiny_dir: Callable[..., Path], family: str, bias: Any, quantized: bool
) -> None:
    how: dict[str, Any] = {"quantization": "nf4", "dtype": "float32"} if quantized else {}
    model = models.load(tiny_dir(family), **how).model
    plain = logits(model)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = attach(model, LoraConfig(rank=4, bias=bias, target_modules=TARGETS[family]))
    assert torch.equal(logits(model), plain)
    assert sorted(idle_layers(model, "default")) == sorted(made.places)
    trained = trained_tensors(model)
    biases = {key: tensor for key, tensor in trained.items() if key.endswith("bias")}
    assert sum(tensor.numel() for tensor in biases.values()) == BIASES[family, bias]
    model(IDS, labels=IDS).loss.backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in biases.values())
    shake(biases.values())
    assert (logits(model) - plain).abs().max() > 1e-3
    assert not set(idle_layers(model, "default")) & {key.rpartition(".")[0] for key in biases}
    with disabled(model):
        assert torch.equal(logits(model), plain)
    set_active(model, None)
    assert torch.equal(logits(model), plain)
    detach(model)
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


@cases
def test_a_merge_writes_the_biases(
    tiny_dir: Callable[..., Path], family: str, bias: Any, tmp_path: Path
) -> None:
    model = models.load(tiny_dir(family)).model
    attach(model, LoraConfig(rank=4, bias=bias, lora_bias=family == "gpt2", target_modules=TARGETS[family]))
    shake(trained_tensors(model).values())
    save_adapter(model, tmp_path / "a")
    live = logits(model)
    merge_into(model)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    report = merge(tmp_path / "a", tmp_path / "merged", base=tiny_dir(family))
    assert report.logit_gap < 1e-5 < report.adapter_effect


def test_a_bias_of_lora_b_keeps_the_contract() -> None:
    for config in (LoraConfig(lora_bias=True), LoraConfig(lora_bias=True, bias="lora_only", dropout=0.2)):
        for base, x in sample_layers():
            if base.kind in ("linear", "conv1d"):
                check_layer(METHODS["lora"], config, base, x)


def test_a_layer_without_a_bias_takes_none_in_a_merge(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    attach(model, LoraConfig(rank=4, lora_bias=True))
    shake(trained_tensors(model).values())
    live = logits(model)
    with pytest.raises(AdapterError, match="q_proj has no bias that the bias of lora_B"):
        merge_into(model)
    assert torch.equal(logits(model), live)


def test_two_adapters_with_biases_add_what_each_changes(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("qwen2")).model
    for name in ("default", "second"):
        attach(model, LoraConfig(rank=4, bias="lora_only", target_modules=TARGETS["qwen2"]), name)
        shake(adapter_tensors(model, name).values())
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def output(*names: str) -> Tensor:
        set_active(model, names)
        with torch.no_grad():
            return layer(x)

    plain = output()
    expected = plain + (output("default") - plain) + (output("second") - plain)
    torch.testing.assert_close(output("default", "second"), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(AdapterError, match="also carries second"):  # its bias is measured against the base's
        merge_into(model, "default")


@pytest.mark.parametrize(
    ("changes", "family", "match"),
    [
        ({"bias": "all"}, "llama", "the model has no bias"),
        ({"bias": "lora_only", "target_modules": ("down_proj",)}, "qwen2", "no target has a bias"),
        ({"lora_bias": True, "target_modules": ("embed_tokens",)}, "llama", "lora_bias on an embedding"),
    ],
)
def test_what_cannot_act_is_refused(
    tiny_dir: Callable[..., Path], changes: dict[str, Any], family: str, match: str
) -> None:
    model = models.load(tiny_dir(family)).model
    before, parts = logits(model), dict(model.named_modules())
    with pytest.raises(TargetError, match=match) as caught:
        attach(model, LoraConfig(rank=4, **changes))
    assert caught.value.where == ("adapter.lora_bias" if "lora_bias" in changes else "adapter.bias")
    assert adapters_of(model) == {}
    assert torch.equal(logits(model), before)
    assert dict(model.named_modules()) == parts


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="bias 'some' is not known"):
        LoraConfig(bias="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lora_bias True cannot act"):
        LoraConfig(lora_bias=True, target_modules=(), modules_to_save=("lm_head",))


def biased(tiny_dir: Callable[..., Path], **how: Any) -> Any:
    model = models.load(tiny_dir("qwen2")).model
    attach(model, LoraConfig(rank=2, target_modules=("q_proj", "v_proj"), **how), seed=1)
    for tensor in trained_tensors(model).values():
        torch.nn.init.normal_(tensor, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def test_merged_in_place_at_a_weight_the_bias_has_it_too(tiny_dir: Callable[..., Path]) -> None:
    model, ids = biased(tiny_dir, lora_bias=True), torch.arange(3, 40)[None]
    set_active(model, ["default"], [0.5])
    with torch.no_grad():
        live = model(ids).logits
        graft.merge_in_place(model)
        torch.testing.assert_close(model(ids).logits, live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"lora_bias": True}, {"bias": "all"}, {"trainable_token_indices": (3,)}])
def test_what_is_no_delta_is_not_left_out_elsewhere(
    tiny_dir: Callable[..., Path], tmp_path: Path, how: dict[str, Any]
) -> None:
    model = biased(tiny_dir, **how)
    with pytest.raises(AdapterError, match=next(iter(how))):
        graft.save_active(model, tmp_path / "active")
    for dialect in ("mlx", "torchtune"):
        with pytest.raises(AdapterError, match=next(iter(how))):
            graft.save_foreign_adapter(model, tmp_path / "foreign", dialect=dialect)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_biases_alone_is_not_dead(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = biased(tiny_dir, lora_bias=True)
    for name, tensor in trained_tensors(model).items():
        if name.endswith("lora_B.weight"):
            torch.nn.init.zeros_(tensor)
    save_adapter(model, tmp_path / "a")
    assert not graft.inspect_adapter(tmp_path / "a").dead
    assert not graft.inspect_adapter(tmp_path / "a", base=tiny_dir("qwen2")).dead


@pytest.mark.parametrize("how", [{"bias": "all"}, {"bias": "lora_only"}, {"trainable_token_indices": (3, 9)}])
def test_what_trains_beside_deltas_is_inspected_over_its_base(
    tiny_dir: Callable[..., Path], tmp_path: Path, how: dict[str, Any]
) -> None:
    model = biased(tiny_dir, **how)
    save_adapter(model, tmp_path / "a")
    found = graft.inspect_adapter(tmp_path / "a", base=tiny_dir("qwen2"))
    assert not found.dead
    alone = {layer.path: layer.norm for layer in graft.inspect_adapter(tmp_path / "a").layers}
    for layer in found.layers:
        assert layer.norm == pytest.approx(alone[layer.path], rel=1e-5)
    assert all(item.change_ratio for item in found.saved)
