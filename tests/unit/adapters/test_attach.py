"""Adapters go in, act as chosen, and come out without a trace."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graft.models.load as models
from graft.adapters.adapted import AdaptedLayer
from graft.adapters.attach import adapter_tensors, adapters_of, attach, detach, disabled, set_active
from graft.adapters.attached import active_adapters, num_base_parameters
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.side_file import base_fingerprint
from graft.errors import AdapterError, ModelError
from graft.models.fingerprint import fingerprint_of

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(model: Any, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def test_a_new_adapter_changes_nothing_and_freezes_the_base(
    tiny_dir: Callable[..., Path], tiny_family: str
) -> None:
    model = models.load(tiny_dir(tiny_family)).model
    before = logits(model)
    adapter = attach(model, LoraConfig(rank=4))
    assert torch.equal(logits(model), before)
    own = {id(tensor) for tensor in adapter_tensors(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert all(tensor.dtype == torch.float32 for tensor in adapter_tensors(model).values())
    assert adapter.num_trainable == sum(t.numel() for t in adapter_tensors(model).values())
    assert "lm_head" not in adapter.targets
    model(IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_number_of_parameters_of_a_known_model() -> None:
    """Mistral-7B with rank 16 on all linears trains 41,943,040 numbers (published)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mistral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapter = attach(model, LoraConfig(rank=16))
    assert 32 * adapter.num_trainable == 41_943_040


def test_bf16_base_has_fp32_adapters_and_bf16_outputs(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("gemma3_text"), dtype="bfloat16").model
    attach(model, LoraConfig(modules_to_save=("norm",), target_modules=("embed_tokens", "q_proj")))
    shake(model, "default")
    assert model(IDS).logits.dtype == torch.bfloat16
    model(IDS, labels=IDS).loss.backward()
    for tensor in adapter_tensors(model).values():
        assert tensor.dtype == tensor.grad.dtype == torch.float32


def test_first_values_do_not_depend_on_order_or_on_the_global_generator() -> None:
    one, two = small(), small()
    attach(one, LoraConfig(target_modules=("0", "2")), seed=5)
    torch.manual_seed(123)
    attach(two, LoraConfig(target_modules=("2",)), "first", seed=5)
    torch.rand(3)
    state = torch.random.get_rng_state()
    attach(two, LoraConfig(target_modules=("0", "2")), "second", seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, theirs = adapter_tensors(one), adapter_tensors(two, "second")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    other = small()
    attach(other, LoraConfig(target_modules=("0", "2")), seed=6)
    assert not torch.equal(ours["0.lora_A.weight"], adapter_tensors(other)["0.lora_A.weight"])


def test_several_adapters_add_up_and_can_be_chosen(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    base = logits(model)
    attach(model, LoraConfig(rank=2, target_modules=("lm_head",)), "a")
    attach(model, LoraConfig(rank=3, target_modules=("lm_head",)), "b")
    shake(model, "a", 1)
    shake(model, "b", 2)
    assert active_adapters(model) == ("b",)
    only_b = logits(model)
    set_active(model, "a")
    only_a = logits(model)
    set_active(model, ["a", "b"])
    torch.testing.assert_close(logits(model) - base, (only_a - base) + (only_b - base), atol=1e-5, rtol=1e-5)
    set_active(model, None)
    assert torch.equal(logits(model), base)
    assert not any(p.requires_grad for p in model.parameters())
    set_active(model, "a")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(t) for t in adapter_tensors(model, "a").values()}
    assert list(adapters_of(model)) == ["a", "b"]


def test_disabled_is_the_base_and_ends_also_on_an_error(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    base = logits(model)
    attach(model, LoraConfig(modules_to_save=("norm",)))
    shake(model, "default")
    live = logits(model)
    with contextlib.suppress(ZeroDivisionError), disabled(model):
        assert torch.equal(logits(model), base)
        with disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert torch.equal(logits(model), live)


def test_detach_leaves_no_trace(tiny_dir: Callable[..., Path], tiny_family: str) -> None:
    model = models.load(tiny_dir(tiny_family)).model
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = logits(model)
    attach(model, LoraConfig(), "a")
    attach(model, LoraConfig(target_modules=(), modules_to_save=("lm_head",)), "b")
    shake(model, "a")
    shake(model, "b")
    detach(model, "a")
    assert list(adapters_of(model)) == ["b"]
    detach(model, "b")
    assert [name for name, _ in model.named_modules()] == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "graft_attachments")


def test_detaching_keeps_the_others_active() -> None:
    model = small()
    for name in ("a", "b"):
        attach(model, LoraConfig(target_modules=("0",)), name)
    set_active(model, ["a", "b"])
    detach(model, "a")
    assert active_adapters(model) == ("b",)
    assert isinstance(model[0], AdaptedLayer)
    assert model[0].active == ("b",)


def test_saved_module_trains_a_copy_and_leaves_the_original(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("qwen2"), dtype="bfloat16").model
    before = model.lm_head.weight.clone()
    adapter = attach(model, LoraConfig(target_modules=(), modules_to_save=("lm_head", "norm")))
    tensors = adapter_tensors(model)
    assert list(tensors) == ["model.norm.weight", "lm_head.weight"]
    assert adapter.num_trainable == 32 + 264 * 32
    assert any("share one weight" in note for note in adapter.notes)
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for tensor in tensors.values():
            assert tensor.grad.dtype == torch.float32
            tensor -= 10 * tensor.grad
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.model.embed_tokens.weight, before)
    with disabled(model):
        base = logits(model)
    assert not torch.equal(logits(model), base)


