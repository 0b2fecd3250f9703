"""Adapters in models by how they start: what the first output is, what is saved, what is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graft.models.load as models
from graft.adapters import data_starts
from graft.adapters.attach import adapters_of, attach, detach, disabled
from graft.adapters.attached import adapter_tensors, fixed_tensors, trained_tensors
from graft.adapters.base import check_adapter_method
from graft.adapters.data_starts import Pass
from graft.adapters.dora import DoraConfig
from graft.adapters.effect import idle_layers
from graft.adapters.fold import merge_into
from graft.adapters.ia3 import Ia3Config
from graft.adapters.lora import LoraConfig, LoraMethod
from graft.adapters.lora_fa import LoraFaConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.starts import shared_out
from graft.adapters.targets import base_layers
from graft.config import read_assignments
from graft.errors import AdapterError, ConfigError, FingerprintError, ModelError, TargetError
from graft.models.fingerprint import tensor_digest
from graft.models.layers import BaseLayer
from graft.models.quantize import quantize

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
BATCHES = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(3, 259, (3, 4, 16), generator=torch.Generator().manual_seed(4))
]
LINEARS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}

STARTED = ("pissa", "olora", "lora_ga")
"""Not zero, and subtracted."""
EXACT = (*STARTED, "orthogonal", "eva")
"""The first output is that of the base."""


def settings(init: str, family: str = "llama", **more: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 12, "target_modules": LINEARS[family], "init": init, **more})


def given(init: str) -> dict[str, Any]:
    return {"batches": BATCHES} if init in ("eva", "lora_ga") else {}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(model: Any, name: str = "default", scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in trained_tensors(model, name).values():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def layers_of(model: Any, name: str = "default") -> dict[str, Any]:
    return {path: model.get_submodule(path) for path in adapters_of(model)[name].targets}


every = pytest.mark.parametrize("init", EXACT)
families = pytest.mark.parametrize("family", LINEARS)


@every
@families
@pytest.mark.parametrize("how", ["dense", "nf4"])
def test_the_first_output_is_the_bases_and_the_base_stays(
    tiny_dir: Callable[..., Path], init: str, family: str, how: str
) -> None:
    options = {"quantization": "nf4", "dtype": "float32"} if how == "nf4" else {}
    model = models.load(tiny_dir(family), **options).model
    plain = logits(model)
    before = {name: tensor_digest(name, tensor) for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    attach(model, settings(init, family), seed=3, **given(init))
    torch.testing.assert_close(logits(model), plain, atol=2e-5, rtol=1e-5)
    with disabled(model):
        assert torch.equal(logits(model), plain)
    for path, module in layers_of(model).items():
        tensors = module.adapters["default"].tensors()
        assert tensors["lora_A.weight"].any(), path
        assert tensors["lora_B.weight"].any() == (init != "eva"), path
    assert idle_layers(model, "default") == list(adapters_of(model)["default"].targets)
    shake(model)
    assert float((logits(model) - plain).abs().max()) > 1e-3
    with disabled(model):
        assert torch.equal(logits(model), plain)
    detach(model)
    assert torch.equal(logits(model), plain)
    assert {name: tensor_digest(name, tensor) for name, tensor in model.state_dict().items()} == before
    assert [module.training for module in model.modules()] == modes
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == learning


@every
@families
@pytest.mark.parametrize("use_rslora", [False, True])
def test_saved_is_a_plain_lora_over_the_original_base(
    tiny_dir: Callable[..., Path], init: str, family: str, use_rslora: bool, tmp_path: Path
) -> None:
    last = LINEARS[family][-1]
    config = settings(
        init, family, use_rslora=use_rslora, rank_pattern=(f"{last}=6",), alpha_pattern=(f"{last}=7",)
    )
    model = models.load(tiny_dir(family)).model
    attach(model, config, seed=3, **given(init))
    shake(model)
    save_adapter(model, tmp_path / "a")
    other = models.load(tiny_dir(family)).model
    loaded = load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), atol=2e-5, rtol=1e-5)
    assert loaded.config.init == "kaiming"
    assert not fixed_tensors(other)
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["init_lora_weights"] is True
    twice = 2 if init in STARTED else 1
    assert raw["r"] == 4 * twice
    for path, module in layers_of(model).items():
        one, two = module.adapters["default"], other.get_submodule(path).adapters["default"]
        assert two.scaling == pytest.approx(one.scaling, rel=1e-12)
        assert len(two.lora_A) == twice * len(one.lora_A)


@every
def test_merged_is_live(tiny_dir: Callable[..., Path], init: str, tmp_path: Path) -> None:
    model = models.load(tiny_dir("llama")).model
    attach(model, settings(init), seed=3, **given(init))
    shake(model)
    live = logits(model)
    save_adapter(model, tmp_path / "a")
    assert merge(tmp_path / "a", tmp_path / "merged").logit_gap < 1e-4
    merge_into(model)
    torch.testing.assert_close(logits(model), live, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits(models.load(tmp_path / "merged").model), live, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("init", [*EXACT, "gaussian"])
def test_neither_order_nor_other_adapters_nor_the_global_seed_matter(
    tiny_dir: Callable[..., Path], init: str
) -> None:
    config = settings(init, init_iterations=2) if init == "pissa" else settings(init)
    torch.manual_seed(1)
    alone = models.load(tiny_dir("llama")).model
    attach(alone, config, seed=3, **given(init))
    torch.manual_seed(2)
    beside = models.load(tiny_dir("llama")).model
    for name in ("first", "second"):
        attach(beside, settings("pissa"), name, seed=5)
        shake(beside, name, 0.3)
    attach(beside, config, seed=3, **given(init))
    wanted = adapter_tensors(alone)
    assert adapter_tensors(beside).keys() == wanted.keys()
    for key, tensor in adapter_tensors(beside).items():
        assert torch.equal(tensor, wanted[key]), key
    other = models.load(tiny_dir("llama")).model
    attach(other, config, seed=4, **given(init))
    same = all(torch.equal(tensor, wanted[key]) for key, tensor in adapter_tensors(other).items())
    drawn = init in ("gaussian", "orthogonal", "pissa")  # as a randomized SVD
    assert same != drawn


def test_started_and_plain_adapters_add_up(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    attach(model, settings("pissa"), "one", seed=1)
    attach(model, settings("kaiming"), "two", seed=2)
    shake(model, "one")
    shake(model, "two")
    module: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, found = module.base_layer(x), []
        for names in (("one",), ("two",), ("one", "two")):
            module.activate(names)
            found.append(module(x) - plain)
    torch.testing.assert_close(found[0] + found[1], found[2], atol=1e-5, rtol=1e-5)


class OnLinears:
    """LoRA with a start of the weight's, which embeddings do not have."""

    name, config_class, kinds = "lora", LoraConfig, ("linear", "conv1d")

    def tensor_shapes(self, base: Any, config: Any) -> Any:
        return LoraMethod().tensor_shapes(base, config)

    def build_layer(self, base: Any, config: Any, generator: Any) -> nn.Module:
        return LoraMethod().build_layer(base, config, generator)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_the_contract_of_methods_holds_from_any_start(init: str) -> None:
    check_adapter_method(OnLinears(), LoraConfig(rank=4, init=init))  # type: ignore[arg-type]


