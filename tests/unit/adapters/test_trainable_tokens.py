"""Rows of the embedding that train: alone, with LoRA, under a tied head, for new tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft.models.load as models
from graft.adapters.attach import adapter_tensors, adapters_of, attach, detach, disabled
from graft.adapters.attached import trained_tensors
from graft.adapters.fold import merge_into
from graft.adapters.lora import LoraConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.trainable_tokens import TrainableTokensConfig
from graft.errors import ConfigError, TargetError
from graft.evaluate.loss import token_losses
from graft.models.load import BaseModel

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
TOKENS = (200, *sorted({int(IDS[0, 0]), int(IDS[1, 5])}, reverse=True), 7)
WITH_LORA = LoraConfig(rank=4, trainable_token_indices=TOKENS)
ALONE = TrainableTokensConfig(token_indices=TOKENS)
both = pytest.mark.parametrize("config", [ALONE, WITH_LORA], ids=["alone", "lora"])
families = pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3_text"])


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def rows_of(model: Any) -> torch.nn.Parameter:
    (rows,) = (t for key, t in adapter_tensors(model).items() if key.endswith("trainable_tokens_delta"))
    return rows


def shake(tensors: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def with_rows(base: BaseModel, indices: tuple[int, ...], rows: Tensor) -> Any:
    """The base with the rows written into its embedding, and so into a head that is tied to it."""
    weight = base.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[list(indices)] = rows
    return base.model


@families
def test_it_is_the_base_with_other_rows_on_both_sides(tiny_dir: Callable[..., Path], family: str) -> None:
    base = models.load(tiny_dir(family))
    plain = logits(base.model)
    attach(base.model, ALONE)
    assert torch.equal(logits(base.model), plain)
    rows = rows_of(base.model)
    assert adapters_of(base.model)["default"].num_trainable == rows.numel() == len(TOKENS) * 32
    assert [p.numel() for p in base.model.parameters() if p.requires_grad] == [rows.numel()]
    shake([rows])
    wanted = with_rows(models.load(tiny_dir(family)), TOKENS, rows.detach())
    torch.testing.assert_close(logits(base.model), logits(wanted), atol=1e-6, rtol=1e-6)
    with disabled(base.model):
        assert torch.equal(logits(base.model), plain)
    detach(base.model)
    assert torch.equal(logits(base.model), plain)


@families
def test_gradients_are_those_of_the_whole_embedding_at_these_rows(
    tiny_dir: Callable[..., Path], family: str
) -> None:
    """With the loss that the loop uses too, whose gradient under a frozen head is taken on the way."""
    from graft.data.loader import Batch

    base = models.load(tiny_dir(family))
    attach(base.model, ALONE)
    other = models.load(tiny_dir(family)).model
    weight = other.get_input_embeddings().weight
    weight.requires_grad_(True)
    other(IDS, labels=IDS).loss.backward()
    assert weight.grad is not None
    wanted = weight.grad[list(TOKENS)]
    base.model(IDS, labels=IDS).loss.backward()
    rows = rows_of(base.model)
    torch.testing.assert_close(rows.grad, wanted, atol=1e-6, rtol=1e-4)
    rows.grad = None
    labels = IDS.clone()
    labels[:, 0] = -100
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    batch = Batch(IDS, positions, labels, IDS.numel(), IDS.numel() - 2, [[0], [1]])
    total, _ = token_losses(base.model, batch)
    (total / (IDS.numel() - 2)).backward()  # the first token of each text has no other before it
    torch.testing.assert_close(rows.grad, wanted, atol=1e-6, rtol=1e-4)


@both
@families
def test_saved_loaded_and_merged(
    tiny_dir: Callable[..., Path], family: str, config: Any, tmp_path: Path
) -> None:
    base = models.load(tiny_dir(family))
    attach(base.model, config)
    shake(trained_tensors(base.model).values())
    live = logits(base.model)
    save_adapter(base.model, tmp_path / "a")
    again = models.load(tiny_dir(family)).model
    made = load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), live)
    assert not any("tied" in note or "share one weight" in note for note in made.notes)
    report = merge(tmp_path / "a", tmp_path / "merged", base=tiny_dir(family))
    assert report.logit_gap < 1e-4 < report.adapter_effect
    assert not report.untied, "both sides see the rows: one weight still serves"
    merge_into(base.model)
    torch.testing.assert_close(logits(base.model), live, atol=1e-5, rtol=1e-5)


# PEFT warns of what it does not tie in other cases, and calls transformers by names that will go.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@both
def test_rows_of_new_tokens(tiny_dir: Callable[..., Path], config: Any, tmp_path: Path) -> None:
    """The vocabulary grows first; the rows of the file are there whatever the new ones were filled with."""
    import dataclasses

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    field = "token_indices" if config is ALONE else "trainable_token_indices"
    new = dataclasses.replace(config, **{field: (*TOKENS, 264, 265)})
    ids = torch.cat([IDS, torch.tensor([[264, 265], [265, 9]])], 1)
    base = models.load(tiny_dir("qwen2"))
    with pytest.raises(TargetError, match="token 265 is not in the embedding") as caught:
        attach(base.model, new)
    assert "resize_token_embeddings(266)" in caught.value.fix
    base.model.resize_token_embeddings(266)
    attach(base.model, new)
    shake(trained_tensors(base.model).values())
    save_adapter(base.model, tmp_path / "a")
    mine = logits(base.model, ids)
    others = [models.load(tiny_dir("qwen2")).model, AutoModelForCausalLM.from_pretrained(tiny_dir("qwen2"))]
    for other in others:
        other.resize_token_embeddings(266, mean_resizing=False)
    load_adapter(others[0], tmp_path / "a", force_base=True)
    theirs = PeftModel.from_pretrained(others[1].eval(), tmp_path / "a").eval()
    for other in (others[0], theirs):
        torch.testing.assert_close(logits(other, ids), mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (TrainableTokensConfig(), "adapter.token_indices"),
        (TrainableTokensConfig(token_indices=(3,), modules_to_save=("lm_head",)), "adapter.target_modules"),
        (LoraConfig(trainable_token_indices=(3,), target_modules=("lm_head",)), "adapter.target_modules"),
        (
            LoraConfig(trainable_token_indices=(3,), target_modules=("embed_tokens",)),
            "adapter.trainable_token_indices",
        ),
        (
            LoraConfig(trainable_token_indices=(3,), modules_to_save=("embed_tokens",)),
            "adapter.trainable_token_indices",
        ),
        (LoraConfig(trainable_token_indices=(3, 400)), "adapter.trainable_token_indices"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    tiny_dir: Callable[..., Path], config: Any, where: str
) -> None:
    model = models.load(tiny_dir("qwen2")).model  # tied
    parts = dict(model.named_modules())
    with pytest.raises(TargetError) as caught:
        attach(model, config)
    assert caught.value.where == where
    assert dict(model.named_modules()) == parts


@pytest.mark.parametrize("indices", [(-1,), (1.5,), (True,), (4, 4)])
def test_numbers_that_name_no_token_are_refused(indices: Any) -> None:
    for made in (
        lambda: TrainableTokensConfig(token_indices=indices),
        lambda: LoraConfig(trainable_token_indices=indices),
    ):
        with pytest.raises(ConfigError) as caught:
            made()
        assert caught.value.where.endswith("token_indices")