def test_attributes_of_the_base_layer_are_still_there(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("gpt2")).model
    attach(model, LoraConfig(target_modules=("wte", "c_attn"), modules_to_save=("ln_f",)))
    assert model.get_input_embeddings().num_embeddings == 264
    assert model.transformer.h[0].attn.c_attn.nf == 96
    assert model.transformer.ln_f.eps == model.config.layer_norm_epsilon
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.transformer.h[0].attn.c_attn.nothing


def test_copies_are_whole(tiny_dir: Callable[..., Path]) -> None:
    model = small()
    attach(model, LoraConfig(modules_to_save=("2",), target_modules=("0",)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            adapter_tensors(twin)["0.lora_B.weight"].add_(1)
            twin[0].base_layer.weight.zero_()
        assert not adapter_tensors(model)["0.lora_B.weight"].any()
        x = torch.ones(1, 6)
        torch.testing.assert_close(
            twin[0](x),
            twin[0].base_layer.bias
            + 2 * (adapter_tensors(twin)["0.lora_A.weight"] @ x[0]).sum()
            + torch.zeros(1, 8),
        )
        detach(twin)
        assert all(p.requires_grad for p in twin.parameters())


def test_fingerprint_of_the_base_under_adapters() -> None:
    model = small()
    before = fingerprint_of(model)
    attach(model, LoraConfig(target_modules=("0",), modules_to_save=("2",)))
    assert base_fingerprint(model) == before
    with torch.no_grad():
        model[0].base_layer.weight[0, 0] += 1
    assert base_fingerprint(model) != before


def test_names_that_cannot_be_used() -> None:
    model = small()
    attach(model, LoraConfig(target_modules=("0",)))
    for name, told in (
        ("default", "already"),
        ("a.b", "cannot be called"),
        ("", "cannot"),
        ("keys", "cannot"),
    ):
        with pytest.raises(AdapterError, match=told):
            attach(model, LoraConfig(target_modules=("0",)), name)
    for act in (lambda: set_active(model, "defualt"), lambda: detach(model, "defualt")):
        with pytest.raises(AdapterError, match="did you mean 'default'"):
            act()


def test_one_module_cannot_be_adapted_and_trained_in_full() -> None:
    model = small()
    attach(model, LoraConfig(target_modules=("0",)), "a")
    with pytest.raises(AdapterError, match="belongs to adapter a"):
        attach(model, LoraConfig(target_modules=("2",), modules_to_save=("0",)), "b")
    attach(model, LoraConfig(target_modules=(), modules_to_save=("2",)), "b")
    with pytest.raises(AdapterError, match="belongs to adapter b"):
        attach(model, LoraConfig(target_modules=("2",)), "c")
    attach(model, LoraConfig(target_modules=(), modules_to_save=("2",)), "d")
    with pytest.raises(AdapterError, match="each train 2 in full"):
        set_active(model, ["b", "d"])
    assert list(adapters_of(model)) == ["a", "b", "d"]
    assert active_adapters(model) == ("d",)


def test_the_settings_alone_import_neither_torch_nor_transformers() -> None:
    code = "import sys, graft.adapters.lora; print({'torch', 'transformers'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


def test_transformers_save_is_refused_while_the_layers_are_not_its_own(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = models.load(tiny_dir("llama")).model
    attach(model, LoraConfig(), "a")
    attach(model, LoraConfig(target_modules=(), modules_to_save=("norm",)), "b")
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ModelError, match="save_pretrained does not know") as caught:
            one.save_pretrained(tmp_path / "m")
        assert "graft.save_adapter" in caught.value.fix
        assert 'save_strategy="no"' in caught.value.fix
    detach(model, "a")
    with pytest.raises(ModelError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    detach(model, "b")
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()), logits(model))
    assert "save_pretrained" not in vars(model)


def test_transformers_save_of_a_quantized_model_is_refused(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = models.load(tiny_dir("llama"), quantization="nf4").model
    with pytest.raises(ModelError, match="save_pretrained does not know"):
        model.save_pretrained(tmp_path / "m")
    attach(model, LoraConfig())
    detach(model)
    with pytest.raises(ModelError, match="save_pretrained does not know"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_number_of_base_parameters(
    tiny_dir: Callable[..., Path], tiny_family: str, quantization: str | None
) -> None:
    expected = sum(p.numel() for p in models.load(tiny_dir(tiny_family)).model.parameters())
    model = models.load(tiny_dir(tiny_family), quantization=quantization).model
    assert num_base_parameters(model) == expected
    attach(model, LoraConfig(rank=3, modules_to_save=("lm_head",)), "a")
    attach(model, LoraConfig(rank=2), "b")
    assert num_base_parameters(model) == expected


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_loaded_for_use_gets_no_gradients_whoever_is_activated(
    tiny_dir: Callable[..., Path], tmp_path: Path, trainable: bool
) -> None:
    model = models.load(tiny_dir("llama")).model
    attach(model, LoraConfig(modules_to_save=("norm",)))
    with torch.no_grad():
        for tensor in adapter_tensors(model, "default").values():
            tensor.add_(0.01)  # one that changes nothing is refused
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(model, tmp_path / "a", "loaded", trainable=trainable)
    assert loaded.trainable == trainable
    for names in ("loaded", "default", None, "loaded"):
        set_active(model, names)
        found = {tensor.requires_grad for tensor in adapter_tensors(model, "loaded").values()}
        assert found == {trainable and names == "loaded"}