@pytest.mark.parametrize("init", STARTED)
def test_gradients_are_those_of_plain_torch_and_recomputing_gives_the_same(
    tiny_dir: Callable[..., Path], init: str
) -> None:
    from torch.utils.checkpoint import checkpoint

    model = models.load(tiny_dir("llama")).model
    attach(model, settings(init, dropout=0.3), seed=3, **given(init))
    shake(model)
    module: Any = model.get_submodule("model.layers.0.mlp.down_proj").train()
    layer = module.adapters["default"]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    ways: list[Callable[[], Tensor]] = [
        lambda: module(x),
        lambda: checkpoint(module, x, use_reentrant=False),
        lambda: layer.reference_forward(x, module.base_layer(x), module.base),
    ]
    for way in ways:
        model.zero_grad()
        x.grad = None
        torch.manual_seed(4)
        way().square().sum().backward()
        found.append([x.grad, layer.lora_A.grad, layer.lora_B.grad])
    assert all(torch.equal(one, two) for one, two in zip(found[0], found[1], strict=True))
    for one, two in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@families
def test_pissa_is_the_truncated_svd_of_what_the_base_computes_with(
    tiny_dir: Callable[..., Path], family: str
) -> None:
    for options in ({}, {"quantization": "nf4", "dtype": "float32"}):
        model = models.load(tiny_dir(family), **options).model
        attach(model, settings("pissa", family), seed=3)
        for path, module in layers_of(model).items():
            layer = module.adapters["default"]
            left, values, right = torch.linalg.svd(module.base.dense_weight().double(), full_matrices=False)
            best = (left[:, :4] * values[:4]) @ right[:4]
            made = layer.scaling * (layer.lora_B @ layer.lora_A).double()
            torch.testing.assert_close(made, best, atol=1e-5, rtol=1e-5, msg=path)


