"""Weights read one at a time are those that a loaded model computes with; the digest is its fingerprint's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.errors import ModelError
from graft.models.layers import BaseLayer
from graft.models.load import load
from graft.models.quantize import quantize
from graft.models.weights import StoredBase
from graft.quant.config import QuantizationConfig


def check(directory: Path) -> int:
    """Compare every layer; returns how many there are."""
    loaded, stored = load(directory, dtype="float32"), StoredBase(directory)
    views = {path: view for path, m in loaded.model.named_modules() if (view := BaseLayer.of(m))}
    for path, view in views.items():
        own = stored.layer(path)
        assert own is not None, path
        assert (own.kind, own.out_features, own.in_features) == (
            view.kind,
            view.out_features,
            view.in_features,
        )
        assert torch.equal(stored.weight(path), view.dense_weight()), path
    seen: list[tuple[int, int]] = []
    assert stored.digest(lambda done, whole: seen.append((done, whole))) == loaded.fingerprint.weights
    assert seen[-1][0] == seen[-1][1] > 0
    return len(views)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "gemma2"])
def test_every_weight_is_the_loaded_one(tiny_dir: Callable[..., Path], family: str) -> None:
    assert check(tiny_dir(family)) >= 9


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_read_one_by_one(tiny_dir: Callable[..., Path], family: str) -> None:
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    assert check(tiny_dir(family, **sizes)) >= 2 * (4 + 3 * 3)


@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_weights_that_are_stored_quantized(
    tiny_dir: Callable[..., Path], tmp_path: Path, quant_type: str
) -> None:
    quantize(tiny_dir("llama"), QuantizationConfig(quant_type=quant_type), tmp_path / "packed")  # type: ignore[arg-type]
    check(tmp_path / "packed")


def test_what_is_not_there_or_not_ours_is_said(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    stored = StoredBase(tiny_dir("llama"))
    assert stored.layer("model.layers.9.mlp.up_proj") is None
    assert stored.layer("model.norm") is None
    with pytest.raises(ModelError, match=r"no tensor 'model.layers.0.mlp.side.weight'"):
        stored.tensor("model.layers.0.mlp.side.weight")
    config = json.loads((tiny_dir("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized by gptq"):
        StoredBase(tmp_path)
