"""4-bit directories of bitsandbytes, read and written: the same bytes, the same weights, the same logits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import graft
from graft.models.load import load
from graft.models.quantize import quantize
from graft.quant import QuantizationConfig, QuantizedLinear, quantized_modules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(3, 43)[None]
SUMS = {"rtol": 1e-4, "atol": 1e-4}
"""Both add up in float32, in different orders; a layer's products are 1e-6 apart, some layers on more."""
# The peer's kernel for CPUs begins blocks anew with every row: right only where rows are whole blocks.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(autouse=True)
def _no_compiling():
    """The peer compiles its fallback for decoding, a minute of C++ for every new shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def wide_dir(tiny_dir):
    def make(family: str) -> Path:
        return tiny_dir(family, **WIDE, **({"n_inner": 256} if family == "gpt2" else {}))

    return make


@pytest.fixture
def theirs(wide_dir, tmp_path):
    """A directory as transformers and bitsandbytes write it."""

    def make(family: str, quant_type: str = "nf4", double_quant: bool = True) -> Path:
        out = tmp_path / "theirs"
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
        )
        model = AutoModelForCausalLM.from_pretrained(
            wide_dir(family), quantization_config=settings, dtype=torch.float32
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(wide_dir(family)).save_pretrained(out)
        return out

    return make


def reference(directory: Path):
    model = AutoModelForCausalLM.from_pretrained(directory)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.train()  # multiplies by the decoded weight; in eval mode it repacks with bfloat16 scales
    return model


def stored_parts(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    weight = layer.quantized_weight
    parts = {"weight": weight.codes, "weight.absmax": weight.absmax}
    if weight.absmax_scale is not None:
        parts["weight.nested_absmax"] = weight.absmax_scale
    return {name: part.reshape(-1) for name, part in parts.items()}


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_reads_their_bytes_as_they_are(theirs, quant_type, double_quant):
    directory = theirs("llama", quant_type, double_quant)
    base = load(directory)
    files = load_file(directory / "model.safetensors")
    packed = {name.rpartition(".quant_state")[0] for name in files if ".quant_state" in name}
    layers = quantized_modules(base.model)
    assert {f"{path}.weight" for path in layers} == packed
    for path, layer in layers.items():
        for name, part in stored_parts(layer).items():
            assert torch.equal(part, files[f"{path}.{name}"].reshape(-1)), (path, name)
    for path, layer in layers.items() if double_quant else ():
        state = json.loads(bytes(files[f"{path}.weight.quant_state.bitsandbytes__{quant_type}"].tolist()))
        assert float(layer.quantized_weight.absmax_offset) == state["nested_offset"]
    assert base.quantization == QuantizationConfig(quant_type=quant_type, double_quant=double_quant)
    assert torch.equal(base.model.get_input_embeddings().weight, files["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "phi3", "gpt_neox"])
def test_weights_and_logits_are_theirs(theirs, family):
    directory = theirs(family)
    base, peer = load(directory), reference(directory)
    for path, layer in quantized_modules(base.model).items():
        weight = peer.get_submodule(path).weight
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(layer.dense_weight(), decoded), path
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, peer(IDS).logits, **SUMS)


def test_the_dtype_of_computation_may_be_another(theirs):
    directory = theirs("llama")
    wide, narrow = load(directory), load(directory, dtype="bfloat16")
    for path, layer in quantized_modules(narrow.model).items():
        same = wide.model.get_submodule(path).quantized_weight
        assert layer.quantized_weight.to_bytes() == same.to_bytes()
    assert narrow.fingerprint == wide.fingerprint


def test_the_fingerprint_is_stable_and_tells_weights_apart(theirs, wide_dir):
    directory = theirs("llama")
    first = load(directory).fingerprint
    assert load(directory).fingerprint == first
    assert first.differences(load(wide_dir("llama"), quantization="nf4").fingerprint) == ["weights"]


def shard(directory: Path) -> None:
    """The parts of a weight in different files, as a large model has them at the edge of a shard."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    homes = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: tensors[n] for n in homes if homes[n] == file}, directory / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_parts_may_lie_in_different_shards(theirs):
    directory = theirs("llama")
    whole = load(directory)
    shard(directory)
    parts = load(directory)
    assert parts.fingerprint == whole.fingerprint
    assert torch.equal(parts.model(IDS).logits, whole.model(IDS).logits)