# EVA.


def test_eva_takes_the_principal_directions_of_the_inputs(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    labels = BATCHES[0]["input_ids"].clone()
    labels[:, :5] = -100
    mask = torch.ones_like(labels)
    mask[0, 12:] = 0
    batch = {"input_ids": BATCHES[0]["input_ids"], "labels": labels, "attention_mask": mask}
    kept = (labels != -100) & mask.bool()
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, x, output, path=path: inputs.__setitem__(path, x[0][kept])
        )
        for path in (
            f"model.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("self_attn.q_proj", "mlp.down_proj")
        )
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    config = settings("eva", target_modules=("q_proj", "down_proj"))
    made = attach(model, config, batches=[batch], seed=0)
    spectra, directions = {}, {}
    for path, x in inputs.items():
        centred = x.double() - x.double().mean(0)
        _, values, directions[path] = torch.linalg.svd(centred, full_matrices=False)
        spectra[path] = (values.square() / values.square().sum())[:8].tolist()
    # The budget of four layers of rank 4 goes to the largest shares over all of them.
    largest = sorted((share for found in spectra.values() for share in found), reverse=True)[15]
    ranks = {path: sum(share >= largest for share in found) for path, found in spectra.items()}
    assert sum(ranks.values()) == 16
    assert len(set(ranks.values())) > 1, "the case does not show any redistribution"
    assert {path: made.config.at(path).rank for path in made.targets} == ranks
    for path, module in layers_of(model).items():
        layer = module.adapters["default"]
        assert layer.lora_A.shape == (ranks[path], module.base.in_features)
        assert not layer.lora_B.any()
        assert layer.scaling == pytest.approx(config.scaling)
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(ranks[path]), atol=1e-5, rtol=0)
        cosines = (layer.lora_A.double() @ directions[path][: ranks[path]].T).diagonal().abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-3, rtol=0)


def test_eva_shares_ranks_out_and_drops_layers() -> None:
    shares = {"a": [0.5, 0.3, 0.1], "b": [0.2, 0.1, 0.05], "c": [0.01, 0.01, 0.01]}
    assert shared_out(shares, 3) == {"a": 2, "b": 1, "c": 0}
    assert shared_out(shares, 4) == {"a": 3, "b": 1, "c": 0}  # of equal shares the earlier layer's
    assert shared_out(shares, 99) == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("method", [LoraConfig, DoraConfig, LoraFaConfig])
def test_eva_leaves_layers_out_and_what_is_saved_says_so(
    tiny_dir: Callable[..., Path], method: Any, tmp_path: Path
) -> None:
    model = models.load(tiny_dir("llama")).model
    config = method(rank=1, alpha=3, target_modules="all-linear", init="eva", eva_rho=6.0)
    made = attach(model, config, batches=BATCHES, seed=0)
    assert len(made.targets) < 14
    assert any("without an adapter" in note for note in made.notes)
    assert sum(made.config.at(path).rank for path in made.targets) == 14
    shake(model)
    save_adapter(model, tmp_path / "a")
    other = models.load(tiny_dir("llama")).model
    again = load_adapter(other, tmp_path / "a", trainable=True)
    assert again.targets == made.targets
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=1e-6)


