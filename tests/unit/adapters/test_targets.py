"""What target_modules selects, and what is said where it selects nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import graft.models.load as models
from graft.adapters.attach import attach
from graft.adapters.lora import LoraConfig
from graft.adapters.patterns import Pattern, first_match, suffixes
from graft.adapters.targets import Selection, base_layers, block_number, select_targets, tied_pair
from graft.errors import ConfigError, TargetError


@pytest.fixture(scope="module")
def llama(tiny_dir: Callable[..., Path]) -> Any:
    return models.load(tiny_dir("llama")).model


def leaves(model: Any, *args: Any, **kwargs: Any) -> set[str]:
    return {path.rpartition(".")[2] for path in select_targets(model, Selection(*args, **kwargs))}


def test_all_linear_takes_every_linear_but_the_head(tiny_dir: Callable[..., Path], tiny_family: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model = models.load(tiny_dir(tiny_family)).model
    head = model.get_output_embeddings()
    expected = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    assert list(select_targets(model, Selection("all-linear"))) == expected
    attach(model, LoraConfig(target_modules=("lm_head",)))
    assert list(select_targets(model, Selection("all-linear"))) == expected


def test_names_expressions_exclusions_and_blocks(llama: Any) -> None:
    assert leaves(llama, ("q_proj", "mlp.up_proj")) == {"q_proj", "up_proj"}
    assert leaves(llama, r".*(q|v)_proj") == {"q_proj", "v_proj"}
    assert leaves(llama, "all-linear", ("mlp.up_proj", "q_proj")) == {
        "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"
    }  # fmt: skip
    assert leaves(llama, "all-linear", r".*mlp.*") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    one = select_targets(llama, Selection(("q_proj",), layers=(1,)))
    assert list(one) == ["model.layers.1.self_attn.q_proj"]
    assert leaves(llama, ("embed_tokens", "lm_head")) == {"embed_tokens", "lm_head"}
    kept = leaves(llama, "all-linear", modules_to_save=("mlp",))
    assert kept == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"target_modules": ("q_porj",)}, "did you mean 'q_proj'"),
        ({"target_modules": ("q_proj", "v_porj")}, r"\['v_porj'\] matched no layer"),
        ({"target_modules": "q_proj"}, r'write the list \["q_proj"\]'),
        ({"target_modules": r".*query"}, "Layers there: down_proj"),
        ({"target_modules": ("self_attn",)}, "LlamaAttention, which cannot carry an adapter"),
        ({"target_modules": ("proj",)}, "matched no layer"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        (
            {"exclude_modules": ("k_porj",)},
            r"exclude_modules \['k_porj'\] matched no layer among the targets",
        ),
        ({"exclude_modules": r".*"}, "no layer is left"),
        ({"layers": (0, 7)}, r"layers \[7\] hold no target"),
        ({"target_modules": ("lm_head",), "layers": (0,)}, "blocks with targets there: none"),
        ({"modules_to_save": ("lm_haed",)}, "did you mean 'lm_head'"),
    ],
)
def test_a_setting_without_effect_is_refused(llama: Any, setting: dict[str, Any], told: str) -> None:
    names = [name for name, _ in llama.named_modules()]
    with pytest.raises(TargetError, match=told) as caught:
        attach(llama, LoraConfig(**setting))
    assert caught.value.where.startswith("adapter.")
    assert caught.value.fix
    assert [name for name, _ in llama.named_modules()] == names


def test_quantized_modules_cannot_be_saved_in_full(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama"), quantization="nf4").model
    with pytest.raises(TargetError, match="is quantized"):
        attach(model, LoraConfig(modules_to_save=("mlp",)))


def test_tied_pair(tiny_dir: Callable[..., Path], tiny_family: str) -> None:
    model = models.load(tiny_dir(tiny_family)).model
    pair = tied_pair(model)
    assert (pair is not None) == model.config.tie_word_embeddings
    if pair is not None:
        assert model.get_submodule(pair[0]) is model.get_input_embeddings()
        assert model.get_submodule(pair[1]) is model.get_output_embeddings()
        attach(model, LoraConfig(target_modules=(pair[1],), modules_to_save=(pair[0],)))
        assert tied_pair(model) == pair


def test_a_catastrophic_expression_ends_in_bounded_time(llama: Any) -> None:
    with pytest.raises(TargetError, match="takes more than"):
        select_targets(llama, Selection(r"((.|..)+)+\d\d"))
    with pytest.raises(TargetError, match="characters"):
        Pattern("a" * 1_000_000)
    with pytest.raises(TargetError, match="takes more than"):
        list(first_match((r"((.|..)+)+\d\d=3",), "model.layers.0.self_attn.q_proj" * 2))


def test_very_many_names_are_matched_in_one_pass(llama: Any) -> None:
    names = (*(f"name_{number}" for number in range(100_000)), "q_proj")
    with pytest.raises(TargetError, match="99995 more") as caught:
        select_targets(llama, Selection(names))
    assert len(str(caught.value)) < 2000
    assert len(select_targets(llama, Selection(names), strict=False)) == 2


def test_paths_of_plain_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2)))
    assert {path: base.kind for path, base in base_layers(model).items()} == {
        "0": "linear", "1.0": "linear", "1.1": "embedding"
    }  # fmt: skip
    assert list(select_targets(model, Selection("all-linear"))) == ["0", "1.0"]
    assert list(suffixes("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert block_number("model.layers.3.mlp.experts.7.up_proj") == 3
    assert block_number("model.layers.3.mlp.experts.7.up_proj", ("experts",)) == 7
    assert block_number("lm_head") is None


def test_patterns_give_rank_and_alpha(llama: Any) -> None:
    config = LoraConfig(
        rank=8, alpha=8, rank_pattern=("q_proj=2", r".*_proj=4"), alpha_pattern=("mlp.up_proj=3.5",)
    )
    assert config.at("model.layers.0.self_attn.q_proj").rank == 2
    assert config.at("model.layers.0.self_attn.k_proj").rank == 4
    assert config.at("lm_head") is config
    assert config.at("model.layers.0.mlp.up_proj").scaling == 3.5 / 4
    assert LoraConfig(rank=4, alpha=8, use_rslora=True).scaling == 4


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"rank": 1_000_000}, "rank"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": ()}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"target_modules": ()}, "target_modules"),
        ({"rank_pattern": ("q_proj",)}, "rank_pattern"),
        ({"rank_pattern": ("q_proj=1.5",)}, "rank_pattern"),
        ({"alpha_pattern": ("q_proj=nan",)}, "alpha_pattern"),
        ({"rank": None}, "rank"),
        ({"rank": "8"}, "rank"),
        ({"alpha": "16"}, "alpha"),
        ({"dropout": "0.1"}, "dropout"),
        ({"layers": 1}, "layers"),
        ({"layers": ("1",)}, "layers"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**setting)
    assert caught.value.where == f"adapter.{field}"


@pytest.mark.parametrize(
    "setting",
    [
        {"layers": (0,)},
        {"exclude_modules": ("q_proj",)},
        {"exclude_modules": ".*mlp.*"},
        {"rank_pattern": ("q_proj=2",)},
        {"alpha_pattern": ("q_proj=2",)},
    ],
)
def test_what_acts_on_targets_is_refused_without_targets(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot act: target_modules is empty") as caught:
        LoraConfig(target_modules=(), modules_to_save=("norm",), **setting)
    assert caught.value.where == f"adapter.{next(iter(setting))}"
    assert "all-linear" in caught.value.fix
    LoraConfig(modules_to_save=("norm",), **setting)
