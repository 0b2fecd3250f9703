"""Laws for every setting: merged equals live, saved equals loaded, selection equals its definition."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from graft.adapters.attach import adapter_tensors, adapters_of, attach, detach, disabled
from graft.adapters.fold import merge_into
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.targets import Selection, base_layers, select_targets
from graft.errors import TargetError


class Block(nn.Module):
    """A bit of everything that can carry an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.down = Conv1D(6, 9)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


IDS = torch.arange(11).view(1, 11)
NAMES = ("embed", "up", "down", "head")

configs = st.builds(
    LoraConfig,
    rank=st.integers(1, 12),
    alpha=st.floats(0.25, 32),
    dropout=st.sampled_from([0.0, 0.3]),
    target_modules=st.lists(st.sampled_from(NAMES), min_size=1, unique=True).map(tuple),
    init=st.sampled_from(["kaiming", "gaussian"]),
    use_rslora=st.booleans(),
    modules_to_save=st.sampled_from([(), ("norm",)]),
    rank_pattern=st.sampled_from([(), ("up=2",), (r"u.|down=3",)]),
    alpha_pattern=st.sampled_from([(), ("head=5",)]),
).filter(lambda config: _acts(config.rank_pattern, config) and _acts(config.alpha_pattern, config))


def _acts(patterns: tuple[str, ...], config: LoraConfig) -> bool:
    """Whether each pattern names a target: others are refused."""
    return all(
        any(re.fullmatch(pattern.split("=")[0], target) for target in config.target_modules)
        for pattern in patterns
    )


def made(config: LoraConfig, seed: int) -> Any:
    torch.manual_seed(0)
    model = Block().eval()
    attach(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 9))
def test_merged_equals_live_and_detached_equals_base(config: LoraConfig, seed: int) -> None:
    model = made(config, seed)
    live = output(model)
    with disabled(model):
        base = output(model)
    torch.manual_seed(0)
    assert torch.equal(base, output(Block().eval()))
    twin = made(config, seed)
    detach(twin)
    assert torch.equal(output(twin), base)
    merge_into(model)
    assert not adapters_of(model)
    scale = max(1.0, float(live.abs().max()))
    torch.testing.assert_close(output(model), live, atol=1e-5 * scale, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(configs, st.integers(0, 9))
def test_saved_and_loaded_is_the_same_bit_for_bit(config: LoraConfig, seed: int) -> None:
    model = made(config, seed)
    torch.manual_seed(0)
    other: Any = Block().eval()
    with tempfile.TemporaryDirectory() as folder:
        first = save_adapter(model, Path(folder) / "a")
        adapter = load_adapter(other, first)
        second = save_adapter(other, Path(folder) / "b")
        weights = [(path / "adapter_model.safetensors").read_bytes() for path in (first, second)]
        texts = [(path / "adapter_config.json").read_text() for path in (first, second)]
    assert torch.equal(output(other), output(model))
    assert weights[0] == weights[1]
    ignored = r'"init_lora_weights": \S+'  # of an adapter that is loaded only the values matter
    assert re.sub(ignored, "", texts[0]) == re.sub(ignored, "", texts[1])
    assert adapter.targets == adapters_of(model)["default"].targets


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([*NAMES, "0.up", "1.head", "p", "0"]), min_size=1, max_size=3),
    st.lists(st.sampled_from([*NAMES, "1.up"]), max_size=2),
    st.sampled_from([None, (0,), (1,), (0, 1)]),
)
def test_selection_is_its_definition(
    targets: list[str], excluded: list[str], blocks: tuple[int, ...] | None
) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "head": nn.Linear(2, 2)})

    def ends(path: str, names: list[str]) -> bool:
        return any(path == name or path.endswith("." + name) for name in names)

    def number(path: str) -> int | None:
        return int(path.split(".")[1]) if path.startswith("layers.") else None

    expected = [
        path
        for path in base_layers(model)
        if ends(path, targets) and not ends(path, excluded) and (blocks is None or number(path) in blocks)
    ]
    try:
        found = list(select_targets(model, Selection(tuple(targets), tuple(excluded), blocks), strict=False))
    except TargetError:
        found = []
    assert found == expected