def test_eva_with_rho_one_leaves_ranks_as_they_are(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    made = attach(model, settings("eva", eva_rho=1.0), batches=BATCHES)
    assert {len(module.adapters["default"].lora_A) for module in layers_of(model).values()} == {4}
    assert made.config == settings("eva", eva_rho=1.0)
    few = [{"input_ids": IDS[:1, :3], "labels": IDS[:1, :3]}]
    with pytest.raises(AdapterError, match="3 inputs, too few for rank 4"):
        attach(models.load(tiny_dir("llama")).model, settings("eva", eva_rho=1.0), batches=few)


def test_groups_of_layers_give_what_all_together_give(
    tiny_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for init in ("eva", "lora_ga"):
        whole = models.load(tiny_dir("llama")).model
        attach(whole, settings(init), batches=BATCHES)
        with monkeypatch.context() as patch:
            patch.setattr(data_starts, "GROUP_BYTES", 1)
            parts = models.load(tiny_dir("llama")).model
            attach(parts, settings(init), batches=BATCHES)
        for key, tensor in adapter_tensors(parts).items():
            assert torch.equal(tensor, adapter_tensors(whole)[key]), key


# LoRA-GA.


@families
@pytest.mark.parametrize("how", ["dense", "nf4"])
def test_lora_ga_decomposes_the_gradient_of_the_whole_weight(
    tiny_dir: Callable[..., Path], family: str, how: str
) -> None:
    options = {"quantization": "nf4", "dtype": "float32"} if how == "nf4" else {}
    model = models.load(tiny_dir(family), **options).model
    attach(model, settings("lora_ga", family), batches=BATCHES)
    twin = models.load(tiny_dir(family)).model
    for path, layer in base_layers(model).items():
        if layer.quantized:
            BaseLayer.of(twin.get_submodule(path)).replace_weight(layer.dense_weight())
    twin.requires_grad_(True)
    for batch in BATCHES:
        twin(**batch).loss.backward()
    for path, module in layers_of(model).items():
        layer = module.adapters["default"].requires_grad_(False)
        gradient = twin.get_submodule(path).weight.grad.double()
        shape = (module.base.out_features, module.base.in_features)
        gradient = gradient if family == "llama" else gradient.T
        assert gradient.shape == shape
        values = torch.linalg.svdvals(gradient)
        size = shape[0] ** 0.25 / 4
        # What of the gradient lies in each span, as single directions of close values may mix.
        for found, wanted in ((layer.lora_A, values[:4]), (layer.lora_B.T, values[4:8])):
            torch.testing.assert_close(found @ found.T, size**2 * torch.eye(4), atol=1e-5, rtol=1e-4)
            turned = gradient if found is layer.lora_A else gradient.T
            within = (turned @ found.double().T / size).norm()
            assert float(within) == pytest.approx(float(wanted.norm()), rel=1e-3), path


def test_lora_ga_steps_along_the_gradient_of_full_training(tiny_dir: Callable[..., Path]) -> None:
    """Of the first step of SGD, the share that lies along the gradient: much more than from a random A."""
    twin = models.load(tiny_dir("llama")).model.requires_grad_(True)
    for batch in BATCHES:
        twin(**batch).loss.backward()
    found = {}
    for init in ("kaiming", "lora_ga"):
        model = models.load(tiny_dir("llama")).model
        attach(model, settings(init), **given(init))
        for batch in BATCHES:
            model(**batch).loss.backward()
        for path, module in layers_of(model).items():
            layer = module.adapters["default"]
            before = layer.scaling * (layer.lora_B @ layer.lora_A).detach()
            with torch.no_grad():
                for tensor in (layer.lora_A, layer.lora_B):
                    tensor -= 1e-4 * tensor.grad
                step = layer.scaling * layer.lora_B @ layer.lora_A - before
            gradient = twin.get_submodule(path).weight.grad
            found[init, path] = -float(functional.cosine_similarity(step.view(-1), gradient.view(-1), dim=0))
            values = torch.linalg.svdvals(gradient)
            best = float(values[:8].norm() / values.norm())
            if init == "lora_ga":
                assert found[init, path] == pytest.approx(best, rel=2e-2), path
                assert found[init, path] > 1.2 * found["kaiming", path]


# LoftQ.


def gap(model: Any, path: str, original: Tensor) -> float:
    module = model.get_submodule(path)
    weight = module.adapters["default"].merged_weight(module.base, module.base.dense_weight())
    return float((weight - original).norm() / original.norm())


@families
@pytest.mark.parametrize("quant_type", ["nf4", "int4", "nf2"])
@pytest.mark.parametrize("alpha", [4, 16])
def test_loftq_makes_up_for_rounding_whatever_the_scaling(
    tiny_dir: Callable[..., Path], family: str, quant_type: str, alpha: int, tmp_path: Path
) -> None:
    dense = models.load(tiny_dir(family)).model
    base = models.load(tiny_dir(family), quantization=quant_type, dtype="float32")
    model = base.model
    plain = logits(model)
    attach(model, settings("loftq", family, rank=8, alpha=alpha), seed=0)
    with disabled(model):
        assert torch.equal(logits(model), plain)
    for path, module in layers_of(model).items():
        original, rounded = dense.get_submodule(path).weight.detach(), module.base.dense_weight()
        original = original if module.base.kind == "linear" and family == "llama" else original.T
        lost = torch.linalg.svdvals(original - rounded)
        assert gap(model, path, original) == pytest.approx(float(lost[8:].norm() / original.norm()), rel=1e-3)
        assert gap(model, path, original) < float(lost.norm() / original.norm())
    save_adapter(model, tmp_path / "a")
    again = models.load(tiny_dir(family), quantization=quant_type, dtype="float32").model
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_a_loftq_adapter_belongs_to_its_quantized_base(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_dir("llama")
    base = models.load(directory, quantization="nf4", dtype="float32")
    attach(base.model, settings("loftq"), seed=0)
    shake(base.model)
    live = logits(base.model)
    save_adapter(base.model, tmp_path / "a")
    for wrong in (None, "int8"):
        with pytest.raises(FingerprintError, match="makes up for its rounding"):
            load_adapter(models.load(directory, quantization=wrong).model, tmp_path / "a")
    again = models.load(directory, quantization="nf4", dtype="float32").model
    adapter = load_adapter(again, tmp_path / "a", trainable=True)
    assert adapter.makes_up
    save_adapter(again, tmp_path / "b")
    assert (tmp_path / "a" / "graft.json").read_bytes() == (tmp_path / "b" / "graft.json").read_bytes()
    report = merge(tmp_path / "b", tmp_path / "merged")
    assert report.folded_into == "dequantized"
    assert [item.name for item in report.candidates] == ["dequantized", "requantized"]
    assert report.logit_gap < 1e-4
    with pytest.raises(AdapterError, match="makes up for the rounding of its base"):
        merge(tmp_path / "b", tmp_path / "dense", into="dense")
    assert not (tmp_path / "dense").exists()
    torch.testing.assert_close(logits(models.load(tmp_path / "merged").model), live, atol=1e-4, rtol=1e-4)
    quantize(directory, "nf4", tmp_path / "stored")
    stored = models.load(tmp_path / "stored", dtype="float32").model
    load_adapter(stored, tmp_path / "a")
    torch.testing.assert_close(logits(stored), live, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="is stored quantized by bitsandbytes"):
        attach(models.load(tmp_path / "stored").model, settings("loftq"))


def test_dense_layers_in_a_quantized_base_start_as_any_other(tiny_dir: Callable[..., Path]) -> None:
    from graft.quant.config import QuantizationConfig

    quantization = QuantizationConfig(skip_modules=("v_proj",))
    model = models.load(tiny_dir("llama"), quantization=quantization, dtype="float32").model
    attach(model, settings("loftq"), seed=0)
    for path, module in layers_of(model).items():
        layer = module.adapters["default"]
        assert bool(layer.lora_B.any()) == ("v_proj" not in path)
        assert layer.lora_A.any()


def test_loftq_refuses_weights_that_are_not_those_of_the_base(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(tiny_dir("llama"), tmp_path / "base")
    model = models.load(tmp_path / "base", quantization="nf4").model
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tiny_dir("llama", initializer_range=0.21), tmp_path / "base")
    with pytest.raises(AdapterError, match="other weights in its files"):
        attach(model, settings("loftq"))
    assert adapters_of(model) == {}


# What is refused.

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"init": "svd"}, ConfigError, "init 'svd' is unknown"),
    "iterations": ({"init": "olora", "init_iterations": 4}, ConfigError, "init_iterations 4 cannot act"),
    "iterations of none": ({"init": "pissa", "init_iterations": -1}, ConfigError, "-1 is not a whole number"),
    "no rounds": ({"init": "loftq", "init_iterations": 0}, ConfigError, "0 is not a whole number from 1"),
    "batches": ({"init_batches": 2}, ConfigError, "init_batches 2 cannot act"),
    "no batches": ({"init": "eva", "init_batches": 0}, ConfigError, "0 is not a whole number from 1"),
    "rho": ({"init": "lora_ga", "eva_rho": 3.0}, ConfigError, "eva_rho 3.0 cannot act"),
    "small rho": ({"init": "eva", "eva_rho": 0.5}, ConfigError, "0.5 is not a number from 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_act_are_refused(case: str) -> None:
    values, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        LoraConfig(**values)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "lora_ga"])
