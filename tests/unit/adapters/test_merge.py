"""A merged directory gives the logits of the live model it replaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft.models.load as models
from graft.adapters.attach import adapter_tensors, adapters_of, attach
from graft.adapters.fold import merge_into
from graft.adapters.lora import LoraConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.errors import AdapterError, FingerprintError, StorageError
from graft.quant.config import QuantizationConfig

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))

EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}
NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(directory: Path, out: Path, config: LoraConfig, scale: float = 0.05, **load: Any) -> torch.Tensor:
    """Save an adapter that is not zero; return the logits of the live model."""
    base = models.load(directory, **load)
    attach(base.model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in adapter_tensors(base.model).values():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    save_adapter(base.model, out, facts={"run": "test"})
    return logits(base.model)


CONFIGS: dict[str, Callable[[str], LoraConfig]] = {
    "all-linear": lambda family: LoraConfig(rank=4, alpha=6, use_rslora=True),
    "embedding": lambda family: LoraConfig(rank=3, target_modules=(EMBEDDING.get(family, "embed_tokens"),)),
    "head": lambda family: LoraConfig(rank=3, target_modules=("lm_head",)),
    "saved": lambda family: LoraConfig(
        rank=2, modules_to_save=(EMBEDDING.get(family, "embed_tokens"), NORM.get(family, "norm"))
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_merged_directory_equals_the_live_model_in_transformers(
    tiny_dir: Callable[..., Path], tiny_family: str, case: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny_dir(tiny_family)
    live = trained(directory, tmp_path / "a", CONFIGS[case](tiny_family))
    report = merge(tmp_path / "a", tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), live, atol=1e-5, rtol=1e-5)
    assert report.logit_gap < 1e-5 * max(1, float(live.abs().max()))
    assert report.adapter_effect > 1e-2
    assert report.folded_into == "dense"
    tied = models.load(directory).model.config.tie_word_embeddings
    assert report.untied == (tied and case != "all-linear")
    assert merged.config.tie_word_embeddings == (tied and not report.untied)
    assert report.fingerprint == models.load(tmp_path / "m").fingerprint


# Which half of a tied pair is trained in full, and what the other one must stay.
HALVES = {"embedding": "get_output_embeddings", "head": "get_input_embeddings"}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt2"])
def test_one_half_of_a_tied_pair_trained_in_full(
    tiny_dir: Callable[..., Path], family: str, half: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    name = EMBEDDING.get(family, "embed_tokens") if half == "embedding" else "lm_head"
    base = models.load(tiny_dir(family)).model
    live = trained(tiny_dir(family), tmp_path / "a", LoraConfig(target_modules=(), modules_to_save=(name,)))
    report = merge(tmp_path / "a", tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    assert report.untied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    # Only the order of sums differs: a part in 1e5 of the logits.
    torch.testing.assert_close(logits(merged), live, atol=1e-5, rtol=1e-5)
    assert float((logits(base) - live).abs().max()) > 1e-2
    kept = HALVES[half]
    assert torch.equal(getattr(merged, kept)().weight, base.get_input_embeddings().weight)
    changed = "get_input_embeddings" if half == "embedding" else "get_output_embeddings"
    assert not torch.equal(getattr(merged, changed)().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_gpt2_qlora_merges_into_the_transposed_layout(
    tiny_dir: Callable[..., Path], quant_type: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from graft.quant.linear import quantized_modules

    base = models.load(tiny_dir("gpt2"), quantization=quant_type)
    dense = models.load(tiny_dir("gpt2")).model
    paths = {path for path, module in dense.named_modules() if isinstance(module, Conv1D)}
    assert set(quantized_modules(base.model)) == paths
    live = trained(tiny_dir("gpt2"), tmp_path / "a", LoraConfig(rank=4), quantization=quant_type)
    merge(tmp_path / "a", tmp_path / "m", from_quantized=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    # fp32 against fp32: only the order of sums differs.
    assert float((logits(merged) - live).abs().max()) < 1e-5
    assert float((logits(base.model) - live).abs().max()) > 1e-2


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_both_halves_of_a_tied_pair_trained_in_full(
    tiny_dir: Callable[..., Path], quantization: str | None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = LoraConfig(rank=2, modules_to_save=("embed_tokens", "lm_head"))
    live = trained(tiny_dir("qwen2"), tmp_path / "a", config, quantization=quantization)
    report = merge(tmp_path / "a", tmp_path / "m", from_quantized=quantization is not None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert report.untied
    assert not merged.config.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    # Only the order of sums differs: a part in 1e5 of the logits.
    torch.testing.assert_close(logits(merged), live, atol=1e-5, rtol=1e-5)


def test_untied_halves_stay_what_they_were(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_dir("qwen2")
    trained(directory, tmp_path / "a", LoraConfig(target_modules=("embed_tokens",)))
    merge(tmp_path / "a", tmp_path / "m")
    before, after = models.load(directory).model, models.load(tmp_path / "m").model
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("into", ["auto", "dense", "dequantized", "requantized"])
def test_every_way_of_merging_a_qlora_adapter_is_measured(
    tiny_dir: Callable[..., Path], family: str, into: Any, tmp_path: Path
) -> None:
    quantization = QuantizationConfig(quant_type="nf4", double_quant=True)
    live = trained(tiny_dir(family), tmp_path / "a", LoraConfig(rank=4), quantization=quantization)
    report = merge(tmp_path / "a", tmp_path / "m", into=into)
    found = {item.name: item for item in report.candidates}
    assert list(found) == ["dense", "dequantized", "requantized", "requantized_dense"]
    assert found["dequantized"].gap < 1e-4 < min(found[name].gap for name in found if name != "dequantized")
    codes = min(("requantized", "requantized_dense"), key=lambda name: found[name].kl)
    wanted = {"auto": "dequantized", "requantized": codes}.get(into, into)
    assert report.folded_into == wanted
    assert report.logit_gap == pytest.approx(found[wanted].gap, abs=1e-6)
    merged = models.load(tmp_path / "m")
    assert (merged.quantization is not None) == (into == "requantized")
    close = float((logits(merged.model) - live).abs().max()) < 1e-4
    assert close == (wanted == "dequantized")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_dtype_of_the_written_weights(
    tiny_dir: Callable[..., Path], dtype: str | None, tmp_path: Path
) -> None:
    from safetensors import safe_open

    trained(tiny_dir("llama"), tmp_path / "a", LoraConfig(rank=4))
    report = merge(tmp_path / "a", tmp_path / "m", dtype=dtype)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        written = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 - not a dict
    assert written == {getattr(torch, dtype or "float32")}
    assert report.dtype == (dtype or "float32")


def test_weights_are_summed_in_fp32_and_rounded_once(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = models.load(tiny_dir("llama"), dtype="bfloat16")
    attach(base.model, LoraConfig(rank=4, alpha=16, target_modules=("q_proj",)))
    layer = base.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.adapters["default"].lora_B, std=0.01)
    update = 4.0 * (layer.adapters["default"].lora_B @ layer.adapters["default"].lora_A)
    expected = (layer.weight.float() + update).bfloat16()
    merge_into(base.model)
    assert torch.equal(base.model.model.layers[0].self_attn.q_proj.weight, expected)
    assert adapters_of(base.model) == {}


def test_second_merge_of_the_same_adapter_is_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_dir("llama")
    trained(directory, tmp_path / "a", LoraConfig(rank=4))
    merge(tmp_path / "a", tmp_path / "m")
    for force in (False, True):
        with pytest.raises(AdapterError, match="already folded"):
            merge(tmp_path / "a", tmp_path / "m2", base=tmp_path / "m", force_base=force)
    assert not (tmp_path / "m2").exists()


def test_merging_another_adapter_keeps_the_lineage(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    trained(tiny_dir("llama"), tmp_path / "a", LoraConfig(rank=4))
    merge(tmp_path / "a", tmp_path / "m")
    trained(tmp_path / "m", tmp_path / "b", LoraConfig(rank=2))
    merge(tmp_path / "b", tmp_path / "m2")
    names = [item["tensors"] for item in json.loads((tmp_path / "m2" / "graft.json").read_text())["adapters"]]
    digests = [json.loads((tmp_path / x / "graft.json").read_text())["tensors"] for x in ("a", "b")]
    assert names == digests
    with pytest.raises(AdapterError, match="already folded"):
        merge(tmp_path / "a", tmp_path / "m3", base=tmp_path / "m2", force_base=True)


def test_another_base_is_refused_unless_forced(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    trained(tiny_dir("llama"), tmp_path / "a", LoraConfig(rank=4))
    other = tiny_dir("llama", rms_norm_eps=1e-5)
    shaken = models.load(other)
    with torch.no_grad():
        shaken.model.lm_head.weight.add_(0.1)
    from graft.models.save import save_model

    save_model(shaken.model, shaken.tokenizer, tmp_path / "other")
    with pytest.raises(FingerprintError, match="--force-base") as caught:
        merge(tmp_path / "a", tmp_path / "m", base=tmp_path / "other")
    for directory in (other, tmp_path / "other"):
        assert models.load(directory).fingerprint.weights[:12] in str(caught.value)
    report = merge(tmp_path / "a", tmp_path / "m", base=tmp_path / "other", force_base=True)
    assert report.forced_base
    assert json.loads((tmp_path / "m" / "graft.json").read_text())["merge"]["forced_base"] is True


def test_refusals(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    trained(tiny_dir("llama"), tmp_path / "a", LoraConfig(rank=4))
    with pytest.raises(AdapterError, match="from_quantized cannot act"):
        merge(tmp_path / "a", tmp_path / "m", from_quantized=True)
    with pytest.raises(AdapterError, match="not a dtype"):
        merge(tmp_path / "a", tmp_path / "m", dtype="int8")
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="already exists"):
        merge(tmp_path / "a", tmp_path / "there")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(AdapterError, match="which base"):
        merge(tmp_path / "a", tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "there"]
    base = models.load(tiny_dir("llama"), quantization="nf4")
    load_adapter(base.model, tmp_path / "a")
    with pytest.raises(AdapterError, match="is quantized"):
        merge_into(base.model)
