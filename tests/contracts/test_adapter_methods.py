"""Every adapter method through the contract; a new method is one more line here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.adapters.adalora import AdaLoraConfig
from graft.adapters.base import METHODS, check_adapter_method
from graft.adapters.dora import DoraConfig
from graft.adapters.ia3 import Ia3Config
from graft.adapters.loha import LohaConfig
from graft.adapters.lokr import LokrConfig
from graft.adapters.lora import LoraConfig, LoraMethod
from graft.adapters.lora_fa import LoraFaConfig
from graft.adapters.lora_layer import LoraLinear
from graft.adapters.oft import OftConfig
from graft.adapters.qa_lora import QaLoraConfig
from graft.adapters.trainable_tokens import TrainableTokensConfig
from graft.adapters.vera import VeraConfig

CASES: dict[str, tuple[str, Any]] = {
    "lora": ("lora", LoraConfig()),
    "lora-gaussian-rs": ("lora", LoraConfig(rank=3, alpha=5, init="gaussian", use_rslora=True, dropout=0.3)),
    "lora-rank-above-width": ("lora", LoraConfig(rank=40)),
    "dora": ("dora", DoraConfig()),
    "dora-rs-patterns": ("dora", DoraConfig(rank=3, use_rslora=True, dropout=0.3, rank_pattern=("layer=5",))),
    "lora_fa": ("lora_fa", LoraFaConfig()),
    "lora_fa-gaussian-dropout": ("lora_fa", LoraFaConfig(rank=3, init="gaussian", dropout=0.3)),
    "vera": ("vera", VeraConfig(rank=16)),
    "vera-small": ("vera", VeraConfig(rank=5, d_initial=1.0, projection_seed=7)),
    "ia3": ("ia3", Ia3Config()),
    "loha": ("loha", LohaConfig(rank=2)),
    "loha-dense": ("loha", LohaConfig(rank=5, alpha=2)),
    "lokr": ("lokr", LokrConfig(rank=1)),
    "lokr-both": ("lokr", LokrConfig(rank=1, decompose_both=True, decompose_factor=4)),
    "lokr-dense": ("lokr", LokrConfig(rank=8)),
    "oft": ("oft", OftConfig()),
    "oft-blocks": ("oft", OftConfig(block_size=5)),
    "oft-series": ("oft", OftConfig(block_size=4, series_order=3)),
    "trainable_tokens": ("trainable_tokens", TrainableTokensConfig(token_indices=(9, 1, 2, 3, 10, 5, 7))),
    "qa_lora": ("qa_lora", QaLoraConfig(rank=3, group_size=4, dropout=0.3)),
    "lora-bias": ("lora", LoraConfig(bias="all")),
    "adalora": ("adalora", AdaLoraConfig(rank=3, target_rank=2, dropout=0.3)),
    "ia3-feedforward": ("ia3", Ia3Config(target_modules=("layer",), feedforward_modules=("layer",))),
}


@pytest.mark.parametrize("case", CASES)
def test_method_keeps_the_contract(case: str) -> None:
    name, config = CASES[case]
    check_adapter_method(METHODS[name], config)


def test_every_method_is_tried() -> None:
    assert {name for name, _ in CASES.values()} == set(METHODS)


class _Broken(LoraMethod):
    """LoRA with one promise broken."""

    def __init__(self, how: str) -> None:
        self.how = how

    def build_layer(self, base: Any, config: Any, generator: Any) -> Any:
        if self.how == "global generator" and generator is not None:
            generator = torch.Generator().manual_seed(torch.initial_seed() + int(torch.randint(0, 99, ())))
        layer = super().build_layer(base, config, generator)
        if self.how == "half":
            layer.half()
        if self.how == "start" and isinstance(layer, LoraLinear):
            torch.nn.init.ones_(layer.lora_B)
        if self.how == "frozen":
            layer.requires_grad_(False)
        if self.how == "merge":
            merged = layer.merged_weight
            layer.merged_weight = lambda base, weight: merged(base, weight) * 1.01
        if self.how == "writes into the weight":
            merged = layer.merged_weight
            layer.merged_weight = lambda base, weight: weight.copy_(merged(base, weight))
        if self.how == "another update on zeros":
            merged = layer.merged_weight
            layer.merged_weight = lambda base, weight: merged(base, weight) * (1 if weight.any() else 2)
        if self.how == "factors" and isinstance(layer, LoraLinear):
            layer.update_factors = lambda: (layer.lora_A, layer.lora_B)  # the scaling is missing
        return layer

    def tensor_shapes(self, base: Any, config: Any) -> Any:
        shapes = super().tensor_shapes(base, config)
        return dict(list(shapes.items())[:1]) if self.how == "shapes" else shapes


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("global generator", "generator alone"),
        ("half", "float32"),
        ("start", "at the start"),
        ("frozen", "no gradient|does not require grad"),
        ("merge", "merged and live"),
        ("writes into the weight", "changed the weight"),
        ("another update on zeros", "depends on the weight"),
        ("factors", "update_factors"),
        ("shapes", "tensor_shapes"),
    ],
)
def test_the_check_finds_what_is_broken(how: str, told: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=told):
        check_adapter_method(_Broken(how))
