"""Directories that graft writes: shards, the files beside them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.errors import ModelError, StorageError
from graft.models import save as saving
from graft.models.load import load
from graft.models.save import checkpoint_tensors, save_model, save_tensors


def test_files_beside_the_weights(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))
    base.tokenizer.chat_template = "{{ messages }}"
    base.model.generation_config.max_new_tokens = 77
    save_model(base.model, base.tokenizer, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_new_tokens == 77
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config


def test_dtype_of_the_files(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))
    save_model(base.model, base.tokenizer, tmp_path / "half", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, base.model.get_parameter(name).to(torch.bfloat16)), name
    assert load(tmp_path / "half").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_shards_keep_to_the_size_and_the_index_is_right(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))
    save_model(base.model, base.tokenizer, tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    total = 0
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total


def test_tensors_of_any_dtype_and_layout_come_back(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "after an odd place": torch.randn(4, 5),
        "transposed": torch.randn(4, 5).T,
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        'quote"d é': torch.randn(2),
    }
    save_tensors(tensors.items(), tmp_path / "out", base.model.config, None)
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
        found |= load_file(file)
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":  # a reader that maps the file wants whole items
                assert (start + entry["data_offsets"][0]) % tensors[name].dtype.itemsize == 0
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_header_that_is_full_begins_a_new_file(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))
    tensors = {f"{'long' * 40}.{index}": torch.tensor([float(index)]) for index in range(600)}
    save_tensors(tensors.items(), tmp_path / "out", base.model.config, None)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert {name: value.item() for name, value in found.items()} == {
        name: value.item() for name, value in tensors.items()
    }


def test_tensors_are_asked_for_one_at_a_time(tiny_dir, tmp_path, monkeypatch):
    base = load(tiny_dir("llama"))
    order = []
    write = saving._Shard.write
    monkeypatch.setattr(
        saving._Shard, "write", lambda shard, name, tensor: (order.append(name), write(shard, name, tensor))
    )

    def stream():
        for name in ("a", "b"):
            order.append(f"make {name}")
            yield name, torch.zeros(3)

    save_tensors(stream(), tmp_path / "out", base.model.config, None)
    assert order == ["make a", "a", "make b", "b"]


def test_an_existing_directory_is_left_alone(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="already exists"):
        save_model(base.model, base.tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_stream_that_breaks_leaves_nothing(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))

    def stream():
        yield "a", torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_tensors(stream(), tmp_path / "out", base.model.config, base.tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_adapters_is_refused(tiny_dir, tmp_path):
    base = load(tiny_dir("llama"))
    attention = base.model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    with pytest.raises(ModelError, match=r"q_proj\.0"):
        save_model(base.model, base.tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tensors_have_the_names_of_the_checkpoint(tiny_dir, tiny_family):
    base = load(tiny_dir(tiny_family), quantization="nf4")
    names = dict(checkpoint_tensors(base.model))
    stored = load_file(tiny_dir(tiny_family) / "model.safetensors")
    assert set(names) == set(stored)
    assert all(names[name].shape == stored[name].shape for name in names)
