"""Quantization-aware training: gradients by the formula, merged files hold what was trained, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import graft
from graft.adapters.attach import attach, disabled, set_active
from graft.adapters.attached import trained_tensors
from graft.adapters.fold import merge_into
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.qat import QatConfig
from graft.adapters.qat_layer import QatLayer
from graft.config import build, read_assignments
from graft.errors import AdapterError, ConfigError, TargetError
from graft.models.load import load
from graft.models.save import save_model
from graft.quant.config import QuantizationConfig
from graft.quant.formats import FORMATS
from graft.quant.linear import QuantizedLinear, quantized_modules
from graft.quant.tensor import QuantizedTensor
from graft.training.build import run_from_config
from graft.training.config import RunConfig

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
BLOCK = 32


def settings(**more: Any) -> QatConfig:
    return QatConfig(rank=4, alpha=8, blocksize=BLOCK, **more)


def shake(model: nn.Module, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def rounded(weight: Tensor, quant_type: str) -> Tensor:
    """Blocks of a weight rounded by the definition, in float64, with plain scales."""
    blocks = weight.double().view(-1, BLOCK)
    book = torch.tensor(FORMATS[quant_type].codebook, dtype=torch.float64)
    shift = torch.zeros(len(blocks), 1, dtype=torch.float64)
    scale = blocks.abs().amax(1, keepdim=True)
    if quant_type == "int4":
        shift = blocks.amin(1, keepdim=True)
        scale = blocks.amax(1, keepdim=True) - shift
    nearest = ((blocks - shift) / scale)[..., None].sub(book).abs().argmin(-1)
    return (book[nearest] * scale + shift).view_as(weight)


@pytest.mark.parametrize("quant_type", ["nf4", "int4", "nf2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_straight_through_formula(
    quant_type: str, dtype: torch.dtype
) -> None:
    """With v = W + s B A: the value of Q(v), the gradient of v."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    attach(model, settings(quant_type=quant_type, double_quant=False, target_modules=("0",)))
    shake(model, 0.1)
    adapted: Any = model[0]
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    weigh = torch.randn(3, 5, 48)
    found = model(x)
    (found.float() * weigh).sum().backward()

    down, up = (t.detach().double().requires_grad_() for t in trained_tensors(model).values())
    wide = x.detach().double().requires_grad_()
    total = adapted.base.dense_weight().double() + 2.0 * up @ down
    through = total + (rounded(total.detach(), quant_type) - total).detach()
    expected = functional.linear(wide, through, adapted.base.bias.double())
    (expected * weigh.double()).sum().backward()

    assert found.dtype == x.dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in (
        (found, expected),
        (x.grad, wide.grad),
        *zip((t.grad for t in trained_tensors(model).values()), (down.grad, up.grad), strict=True),
    ):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(
            one.double(), other, atol=tolerance * float(other.detach().abs().max()), rtol=0
        )
    assert (expected - functional.linear(wide, total, adapted.base.bias.double())).abs().max() > 1e-2


