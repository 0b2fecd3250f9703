"""Directories that graft quantizes: written, read again, loaded through transformers, merged into."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import graft
from graft.errors import ConfigError, ModelError, StorageError, TrainingError
from graft.models.dense import make_dense
from graft.models.load import load
from graft.models.quantize import quantize
from graft.quant import QuantizationConfig, quantized_modules

IDS = torch.arange(3, 43)[None]
CONFIGS = [
    QuantizationConfig(),
    QuantizationConfig(quant_type="fp4", double_quant=False),
    QuantizationConfig(quant_type="e2m1", blocksize=32),
    QuantizationConfig(quant_type="int8", skip_modules=("o_proj",)),
    QuantizationConfig(quant_type="nf3", blocksize=128),
    QuantizationConfig(quant_type="nf2", double_quant=False),
    QuantizationConfig(quant_type="int4", hqq=True),
    QuantizationConfig(quant_type="int3", double_quant=False),
    QuantizationConfig(quant_type="int2"),
]


def assert_same_model(directory: Path, source: Path, config: QuantizationConfig) -> None:
    expected, base = load(source, quantization=config), load(directory)
    layers = quantized_modules(base.model)
    assert set(layers) == set(quantized_modules(expected.model))
    for path, layer in layers.items():
        same = expected.model.get_submodule(path).quantized_weight
        assert layer.quantized_weight.to_bytes() == same.to_bytes(), path
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, expected.model(IDS).logits)
    assert base.quantization == config
    assert base.fingerprint == expected.fingerprint


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.quant_type)
def test_every_format_comes_back_as_if_quantized_at_load(tiny_dir, tmp_path, config):
    report = quantize(tiny_dir("llama"), config, tmp_path / "out")
    assert_same_model(tmp_path / "out", tiny_dir("llama"), config)
    assert report.layout == ("bitsandbytes" if config.quant_type in ("nf4", "fp4") else "graft")
    assert load(tiny_dir("llama")).fingerprint.weights == report.source_weights != report.weights


def test_every_family_in_both_layouts(tiny_dir, tmp_path, tiny_family):
    for quant_type in ("nf4", "int8"):
        quantize(tiny_dir(tiny_family), quant_type, tmp_path / quant_type)
        config = QuantizationConfig(quant_type=quant_type)
        assert_same_model(tmp_path / quant_type, tiny_dir(tiny_family), config)


SIZES = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def moe_dir(tiny_dir, tmp_path):
    """A tiny model with experts, which transformers fuses."""

    def make(family: str) -> Path:
        name = "num_experts" if family == "qwen3_moe" else "num_local_experts"
        config = AutoConfig.for_model(
            family, **SIZES, **{name: 4}, num_experts_per_tok=2, tie_word_embeddings=False
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.2)
        model.save_pretrained(tmp_path / "moe")
        AutoTokenizer.from_pretrained(tiny_dir("llama")).save_pretrained(tmp_path / "moe")
        return tmp_path / "moe"

    return make


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_quantized_one_by_one(moe_dir, tmp_path, family):
    report = quantize(moe_dir(family), "nf4", tmp_path / "out")
    assert report.layout == "graft"
    assert report.num_quantized == 4 + 3 * 4
    assert_same_model(tmp_path / "out", tmp_path / "moe", QuantizationConfig())
    through, direct = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load(tmp_path / "out").model
    with torch.no_grad():
        assert torch.equal(through(IDS).logits, direct(IDS).logits)


def test_sizes_and_bits_are_those_of_the_files(tiny_dir, tmp_path):
    # Rows of 60: blocks, absmax and texts of odd sizes, which must not lie between wider items.
    source = tiny_dir("llama", hidden_size=60, intermediate_size=76, head_dim=6)
    for quant_type in ("nf4", "int3"):
        out = tmp_path / quant_type
        report = quantize(source, quant_type, out)
        tensors = load_file(out / "model.safetensors")
        config = QuantizationConfig(quant_type=quant_type)
        layers = quantized_modules(load(source, quantization=config).model)
        sizes = {path: config.num_bytes(q.in_features * q.out_features) for path, q in layers.items()}
        assert report.quantized_bytes == sum(sizes.values())
        dense = {n: t for n, t in tensors.items() if not any(n.startswith(f"{path}.") for path in layers)}
        assert report.dense_bytes == sum(t.numel() * t.element_size() for t in dense.values())
        num_weights = sum(q.in_features * q.out_features for q in layers.values())
        assert report.bits_per_weight == pytest.approx(8 * sum(sizes.values()) / num_weights)
        assert report.num_bytes == report.quantized_bytes + report.dense_bytes < report.source_bytes


def test_shards(tiny_dir, tmp_path):
    quantize(tiny_dir("llama"), "int4", tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert_same_model(tmp_path / "out", tiny_dir("llama"), QuantizationConfig(quant_type="int4"))


def test_dense_tensors_keep_their_bytes_and_dtype(tiny_dir, tmp_path):
    source = Path(shutil.copytree(tiny_dir("qwen2"), tmp_path / "source"))
    quantize(source, "int8", tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    both = set(before) & set(after)
    assert "model.embed_tokens.weight" in both
    for name in both:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name


def test_files_that_go_with_the_model_are_carried_over(tiny_dir, tmp_path):
    source = Path(shutil.copytree(tiny_dir("llama"), tmp_path / "source"))
    (source / "LICENSE.txt").write_text("terms")
    (source / "NOTICE").write_text("whose")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"max_length": 33}')
    (source / "tokenizer_code.py").write_text("code")
    report = quantize(source, "nf4", tmp_path / "out")
    for name in ("LICENSE.txt", "NOTICE", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
        assert name in report.companions
    assert not (tmp_path / "out" / "tokenizer_code.py").exists()
    assert load(tmp_path / "out").model.generation_config.max_length == 33
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept.pop("quantization_config")["quant_method"] == "bitsandbytes"
    assert kept == json.loads((source / "config.json").read_text())


def test_places_that_are_taken(tiny_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    quantize(tiny_dir("llama"), "nf4", out)  # an empty directory is no loss
    with pytest.raises(StorageError, match="already exists"):
        quantize(tiny_dir("llama"), "int8", out)
    quantize(tiny_dir("llama"), "int8", out, overwrite=True)
    assert load(out).quantization == QuantizationConfig(quant_type="int8")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years")
    with pytest.raises(StorageError, match="no model directory"):
        quantize(tiny_dir("llama"), "nf4", tmp_path / "papers", overwrite=True)
    copy = Path(shutil.copytree(tiny_dir("llama"), tmp_path / "copy"))
    with pytest.raises(StorageError, match="the model itself"):
        quantize(copy, "nf4", copy, overwrite=True)


def test_a_failed_write_leaves_nothing(tiny_dir, tmp_path):
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_dir("llama"), "nf4", tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_size_of_the_source(tiny_dir, tmp_path):
    told: list[tuple[int, int]] = []
    report = quantize(tiny_dir("llama"), "nf4", tmp_path / "out", progress=lambda *step: told.append(step))
    assert told[-1] == (report.source_bytes, report.source_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_what_contradicts_the_files_is_refused(tiny_dir, tmp_path):
    out = tmp_path / "out"
    quantize(tiny_dir("llama"), QuantizationConfig(blocksize=32, skip_modules=("o_proj",)), out)
    assert load(out, quantization="nf4").quantization.blocksize == 32  # a name asks for no more than the type
    assert load(out, quantization=QuantizationConfig(blocksize=32)).quantization.skip_modules == ("o_proj",)
    for asked in (
        "fp4",
        QuantizationConfig(),
        QuantizationConfig(blocksize=32, double_quant=False),
        QuantizationConfig(blocksize=32, skip_modules=("q_proj",)),
    ):
        with pytest.raises(ModelError, match="cannot be loaded as") as caught:
            load(out, quantization=asked)
        assert "leave quantization out" in caught.value.fix
    with pytest.raises(ConfigError, match="nf5"):
        load(out, quantization="nf5")
    with pytest.raises(ModelError, match="already quantized by bitsandbytes"):
        quantize(out, "nf4", tmp_path / "again")


@pytest.mark.parametrize("quant_type", ["nf4", "int3"])
def test_an_adapter_on_it_is_merged_into_the_decoded_weights(tiny_dir, tmp_path, quant_type):
    out = tmp_path / "out"
    quantize(tiny_dir("llama"), quant_type, out)
    base = load(out)
    graft.attach(base.model, graft.LoraConfig(rank=4))
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    graft.save_adapter(base.model, tmp_path / "adapter")
    report = graft.merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.folded_into == "dequantized"
    assert [item.name for item in report.candidates] == ["dequantized", "requantized"]
    assert report.logit_gap < 1e-4 < report.adapter_effect
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, base.model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_adapters_go_with_the_base_quantized_at_load_and_once(tiny_dir, tmp_path):
    quantize(tiny_dir("llama"), "nf4", tmp_path / "out")
    for trained, used in ((tiny_dir("llama"), tmp_path / "out"), (tmp_path / "out", tiny_dir("llama"))):
        base = load(trained, quantization="nf4")
        graft.attach(base.model, graft.LoraConfig(rank=4))
        for name, parameter in base.model.named_parameters():
            if "lora_B" in name:  # an adapter without effect would be noted
                parameter.data.fill_(0.01)
        graft.save_adapter(base.model, tmp_path / f"on-{trained.name}")
        adapter = graft.load_adapter(load(used, quantization="nf4").model, tmp_path / f"on-{trained.name}")
        assert adapter.notes == []
        assert not adapter.forced_base
    report = graft.merge(tmp_path / "on-out", tmp_path / "merged", base=tiny_dir("llama"))
    assert report.folded_into == "dequantized"  # the closer one of the two that there are
    assert "dense" in [item.name for item in report.candidates]


def test_changed_codes_are_another_base(tiny_dir, tmp_path):
    report = quantize(tiny_dir("llama"), "nf4", tmp_path / "out")
    tensors = {n: t.clone() for n, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    tensors["model.layers.0.mlp.up_proj.weight"][5] ^= 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert load(tmp_path / "out").fingerprint.weights not in (report.source_weights, report.weights)


def test_codes_are_not_trained_in_full(tiny_dir, tmp_path):
    quantize(tiny_dir("llama"), "nf4", tmp_path / "out")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    from graft.training.build import run_from_config
    from graft.training.config import ModelConfig, RunConfig

    config = RunConfig(
        model=ModelConfig(name=str(tmp_path / "out")),
        data=graft.DataConfig(train=str(rows)),
        output=str(tmp_path / "run"),
        adapter=None,
    )
    with pytest.raises(TrainingError, match="codes cannot be trained"):
        run_from_config(config)


def test_made_dense_it_computes_the_same(tiny_dir, tmp_path, tiny_family):
    quantize(tiny_dir(tiny_family), "int8", tmp_path / "out")
    base, dense = load(tmp_path / "out").model, load(tmp_path / "out").model
    assert make_dense(dense) == len(quantized_modules(base))
    assert quantized_modules(dense) == {}
    assert make_dense(dense) == 0
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, base(IDS).logits, atol=1e-4, rtol=1e-4)


# Through transformers


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_transformers_loads_the_same_model(tiny_dir, tmp_path, family):
    quantize(tiny_dir(family), "int4", tmp_path / "out", max_shard_bytes=30_000)
    model, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(facts.values()), facts
    base = load(tmp_path / "out")
    layers = quantized_modules(model)
    for path, layer in quantized_modules(base.model).items():
        assert layers[path].quantized_weight.to_bytes() == layer.quantized_weight.to_bytes()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base.model(IDS).logits)
    prompt = IDS[:, :5]
    ours, theirs = (
        m.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (base.model, model)
    )
    assert torch.equal(ours, theirs)


def test_what_transformers_saves_loads_again(tiny_dir, tmp_path):
    quantize(tiny_dir("llama"), "nf3", tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").fingerprint == load(tmp_path / "out").fingerprint


def test_adapters_on_a_model_that_transformers_loaded(tiny_dir, tmp_path):
    peft = pytest.importorskip("peft")
    quantize(tiny_dir("llama"), "int4", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"QuantizedLinear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapter = graft.attach(model, graft.LoraConfig(target_modules=("q_proj", "v_proj")))
    model.train()(IDS, labels=IDS).loss.backward()
    assert len(adapter.targets) == 4
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_a_transformers_that_was_not_tested_is_refused(tiny_dir, tmp_path, monkeypatch):
    quantize(tiny_dir("llama"), "int4", tmp_path / "out")
    from graft.models import transformers_door

    for version in ("5.22.9", "6.0.0"):
        monkeypatch.setattr(transformers_door, "__version__", version)
        with pytest.raises(ImportError, match=version):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


IMPORTS = {
    "graft first": """
import graft
assert not {"torch", "transformers"} & set(sys.modules)
import transformers.quantizers.auto as registry
""",
    "transformers first": """
import transformers.quantizers.auto as registry
import graft
""",
    "transformers began": """
import transformers
import graft
import transformers.quantizers.auto as registry
""",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_import_graft_is_enough_in_any_order(order):
    # That a directory then loads is shown above; here without the seconds that the model classes take.
    code = f"""
import sys
{IMPORTS[order]}
from graft.models.transformers_hook import _Waiting, install
install()
assert not any(isinstance(finder, _Waiting) for finder in sys.meta_path)
assert type(registry.__loader__).__name__ == "SourceFileLoader"
assert registry.__spec__.loader is registry.__loader__
print(registry.AUTO_QUANTIZER_MAPPING["graft"].__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "GraftQuantizer"


@pytest.mark.parametrize("config", [None, 4, {"quant_type": "int3"}])
def test_what_is_no_quantization_is_refused(config: object, tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        quantize("builtin", config, tmp_path / "out")  # type: ignore[arg-type]
    assert "QuantizationConfig" in error.value.fix
    assert not (tmp_path / "out").exists()
