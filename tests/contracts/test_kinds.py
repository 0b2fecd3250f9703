"""Which kinds of layers each method takes, experts and tied embeddings among them, and which it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graft.models.load as models
from graft.adapters.attach import adapters_of, attach, disabled
from graft.adapters.attached import trained_tensors
from graft.adapters.base import METHODS, kinds_of
from graft.adapters.fold import merge_into
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.errors import TargetError

pytestmark = pytest.mark.filterwarnings("ignore:.*grouped_mm.*")

OF_MATRICES = {"linear", "conv1d"}
KINDS: dict[str, set[str]] = {
    "lora": {*OF_MATRICES, "embedding", "conv2d"},
    "dora": {*OF_MATRICES, "embedding", "conv2d"},
    "lora_fa": {*OF_MATRICES, "conv2d"},
    "vera": OF_MATRICES,
    "ia3": {*OF_MATRICES, "conv2d"},
    "loha": {*OF_MATRICES, "conv2d"},
    "lokr": {*OF_MATRICES, "conv2d"},
    "oft": OF_MATRICES,
    "adalora": OF_MATRICES,
    "qa_lora": OF_MATRICES,
    "trainable_tokens": {"embedding"},
}
"""As the pages of the methods say."""

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6),
    "conv1d": lambda: Conv1D(6, 8),
    "embedding": lambda: nn.Embedding(8, 6),
    "conv2d": lambda: nn.Conv2d(8, 6, 3),
}

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}

every = pytest.mark.parametrize("method", KINDS)
of_matrices = pytest.mark.parametrize("method", [name for name, kinds in KINDS.items() if "linear" in kinds])


def config(method: str, **settings: Any) -> Any:
    """Small settings."""
    small: dict[str, dict[str, Any]] = {
        "ia3": {"feedforward_modules": ()},
        "oft": {"block_size": 8},
        "vera": {"rank": 8},
        "adalora": {"rank": 3, "target_rank": 2},
        "qa_lora": {"rank": 2, "group_size": 4},
        "trainable_tokens": {"token_indices": (3, 5)},
    }
    given = {**small.get(method, {"rank": 2}), **settings}
    return METHODS[method].config_class(**given)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def test_every_method_says_what_it_takes() -> None:
    assert {name: set(kinds_of(method)) for name, method in METHODS.items()} == KINDS


@every
@pytest.mark.parametrize("kind", LAYERS)
def test_a_kind_is_taken_or_refused_by_name(method: str, kind: str) -> None:
    model = nn.Sequential(LAYERS[kind]())
    if kind in KINDS[method]:
        assert attach(model, config(method, target_modules=("0",))).targets == ("0",)
        return
    with pytest.raises(TargetError, match=f"of kind {kind}, which {method} does not adapt"):
        attach(model, config(method, target_modules=("0",)))
    assert not adapters_of(model)


@of_matrices
@pytest.mark.parametrize("family", EXPERTS)
def test_experts(tiny_dir: Callable[..., Path], method: str, family: str, tmp_path: Path) -> None:
    directory = tiny_dir(family, **EXPERTS[family])
    model = models.load(directory).model
    plain = logits(model)
    made = attach(model, config(method, target_modules="all-linear"))
    experts = [path for path in made.targets if ".experts." in path]
    assert len(experts) == 2 * 4 * 3
    assert torch.equal(logits(model), plain)
    shake(model)
    live = logits(model)
    assert (live - plain).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(logits(model), plain)
    model(IDS, labels=IDS).loss.backward()
    moved = {key for key, tensor in trained_tensors(model).items() if tensor.grad is not None}
    assert any(".experts." in key for key in moved)
    save_adapter(model, tmp_path)
    again = models.load(directory).model
    assert set(load_adapter(again, tmp_path).targets) == set(made.targets)
    assert torch.equal(logits(again), live)
    merge_into(model)
    torch.testing.assert_close(logits(model), live, atol=2e-5, rtol=1e-4)


TIED = [
    (method, part, how)
    for method, kinds in KINDS.items()
    if "linear" in kinds  # rows of the embedding alone are tied: test_trainable_tokens
    for part in ("embed_tokens", "lm_head")
    for how in ("target_modules", "modules_to_save")
]


@pytest.mark.parametrize(("method", "part", "how"), TIED)
def test_tied_embedding_and_head(
    tiny_dir: Callable[..., Path], method: str, part: str, how: str, tmp_path: Path
) -> None:
    """Either trains on its own while the other stays; a merge writes two matrices; a note says so."""
    model: Any = models.load(tiny_dir("qwen2")).model
    shared = model.lm_head.weight
    before = shared.detach().clone()
    assert model.model.embed_tokens.weight is shared
    if how == "target_modules" and part == "embed_tokens" and "embedding" not in KINDS[method]:
        with pytest.raises(TargetError, match="of kind embedding"):
            attach(model, config(method, target_modules=(part,)))
        return
    targets = {"target_modules": ("q_proj", *([part] if how == "target_modules" else []))}
    saved = {"modules_to_save": (part,)} if how == "modules_to_save" else {}
    made = attach(model, config(method, **targets, **saved))
    whole, other = ("model.embed_tokens", "lm_head")[:: 1 if part == "embed_tokens" else -1]
    (note,) = made.notes
    assert f"{whole} is trained, {other} stays as in the base" in note
    assert "A merge writes them untied" in note
    shake(model)
    live = logits(model)
    model(IDS, labels=IDS).loss.backward()
    keys = {key for key, tensor in trained_tensors(model).items() if tensor.grad is not None}
    assert any(key.startswith(whole) for key in keys)
    assert not any(key.startswith(other) for key in trained_tensors(model))
    assert torch.equal(shared.detach(), before)
    assert shared.grad is None
    save_adapter(model, tmp_path)
    again: Any = models.load(tiny_dir("qwen2")).model
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), live)
    merged = copy.deepcopy(model)
    assert merge_into(merged)
    torch.testing.assert_close(logits(merged), live, atol=1e-5, rtol=1e-5)
    changed, left = merged.get_submodule(whole).weight, merged.get_submodule(other).weight
    assert torch.equal(left.detach(), before)
    assert not torch.equal(changed.detach(), before)
    assert merged.config.tie_word_embeddings is False


@of_matrices
def test_what_is_tied_stays_tied_where_neither_is_trained(tiny_dir: Callable[..., Path], method: str) -> None:
    model: Any = models.load(tiny_dir("qwen2")).model
    assert attach(model, config(method, target_modules="all-linear")).notes == []
    shake(model)
    assert not merge_into(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