def test_methods_refuse_starts_that_they_do_not_have(init: str) -> None:
    for method in (DoraConfig, LoraFaConfig):
        with pytest.raises(ConfigError, match=f"init '{init}' is not for {method().method}"):
            method(init=init)
    with pytest.raises(ConfigError, match="init 'orthogonal' is not for lora_fa"):
        LoraFaConfig(init="orthogonal")  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_data_is_asked_for_by_name(tiny_dir: Callable[..., Path], init: str) -> None:
    model = models.load(tiny_dir("llama")).model
    with pytest.raises(ConfigError, match=f"init '{init}' looks at data, and there is none"):
        attach(model, settings(init))
    with pytest.raises(ConfigError, match="got no batch"):
        attach(model, settings(init), batches=[])
    assert adapters_of(model) == {}
    with pytest.raises(ConfigError, match="looks at no batches"):
        attach(model, settings("pissa"), batches=BATCHES)
    with pytest.raises(ConfigError, match="looks at no batches"):
        attach(model, Ia3Config(target_modules=("k_proj",), feedforward_modules=()), batches=BATCHES)


def test_as_many_batches_are_taken_as_asked_for(tiny_dir: Callable[..., Path]) -> None:
    taken: list[int] = []

    def passes() -> Any:
        for number in range(9):
            taken.append(number)
            yield Pass(lambda model: model(**BATCHES[0]).loss)

    attach(models.load(tiny_dir("llama")).model, settings("eva", init_batches=2), batches=passes())
    assert taken == [0, 1]