def test_codes_kept_in_another_dtype_are_the_same_bytes(theirs):
    # bnb_4bit_quant_storage, for shardings that want one dtype everywhere.
    directory = theirs("llama")
    whole = load(directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8 and name.endswith(".weight"):
            tensors[name] = tensor.view(-1).view(torch.bfloat16)[:, None].contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(directory).model(IDS).logits, whole.model(IDS).logits)


SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("family", "experts"), [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")]
)
def test_experts_that_an_older_writer_quantized_one_by_one(tiny_dir, tmp_path, family, experts):
    # Before transformers 5 each expert was a module of its own, which bitsandbytes quantized.
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **{experts: 11}))
    model.save_pretrained(dense)
    AutoTokenizer.from_pretrained(tiny_dir("llama")).save_pretrained(dense)
    shutil.copytree(dense, packed)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(dense / "model.safetensors").items():
        linear = value.dim() == 2 and not re.search(r"embed|lm_head|\.gate\.weight", name)
        if not linear:
            tensors[name] = value
            continue
        layer = bnb.nn.Linear4bit(*reversed(value.shape), bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(value, requires_grad=False, quant_type="nf4", module=layer)
        tensors |= {
            name.removesuffix("weight") + leaf: part for leaf, part in layer.to("cpu").state_dict().items()
        }
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    expected, base = load(dense, quantization="nf4"), load(packed)
    layers = quantized_modules(base.model)
    assert len(layers) == 4 + 3 * 11
    for path, layer in layers.items():
        same = expected.model.get_submodule(path).quantized_weight
        assert layer.quantized_weight.to_bytes() == same.to_bytes(), path
    assert torch.equal(base.model(IDS).logits, expected.model(IDS).logits)


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig(quant_type="fp4", double_quant=False, blocksize=128),
        QuantizationConfig(skip_modules=("v_proj",)),
    ],
    ids=str,
)
def test_they_load_what_we_write(wide_dir, tmp_path, config):
    out = tmp_path / "ours"
    report = quantize(wide_dir("llama"), config, out)
    assert report.layout == "bitsandbytes"
    base, peer = load(out), reference(out)
    layers = quantized_modules(base.model)
    theirs = {path for path, module in peer.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert set(layers) == theirs
    assert len(theirs) == report.num_quantized == (14 if not config.skip_modules else 12)
    for path, layer in layers.items():
        weight = peer.get_submodule(path).weight
        assert weight.quant_state.blocksize == config.blocksize
        assert weight.quant_state.nested is config.double_quant
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(layer.dense_weight(), decoded), path
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, peer(IDS).logits, **SUMS)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_they_load_other_families_too(wide_dir, tmp_path, family):
    graft.quantize(wide_dir(family), "nf4", tmp_path / "ours")
    base, peer = load(tmp_path / "ours"), reference(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, peer(IDS).logits, **SUMS)


def test_we_write_what_they_would(wide_dir, theirs, tmp_path):
    graft.quantize(wide_dir("llama"), "nf4", tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    peers = load_file(theirs("llama") / "model.safetensors")
    assert set(ours) == set(peers)
    for name, tensor in ours.items():
        if ".quant_state" in name:
            told, expected = (json.loads(bytes(t.tolist())) for t in (tensor, peers[name]))
            offsets = [told.pop("nested_offset"), expected.pop("nested_offset")]
            assert told == expected
            assert offsets[0] == pytest.approx(
                offsets[1], rel=1e-6
            )  # sums of the peer differ in the last bit
        elif name.endswith(("absmax", "nested_absmax")):
            close = (tensor.float() - peers[name].float()).abs().max()
            assert close <= 1, name
        else:
            assert torch.equal(tensor, peers[name].reshape(tensor.shape)), name
