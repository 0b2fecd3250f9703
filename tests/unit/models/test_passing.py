"""A model that runs block by block is the model in memory, and holds one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.adapters.attached import trained_tensors
from graft.adapters.likeness import probe_logits
from graft.adapters.merge_base import open_base
from graft.adapters.probe import make_probe
from graft.models.contents import Contents
from graft.models.families import family_of
from graft.models.load import load
from graft.models.passing import passing

MIXTURE: dict[str, Any] = {
    "num_experts": 6,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))

pytestmark = pytest.mark.filterwarnings("ignore:.*grouped_mm.*")


def plain(contents: Contents) -> Any:
    return lambda fill: contents.read(fill, lambda source: source.load()).items()


def adapted(directory: Path, out: Path, quantization: str | None) -> Any:
    model = load(directory, quantization=quantization).model
    graft.attach(model, graft.LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    graft.save_adapter(model, out)
    return model


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_live_model_of_every_family_is_the_one_in_memory(
    tiny_dir: Callable[..., Path], tiny_family: str, quantization: str | None, tmp_path: Path
) -> None:
    check_live(tiny_dir(tiny_family), tmp_path, quantization)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_live_mixture_is_the_one_in_memory(
    tiny_dir: Callable[..., Path], quantization: str | None, tmp_path: Path
) -> None:
    check_live(tiny_dir("qwen3_moe", **MIXTURE), tmp_path, quantization)


def check_live(directory: Path, tmp_path: Path, quantization: str | None) -> None:
    model = adapted(directory, tmp_path / "a", quantization)
    found = open_base(tmp_path / "a", None, None, force_base=False, scratch=tmp_path / "none")
    probe = make_probe(model.config, found.tokenizer, found.side, None)
    contents = Contents.of(directory, torch.float32)
    values = lambda fill: found.weights.running(contents, fill, with_adapter=True)  # noqa: E731
    with passing(contents, values, found.weights.folder.put_on) as streamed:
        assert torch.equal(probe_logits(streamed, probe), probe_logits(model, probe))


def test_one_block_has_weights_at_a_time(tiny_dir: Callable[..., Path]) -> None:
    directory = tiny_dir("qwen2", num_hidden_layers=4)
    contents = Contents.of(directory, torch.float32)
    blocks: list[nn.Module] = list(contents.model.get_submodule(family_of(contents.model).layers))
    told: list[tuple[int, int]] = []
    running = []

    def looked(module: nn.Module, _: Any) -> None:
        real = [number for number, block in enumerate(blocks) if not next(block.parameters()).is_meta]
        running.append(real)
        assert all(not parameter.is_meta for parameter in module.parameters())

    with passing(contents, plain(contents), progress=lambda *at: told.append(at)) as model:
        for block in blocks:
            block.register_forward_pre_hook(looked)
        logits = model(IDS).logits
        again = model(IDS).logits
    assert running == [[0], [1], [2], [3]] * 2
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())
    assert torch.equal(logits, again)
    with torch.no_grad():
        assert torch.equal(logits, load(directory).model(IDS).logits)
    assert told[-1][0] == told[-1][1] > 0


def test_a_family_without_known_blocks_stays_in_memory(tiny_dir: Callable[..., Path]) -> None:
    directory = tiny_dir("opt", ffn_dim=64, word_embed_proj_dim=32)
    contents = Contents.of(directory, torch.float32)
    with passing(contents, plain(contents)) as model:
        found = model(IDS).logits
        assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(found, load(directory).model(IDS).logits)