@pytest.mark.parametrize("init", [*EXACT, "loftq"])
def test_embeddings_are_refused(tiny_dir: Callable[..., Path], init: str) -> None:
    model = models.load(tiny_dir("llama")).model
    with pytest.raises(TargetError, match=r"embed_tokens is an embedding, which cannot start with"):
        attach(model, settings(init, target_modules=("embed_tokens",)), **given(init))
    assert adapters_of(model) == {}


@pytest.mark.parametrize(
    ("init", "rank", "fix"),
    [
        ("pissa", 17, "at most 16"),
        ("olora", 17, "at most 16"),
        ("lora_ga", 9, "at most 8"),
        ("orthogonal", 3, "even"),
    ],
)
def test_ranks_that_a_start_does_not_have_are_refused(
    tiny_dir: Callable[..., Path], init: str, rank: int, fix: str
) -> None:
    model = models.load(tiny_dir("llama")).model
    with pytest.raises(ConfigError, match=f"no start of rank {rank} for model.layers.0") as refused:
        attach(model, settings(init, rank=rank, target_modules=("v_proj",)), **given(init))
    assert fix in refused.value.fix


def test_a_dense_base_has_nothing_for_loftq(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    with pytest.raises(ConfigError, match="makes up for rounding, and the base is dense"):
        attach(model, settings("loftq"))


def test_layers_without_a_gradient_are_named(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    silent = [Pass(lambda model: 0 * model(**BATCHES[0]).loss)]
    with pytest.raises(AdapterError, match="model.layers.0.self_attn.q_proj has no gradient"):
        attach(model, settings("lora_ga"), batches=silent)
    model.get_input_embeddings().weight.data[int(IDS[0, 0])] = math.nan
    broken = [{"input_ids": IDS, "labels": IDS}]
    with pytest.raises(AdapterError, match="q_proj has inputs that are not finite"):
        attach(model, settings("eva"), batches=broken)
    with pytest.raises(AdapterError, match="q_proj has a gradient that is not finite"):
        attach(model, settings("lora_ga"), batches=broken)
    assert adapters_of(model) == {}


def test_other_tools_names_of_starts_are_told() -> None:
    from graft.config import build
    from graft.training.config import RunConfig

    words = ["adapter.method=vera", "adapter.init=pissa", "data.train=x", "output=y"]
    with pytest.raises(ConfigError, match=r"adapter\.init"):
        build(RunConfig, read_assignments(words))


def test_a_copy_of_a_started_model_is_the_same(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama")).model
    attach(model, settings("pissa"), seed=3)
    shake(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert math.isfinite(float(logits(twin).sum()))
