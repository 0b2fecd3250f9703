"""Merged directories, and merges in place, of what is no plain update: rows, biases, codes, weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.adalora import AdaLoraConfig
from graft.adapters.attached import active_weights, base_state, trained_tensors
from graft.adapters.fold import merge_into
from graft.adapters.merge import merge
from graft.adapters.probe import make_probe
from graft.adapters.qa_lora import QaLoraConfig
from graft.adapters.trainable_tokens import TrainableTokensConfig
from graft.errors import AdapterError, ModelError
from graft.quant.config import QuantizationConfig
from graft.quant.linear import quantized_modules

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))
UNSEEN = 250
"""A byte that none of graft's own prompts has."""

INT4 = QuantizationConfig(quant_type="int4", blocksize=32)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(model: Any, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in trained_tensors(model, name).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def adapted(directory: Path, config: Any, **how: Any) -> Any:
    model = graft.load(directory, dtype="float32", **how).model
    graft.attach(model, config)
    shake(model)
    return model


CASES: dict[str, tuple[str, Callable[[], Any], Any]] = {
    "biases of others over nf4": (
        "gpt2",
        lambda: graft.LoraConfig(rank=2, bias="all", target_modules=("c_attn",)),
        "nf4",
    ),
    "biases of both over nf4": (
        "gpt2",
        lambda: graft.LoraConfig(rank=2, bias="lora_only", lora_bias=True, target_modules=("c_attn",)),
        "nf4",
    ),
    "rows over nf4": ("qwen2", lambda: graft.LoraConfig(rank=2, trainable_token_indices=(7, 200)), "nf4"),
    "rows and a module": (
        "llama",
        lambda: TrainableTokensConfig(token_indices=(7, 200), modules_to_save=("lm_head",)),
        None,
    ),
    "pissa": ("gpt2", lambda: graft.LoraConfig(rank=4, init="pissa"), None),
    "olora over int8": ("llama", lambda: graft.LoraConfig(rank=4, init="olora"), "int8"),
    "adalora over nf4": ("llama", lambda: AdaLoraConfig(rank=4, target_rank=2), "nf4"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_written_model_is_the_live_one(tiny_dir: Callable[..., Path], tmp_path: Path, case: str) -> None:
    family, config, quantization = CASES[case]
    model = adapted(tiny_dir(family), config(), quantization=quantization)
    graft.save_adapter(model, tmp_path / "a")
    into: Any = "dequantized" if quantization else "dense"
    report = merge(tmp_path / "a", tmp_path / "m", base=tiny_dir(family), into=into)
    # The live model sums the update apart: its rounding grows with what the update does.
    assert report.logit_gap < 1e-5 * max(1.0, report.adapter_effect)
    assert report.adapter_effect > 0.1
    assert report.num_layers == len(graft.adapters_of(model)["default"].places)
    torch.testing.assert_close(logits(graft.load(tmp_path / "m").model), logits(model), atol=1e-5, rtol=1e-5)


def test_the_texts_have_tokens_whose_rows_were_trained(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Without them the head, which is another matrix here, shows nothing of the change."""
    base = graft.load(tiny_dir("llama"))
    plain = make_probe(base.model.config, base.tokenizer, None, None)
    assert not (plain.batch.input_ids == UNSEEN).any()
    model = adapted(tiny_dir("llama"), TrainableTokensConfig(token_indices=(UNSEEN,)))
    graft.save_adapter(model, tmp_path / "a")
    report = merge(tmp_path / "a", tmp_path / "m", base=tiny_dir("llama"))
    assert report.logit_gap < 1e-5 < 1e-3 < report.adapter_effect
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "none of it"}) + "\n")
    report = merge(tmp_path / "a", tmp_path / "m2", base=tiny_dir("llama"), data=rows)
    assert report.adapter_effect > 1e-3
    assert any("no row of" in note and "a row of those is compared too" in note for note in report.notes)
    rows.write_text(json.dumps({"text": "\xff, of which one byte is trained"}, ensure_ascii=False) + "\n")
    token = base.tokenizer("\xff")["input_ids"][-1]
    other = adapted(tiny_dir("llama"), TrainableTokensConfig(token_indices=(token,)))
    graft.save_adapter(other, tmp_path / "b")
    report = merge(tmp_path / "b", tmp_path / "m3", base=tiny_dir("llama"), data=rows)
    assert report.probe["num_rows"] == 1
    assert not any("no row of" in note for note in report.notes)


def test_a_bias_without_a_place_is_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4, lora_bias=True))
    graft.save_adapter(model, tmp_path / "a")
    live = logits(model)
    with pytest.raises(AdapterError, match="q_proj has no bias that the bias of lora_B"):
        merge(tmp_path / "a", tmp_path / "m", base=tiny_dir("llama"))
    with pytest.raises(AdapterError, match="q_proj has no bias that the bias of lora_B"):
        graft.merge_in_place(model)
    assert torch.equal(logits(model), live)
    assert not (tmp_path / "m").exists()


def test_a_mixture_of_experts_keeps_its_codes(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    config = QaLoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
    model = adapted(tiny_dir("mixtral"), config, quantization=INT4)
    graft.save_adapter(model, tmp_path / "a")
    codes = {path.replace(".base_layer", ""): m.codes for path, m in quantized_modules(model).items()}
    report = merge(tmp_path / "a", tmp_path / "m", base=tiny_dir("mixtral"))
    assert report.folded_into == "quantized"
    again = graft.load(tmp_path / "m", dtype="float32").model
    found = {path: layer.codes for path, layer in quantized_modules(again).items()}
    assert found.keys() == codes.keys()
    assert all(torch.equal(found[path], codes[path]) for path in codes)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        graft.LoraConfig(rank=4),
        QaLoraConfig(rank=4, group_size=16, target_modules=("q_proj",)),
        QaLoraConfig(rank=4, group_size=32, target_modules=("q_proj", "lm_head")),
    ],
    ids=["lora", "groups under blocks", "a dense target"],
)
def test_codes_that_cannot_take_an_update_are_refused(
    tiny_dir: Callable[..., Path], tmp_path: Path, config: Any
) -> None:
    graft.save_adapter(adapted(tiny_dir("llama"), config, quantization=INT4), tmp_path / "a")
    with pytest.raises(AdapterError, match="only a base in int4, int3 or int2 takes an update"):
        merge(tmp_path / "a", tmp_path / "m", base=tiny_dir("llama"), into="quantized")
    assert not (tmp_path / "m").exists()
    report = merge(tmp_path / "a", tmp_path / "m", base=tiny_dir("llama"))
    assert report.folded_into == "dequantized"


# In place.


def test_codes_are_not_changed_in_place(tiny_dir: Callable[..., Path]) -> None:
    model = adapted(tiny_dir("llama"), QaLoraConfig(rank=4, target_modules=("q_proj",)), quantization=INT4)
    live = logits(model)
    with pytest.raises(AdapterError, match="q_proj is quantized"):
        graft.merge_in_place(model)
    assert torch.equal(logits(model), live)
    merge_into(model)  # which does not have to give them back
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)


def test_weights_are_merged_and_come_back(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(tiny_dir("llama"), graft.LoraConfig(rank=4))
    graft.attach(model, graft.LoraConfig(rank=2), "second")
    shake(model, "second")
    weights = {"default": 0.3, "second": -0.5}
    graft.set_active(model, list(weights), list(weights.values()))
    before = {key: tensor.clone() for key, tensor in base_state(model)}
    live = logits(model)
    graft.merge_in_place(model)
    assert active_weights(model) == {"second": -0.5}
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="is merged into the weights"):
        graft.save_active(model, tmp_path / "b")
    graft.unmerge(model)
    assert active_weights(model) == weights
    assert torch.equal(logits(model), live)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_state(model))


def test_rows_under_a_tied_head_stay_tied_in_place(tiny_dir: Callable[..., Path]) -> None:
    model = adapted(tiny_dir("qwen2"), TrainableTokensConfig(token_indices=(7, int(IDS[0, 0]))))
    live, own = logits(model), model.lm_head.weight
    before = own.clone()
    graft.merge_in_place(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is not own
    assert model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    graft.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is own
    assert torch.equal(own, before)
    assert torch.equal(logits(model), live)
    assert model.config.tie_word_embeddings


def test_biases_trained_alone_come_back(tiny_dir: Callable[..., Path]) -> None:
    config = graft.LoraConfig(rank=2, bias="all", target_modules=("q_proj",))
    model = adapted(tiny_dir("qwen2"), config)
    assert graft.adapters_of(model)["default"].bias_modules
    before = {key: tensor.clone() for key, tensor in base_state(model)}
    live = logits(model)
    graft.merge_in_place(model)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    graft.unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_state(model))
    assert torch.equal(logits(model), live)


def test_a_tokenizer_that_is_too_large_is_named(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = graft.load(tiny_dir("llama", vocab_size=70))
    graft.attach(base.model, graft.LoraConfig(rank=2))
    for tensor in trained_tensors(base.model).values():
        torch.nn.init.normal_(tensor)
    graft.save_adapter(base.model, tmp_path / "a")
    (tmp_path / "rows.txt").write_text("held-out text\n")
    for data in (None, tmp_path / "rows.txt"):
        with pytest.raises(ModelError, match="the embedding has 70 rows"):
            merge(tmp_path / "a", tmp_path / "m", data=data)
    assert not (tmp_path / "m").exists()
