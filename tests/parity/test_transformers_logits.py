"""Loaded models answer exactly as transformers' own from_pretrained, family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from graft.kernels import wide
from graft.kernels.cpu import library
from graft.models.families import FAMILIES, head, hidden_states
from graft.models.load import load, random_model
from graft.models.save import save_model
from graft.quant.linear import quantized_modules

# Mixtures multiply one matrix at a time, where transformers stacks them: test_experts.py is theirs.
DENSE = sorted(name for name, family in FAMILIES.items() if not family.mixture)

# Every family of the table, and the settings in which families differ from themselves.
CASES: dict[str, tuple[str, dict]] = {name: (name, {}) for name in DENSE} | {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2, yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen3, linear rope": (
        "qwen3",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 2.5, 3.0, 4.0],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2, sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox, tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "cohere, scaled": ("cohere", {"logit_scale": 0.25}),
    "granite, scaled": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
}


@pytest.fixture(params=sorted(CASES))
def directory(request, tiny_dir):
    family, overrides = CASES[request.param]
    return tiny_dir(family, **overrides)


@pytest.fixture(params=[*DENSE, "qwen2, sliding", "gpt2, untied"])
def family_dir(request, tiny_dir):
    family, overrides = CASES[request.param]
    return tiny_dir(family, **overrides)


def ids_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def test_logits_and_buffers_are_bit_equal(directory):
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    ours = load(directory)
    ids = ids_of((2, 24))
    assert torch.equal(logits_of(ours.model, ids), logits_of(theirs, ids))
    assert ours.dtype == torch.float32
    assert not ours.model.training
    for name, ours_, theirs_ in [
        (name, ours.model.get_buffer(name), value) for name, value in theirs.named_buffers()
    ]:
        assert ours_.dtype == theirs_.dtype, name
        assert torch.equal(ours_, theirs_), name
    assert not any(x.is_meta for x in [*ours.model.parameters(), *ours.model.buffers()])


def test_tied_weights_are_one_tensor(family_dir):
    for quantization in (None, "nf4"):
        base = load(family_dir, quantization=quantization)
        same = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
        assert same == base.model.config.tie_word_embeddings


def test_bfloat16_is_bit_equal(directory, monkeypatch):
    # Where the processor has its products; elsewhere ours are made in float32, see test_wide_layers.py.
    monkeypatch.setattr(wide, "_has_products", lambda dtype: True)
    monkeypatch.setattr(library, "has_attention", lambda: False)  # see test_attention.py
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ours = load(directory, dtype="bfloat16")
    ids = ids_of((1, 24))
    assert torch.equal(logits_of(ours.model, ids), logits_of(theirs, ids))


def test_head_of_hidden_states_is_the_model(directory):
    for quantization in (None, "nf4"):
        model = load(directory, quantization=quantization).model
        ids = ids_of((2, 24))
        with torch.no_grad():
            assert torch.equal(head(model, hidden_states(model, ids)), logits_of(model, ids))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_packed_documents_do_not_see_each_other(family_dir, quantization):
    model = load(family_dir, quantization=quantization).model
    lengths = [[7, 12, 5], [20, 1, 3]]
    rows = ids_of((2, 24))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = head(model, hidden_states(model, rows, positions))
        assert torch.equal(packed, model(rows, position_ids=positions, use_cache=False).logits)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            alone = logits_of(model, rows[row : row + 1, start : start + length])[0]
            # fp32 sums in another order: about 1e-6 of logits of size 1 to 10
            torch.testing.assert_close(packed[row, start : start + length], alone, rtol=1e-4, atol=1e-4)
            start += length


def test_saved_copy_is_the_model(family_dir, tmp_path):
    base = load(family_dir)
    written = save_model(base.model, base.tokenizer, tmp_path / "copy", max_shard_bytes=40_000)
    ids = ids_of((2, 24))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
    ours = load(tmp_path / "copy")
    assert torch.equal(logits_of(theirs, ids), logits_of(base.model, ids))
    assert torch.equal(logits_of(ours.model, ids), logits_of(base.model, ids))
    assert theirs.config.tie_word_embeddings == base.model.config.tie_word_embeddings
    assert ours.fingerprint == written
    assert ours.fingerprint == base.fingerprint
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 1


def test_quantized_model_is_saved_dense(family_dir, tmp_path):
    base = load(family_dir, quantization="nf4")
    save_model(base.model, base.tokenizer, tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not quantized_modules(theirs)
    ids = ids_of((2, 24))
    # the decoded weights are the same numbers; the products of a Conv1D sum in another order
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(base.model, ids), rtol=1e-4, atol=1e-4)
    assert theirs.config.tie_word_embeddings == base.model.config.tie_word_embeddings


def test_every_linear_but_the_head_is_quantized(family_dir):
    dense = load(family_dir).model
    model = load(family_dir, quantization="nf4").model
    linears = {
        name
        for name, module in dense.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D"} and module is not dense.get_output_embeddings()
    }
    assert set(quantized_modules(model)) == linears
    assert linears


def test_random_model_is_transformers_own_initialization(family_dir):
    base = random_model(family_dir, 5)
    torch.manual_seed(5)
    theirs = AutoModelForCausalLM.from_config(base.model.config, dtype=torch.float32).eval()
    ids = ids_of((1, 12))
    assert torch.equal(logits_of(base.model, ids), logits_of(theirs, ids))
    assert base.fingerprint.weights != load(family_dir).fingerprint.weights