def seen(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedTensor]:
    """The weights of the products of all later passes, in order."""
    found: list[QuantizedTensor] = []
    product = QuantizedLinear.product

    def watched(self: QuantizedLinear, *args: Any) -> Tensor:
        found.append(self.quantized_weight)
        return product(self, *args)

    monkeypatch.setattr(QuantizedLinear, "product", watched)
    return found


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    ours, theirs = one.parts(), other.parts()
    return (
        one.describe() == other.describe()
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


FORMS = {
    "nf4": ("nf4", True),
    "nf4-plain": ("nf4", False),
    "int4": ("int4", True),
    "int4-plain": ("int4", False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")]
)
def test_merged_files_hold_the_codes_of_the_last_training_step(
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    family: str,
    dtype: str,
) -> None:
    """bfloat16 over float32 files: what counts is the weight as it was in training."""
    quant_type, double_quant = FORMS[form]
    base = load(tiny_dir(family), dtype=dtype)
    adapter = attach(base.model, settings(quant_type=quant_type, double_quant=double_quant))
    shake(base.model)
    save_adapter(base.model, tmp_path / "a")
    with monkeypatch.context() as patch:
        used = seen(patch)
        base.model.train()
        base.model(IDS, labels=IDS).loss.backward()
    base.model.eval()
    report = merge(tmp_path / "a", tmp_path / "m")
    assert report.folded_into == "requantized"
    assert (report.kl, report.logit_gap, report.survival) == (0, 0, 1)
    merged = load(tmp_path / "m", dtype=dtype).model
    layers = quantized_modules(merged)
    assert set(layers) == set(adapter.targets)
    assert len(used) == len(layers)
    for path, layer in layers.items():
        assert sum(same(layer.quantized_weight, weight) for weight in used) == 1, path
    with torch.no_grad():
        assert torch.equal(merged(IDS).logits, base.model(IDS).logits)


def test_layers_without_adapter_stay_dense_in_the_merged_model(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = load(tiny_dir("llama"))
    chosen = settings(target_modules=("q_proj", "down_proj"), layers=(1,), modules_to_save=("lm_head",))
    attach(base.model, chosen)
    shake(base.model)
    save_adapter(base.model, tmp_path / "a")
    merge(tmp_path / "a", tmp_path / "m")
    merged = load(tmp_path / "m").model
    assert set(quantized_modules(merged)) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }
    with torch.no_grad():
        assert torch.equal(merged(IDS).logits, base.model(IDS).logits)


def test_asked_for_it_is_merged_dense_with_the_decoded_weights(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = load(tiny_dir("llama"))
    attach(base.model, settings())
    shake(base.model)
    save_adapter(base.model, tmp_path / "a")
    with torch.no_grad():
        live = base.model(IDS).logits
    report = merge(tmp_path / "a", tmp_path / "m", into="dense")
    assert report.quantization is None
    path = "model.layers.0.mlp.up_proj"
    layer: Any = base.model.get_submodule(path)
    codes = layer.adapters["default"].quantized_weight(layer.base, layer.base.dense_weight())
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(stored[f"{path}.weight"], codes.dequantize())
    merge_into(base.model)
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, live, atol=1e-5, rtol=1e-5)


def test_settings_come_back_with_the_adapter(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    made = QatConfig(rank=3, quant_type="int3", double_quant=False, blocksize=128, target_modules=("q_proj",))
    attach(base.model, made)
    shake(base.model)
    save_adapter(base.model, tmp_path / "a")
    other = load(tiny_dir("llama")).model
    found = load_adapter(other, tmp_path / "a").config
    assert found.quantization == QuantizationConfig(quant_type="int3", double_quant=False, blocksize=128)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, base.model(IDS).logits)
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA"
    assert not {"quant_type", "blocksize", "double_quant"} & raw.keys()

    side = tmp_path / "a" / "graft.json"
    known = json.loads(side.read_text())
    for own, told in (({}, "quant_type"), ({**known["own"], "blocksize": 7}, "blocksize is 7")):
        side.write_text(json.dumps({**known, "own": own}))
        with pytest.raises(AdapterError, match=told) as caught:
            load_adapter(load(tiny_dir("llama")).model, tmp_path / "a")
        assert "graft.json" in caught.value.where
    side.unlink()
    plain = load(tiny_dir("llama")).model
    assert load_adapter(plain, tmp_path / "a").config.method == "lora"


def test_codes_are_kept_in_evaluation_only_and_follow_every_change(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    attach(model, settings(target_modules=("q_proj",)))
    shake(model)
    layer: Any = model.model.layers[0].self_attn.q_proj
    kept: QatLayer = layer.adapters["default"]
    x = torch.randn(4, 32)

    def fresh() -> Tensor:
        weight = kept.quantized_weight(layer.base, layer.base.dense_weight())
        return functional.linear(x, weight.dequantize())

    model.eval()
    with torch.no_grad():
        layer(x)
        first = kept._known
        assert first is not None
        layer(x)
        assert kept._known is first
        for tensor in (layer.base_layer.weight, *kept.tensors().values()):
            before = layer(x)
            tensor.add_(torch.randn_like(tensor))
            assert not torch.equal(layer(x), before)
            torch.testing.assert_close(layer(x), fresh(), atol=1e-5, rtol=1e-5)
        kept.scaling *= 1.5
        torch.testing.assert_close(layer(x), fresh(), atol=1e-5, rtol=1e-5)
        model.train()
        assert kept._known is None
        layer(x)
        assert kept._known is None


def test_what_goes_under_it_is_dense_and_no_head(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    coarse = load(tiny_dir("llama"), quantization="nf4").model
    with pytest.raises(TargetError, match="is quantized already: qat rounds the dense weight"):
        attach(coarse, settings())
    model = load(tiny_dir("llama")).model
    with pytest.raises(TargetError, match="lm_head is the output head"):
        attach(model, settings(target_modules=("lm_head",)))
    assert not graft.adapters_of(model)
    attach(model, settings())
    shake(model)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(TargetError, match="is quantized already"):
        load_adapter(coarse, tmp_path / "a")
    graft.quantize(tiny_dir("llama"), "nf4", tmp_path / "coarse")
    with pytest.raises(AdapterError, match="the adapter was trained over dense weights"):
        merge(tmp_path / "a", tmp_path / "m", base=tmp_path / "coarse")


def test_other_formats_are_refused_for_its_merge(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = load(tiny_dir("llama")).model
    attach(model, settings())
    shake(model)
    save_adapter(model, tmp_path / "a")
    other = QuantizationConfig(blocksize=64)
    for asked in ("int4", other):
        with pytest.raises(
            AdapterError, match="trained to be stored as nf4 .blocks of 32, double_quant True"
        ):
            merge(tmp_path / "a", tmp_path / "m", quantization=asked)
    with pytest.raises(AdapterError, match="from_quantized cannot act"):
        merge(tmp_path / "a", tmp_path / "m", from_quantized=True)
    assert not (tmp_path / "m").exists()


def test_no_other_adapter_acts_beside_it(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    attach(model, settings(target_modules=("q_proj",)), "coarse")
    attach(model, graft.LoraConfig(target_modules=("q_proj", "k_proj")), "fine")
    for names in (["coarse", "fine"], ["fine", "coarse"]):
        with pytest.raises(AdapterError, match="coarse quantizes the weight of .*q_proj .*fine cannot act"):
            set_active(model, names)
    attach(model, graft.LoraConfig(target_modules=("v_proj",)), "elsewhere")
    set_active(model, ["coarse", "elsewhere"])


def test_disabled_it_is_the_dense_base(tiny_dir: Callable[..., Path]) -> None:
    base = load(tiny_dir("llama")).model
    with torch.no_grad():
        plain = base(IDS).logits
        attach(base, settings())
        assert not torch.equal(base(IDS).logits, plain)
        with disabled(base):
            assert torch.equal(base(IDS).logits, plain)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        QatConfig(blocksize=48)
    assert caught.value.where == "adapter.blocksize"
    with pytest.raises(ConfigError) as caught:
        QatConfig(quant_type="nf5")  # type: ignore[arg-type]
    assert caught.value.where == "adapter.quant_type"
    with pytest.raises(ConfigError, match="dropout"):
        QatConfig(dropout=0.1)  # type: ignore[call-arg]


def test_a_run_is_refused_before_its_base_is_loaded() -> None:
    words = ["adapter.method=qat", "quantization.quant_type=int4", "model.name=nowhere"]
    with pytest.raises(ConfigError, match="method qat rounds the weights of a dense base itself") as caught:
        build(RunConfig, read_assignments(words))
    assert "adapter.quant_type" in caught.value.fix
    with pytest.raises(ConfigError, match=r"unknown name 'adapter.dropout'") as caught:
        build(RunConfig, read_assignments(["adapter.method=qat", "adapter.dropout=0.1"]))
    assert "did you mean" not in caught.value.fix


def test_recomputed_codes_are_the_same(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("".join(f"{i}: one and {i} more\n\n" for i in range(8)))

    def trained(out: str, *more: str) -> bytes:
        words = [
            f"model.name={tiny_dir('llama')}",
            f"data.train={tmp_path / 'rows.txt'}",
            "adapter.method=qat",
        ]
        words += [f"output={tmp_path / out}", "training.max_steps=3", "data.max_length=64", *more]
        run = run_from_config(build(RunConfig, read_assignments(words)))
        assert run.adapter is not None
        return (run.adapter / "adapter_model.safetensors").read_bytes()

    assert trained("plain") == trained("changed", "training.gradient_checkpointing=full")


def test_half_precision_files_are_merged_as_they_were_in_training(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Files in float16 are loaded in bfloat16 unless asked otherwise."""
    stored = load(tiny_dir("llama"), dtype="float16")
    save_model(stored.model, stored.tokenizer, tmp_path / "base")
    base = load(tmp_path / "base")
    assert base.dtype == torch.bfloat16
    attach(base.model, settings())
    shake(base.model)
    save_adapter(base.model, tmp_path / "a")
    merge(tmp_path / "a", tmp_path / "m")
    merged = load(tmp_path / "m", dtype="bfloat16").model
    for path, layer in quantized_modules(merged).items():
        live: Any = base.model.get_submodule(path)
        wanted = live.adapters["default"].quantized_weight(live.base, live.base.dense_weight(None))
        assert same(layer.quantized_weight, wanted), path


def test_codes_follow_values_that_are_written_without_a_trace(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    attach(model, settings())
    shake(model)
    model.eval()
    with torch.no_grad():
        before = model(IDS).logits
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.data.mul_(3)
        after = model(IDS).logits
    assert not torch.equal(before, after)
