"""QA-LoRA: merged into the shifts of an affine quantized base, its codes untouched; plain LoRA in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graft.models.load as models
from graft.adapters.attach import adapters_of, attach
from graft.adapters.attached import trained_tensors
from graft.adapters.fold import merge_into
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.qa_lora import QaLoraConfig
from graft.errors import AdapterError, ConfigError, TargetError
from graft.models.quantize import quantize
from graft.quant.config import QuantizationConfig
from graft.quant.linear import quantized_modules
from graft.quant.tensor import plain_constants

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(tensors: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def quantized(quant_type: str, **how: Any) -> QuantizationConfig:
    return QuantizationConfig(quant_type=quant_type, blocksize=32, **how)  # type: ignore[arg-type]


def made(directory: Path, quantization: QuantizationConfig | None, **changes: Any) -> Any:
    base = models.load(directory, quantization=quantization, dtype="float32")
    attach(base.model, QaLoraConfig(rank=4, **changes))
    shake(trained_tensors(base.model).values())
    return base.model


AFFINE = [
    quantized("int4"),
    quantized("int4", double_quant=False),
    quantized("int3", hqq=True),
    quantized("int2"),
]


@pytest.mark.parametrize("quantization", AFFINE, ids=lambda c: f"{c.quant_type}-{c.double_quant}")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merge_moves_shifts_and_nothing_else(
    tiny_dir: Callable[..., Path], quantization: QuantizationConfig, family: str
) -> None:
    model = made(tiny_dir(family), quantization, group_size=None)
    live = logits(model)
    config = adapters_of(model)["default"].config
    assert config.group_size == 32
    before, updates = {}, {}
    for path in adapters_of(model)["default"].targets:
        layer: Any = model.get_submodule(path)
        before[path] = plain_constants(layer.base_layer.quantized_weight)
        down, up = (t.detach() for t in layer.adapters["default"].tensors().values())
        updates[path] = config.scaling * up @ down
    merge_into(model)
    assert not adapters_of(model)
    for path, old in before.items():
        new = model.get_submodule(path).quantized_weight
        assert torch.equal(new.codes, old.codes)
        assert torch.equal(new.absmax, old.absmax)
        assert torch.equal(new.shift, old.shift + updates[path].reshape(-1))
        assert not new.config.double_quant
    # fp32 sums of the same numbers in another order.
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)


def test_plain_constants_are_the_same_weights(tiny_dir: Callable[..., Path]) -> None:
    base = models.load(tiny_dir("llama"), quantization=quantized("int4"), dtype="float32")
    for layer in quantized_modules(base.model).values():
        weight = layer.quantized_weight
        plain = plain_constants(weight)
        assert plain.config == quantized("int4", double_quant=False)
        assert torch.equal(plain.dequantize(), weight.dequantize())


@pytest.mark.parametrize("stored", [False, True], ids=["quantized when loaded", "stored quantized"])
def test_a_merged_directory_is_quantized_as_the_base_was(
    tiny_dir: Callable[..., Path], tmp_path: Path, stored: bool
) -> None:
    base_dir, quantization = tiny_dir("llama"), quantized("int4")
    if stored:
        quantize(base_dir, quantization, tmp_path / "base")
        base_dir, quantization = tmp_path / "base", None
    base = models.load(base_dir, quantization=quantization, dtype="float32")
    attach(base.model, QaLoraConfig(rank=4, target_modules=("q_proj", "down_proj")))
    shake(trained_tensors(base.model).values())
    codes = {path: layer.codes.clone() for path, layer in quantized_modules(base.model).items()}
    save_adapter(base.model, tmp_path / "a")
    report = merge(tmp_path / "a", tmp_path / "merged", base=base_dir, dtype="float32")
    assert report.folded_into == "quantized"
    names = ["dequantized", "quantized", "requantized"]
    assert [item.name for item in report.candidates] == (
        names if stored else ["dense", *names, "requantized_dense"]
    )
    measured = report.candidate("quantized")
    assert (measured.stored_as, measured.is_no_op) == ("int4", False)
    assert measured.gap < 1e-5
    assert measured.error < 1e-5 < report.candidate("requantized").error
    assert set(measured.layers) == {f"{path}.weight" for path in adapters_of(base.model)["default"].targets}
    assert report.logit_gap < 1e-5 < report.adapter_effect
    assert any("same codes" in note for note in report.notes)
    again = models.load(tmp_path / "merged", dtype="float32")
    assert again.quantization == quantized("int4", double_quant=False)
    found = {path: layer.codes for path, layer in quantized_modules(again.model).items()}
    plain = {path.replace(".base_layer", ""): value for path, value in codes.items()}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[path], plain[path]) for path in found)
    torch.testing.assert_close(logits(again.model), logits(base.model), atol=1e-5, rtol=1e-5)
    dense = merge(tmp_path / "a", tmp_path / "dense", base=base_dir, dtype="float32", from_quantized=True)
    assert dense.folded_into == "dequantized"
    assert models.load(tmp_path / "dense").quantization is None


@pytest.mark.parametrize(
    ("quantization", "group_size"),
    [(QuantizationConfig(quant_type="nf4"), None), (quantized("int4"), 16), (None, None)],
    ids=["nf4", "blocks above groups", "dense"],
)
def test_elsewhere_it_merges_densely_and_says_so(
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    quantization: QuantizationConfig | None,
    group_size: int | None,
) -> None:
    model = made(tiny_dir("llama"), quantization, group_size=group_size)
    save_adapter(model, tmp_path / "a")
    report = merge(tmp_path / "a", tmp_path / "merged", base=tiny_dir("llama"), dtype="float32")
    assert report.folded_into == ("dense" if quantization is None else "dequantized")
    assert any("only a base in int4, int3 or int2" in note for note in report.notes)
    assert report.logit_gap < 1e-5
    with pytest.raises(AdapterError, match="only a base in int4, int3 or int2"):
        merge(tmp_path / "a", tmp_path / "codes", base=tiny_dir("llama"), into="quantized")
    if quantization is not None:
        with pytest.raises(AdapterError, match="cannot be folded into codes without loss"):
            merge_into(model)


# PEFT calls transformers by names that will go.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_to_others_the_file_is_plain_lora(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = made(tiny_dir("llama"), None, group_size=8)
    save_adapter(model, tmp_path / "a")
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "a", is_trainable=True).eval()
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    for side in (model, theirs):
        side(IDS, labels=IDS).loss.backward()
    other = dict(theirs.named_parameters())
    for key, tensor in trained_tensors(model).items():
        grad = other[f"base_model.model.{key.removesuffix('.weight')}.default.weight"].grad
        assert grad is not None
        if "lora_A" in key:
            grad = grad.unflatten(1, (-1, 8)).sum(-1)
        torch.testing.assert_close(tensor.grad, grad, atol=2e-6, rtol=2e-4, msg=key)
    again = models.load(tiny_dir("llama")).model
    adapter = load_adapter(again, tmp_path / "a")
    assert adapter.config.method == "qa_lora"
    assert adapter.config.group_size == 8
    (tmp_path / "a" / "graft.json").unlink()
    assert load_adapter(models.load(tiny_dir("llama")).model, tmp_path / "a").config.method == "lora"


def test_a_file_that_differs_within_groups_is_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    from graft.adapters.side_file import tensors_digest

    save_adapter(made(tiny_dir("llama"), None, group_size=8), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "lora_A" in key)
    tensors[name][0, 3] += 1
    save_file(tensors, path)
    side = json.loads((tmp_path / "a" / "graft.json").read_text())
    side["tensors"] = tensors_digest(load_file(path).items())
    (tmp_path / "a" / "graft.json").write_text(json.dumps(side))
    with pytest.raises(AdapterError, match="differs within groups of 8") as caught:
        load_adapter(models.load(tiny_dir("llama")).model, tmp_path / "a")
    assert name in caught.value.where


def test_sizes_that_do_not_fit_are_refused(tiny_dir: Callable[..., Path]) -> None:
    with pytest.raises(TargetError, match="32 inputs are no whole groups of 24"):
        attach(models.load(tiny_dir("llama")).model, QaLoraConfig(group_size=24))
    mixed = QuantizationConfig(quant_type="int4", blocksize=64, skip_modules=("q_proj",))
    model = models.load(tiny_dir("llama"), quantization=mixed).model
    with pytest.raises(TargetError, match="groups of several sizes"):
        attach(model, QaLoraConfig(target_modules=("q_proj", "down_proj")))
    with pytest.raises(ConfigError, match="group_size 0"):
        QaLoraConfig(group_size=0)
