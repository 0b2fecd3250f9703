"""Adapters that act with weights: y = W x + sum of w_i delta_i x, in merging, saving, detaching, training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft.models.load as models
from graft.adapters.attach import adapters_of, attach, detach, disabled, set_active
from graft.adapters.attached import active_weights, adapter_modules, trained_tensors
from graft.adapters.compose_live import save_active
from graft.adapters.dora import DoraConfig
from graft.adapters.fold import merge_into
from graft.adapters.ia3 import Ia3Config
from graft.adapters.loha import LohaConfig
from graft.adapters.lokr import LokrConfig
from graft.adapters.lora import LoraConfig
from graft.adapters.lora_fa import LoraFaConfig
from graft.adapters.oft import OftConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.targets import base_layers
from graft.adapters.vera import VeraConfig
from graft.errors import AdapterError, TrainingError
from graft.training.choices import adapter_to_train

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))
TOLERANCE = 2e-5
"""fp32 logits of order ten; only the order of sums differs."""

Q = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "gemma3_text": ("q_proj", "embed_tokens")}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def add(model: nn.Module, name: str, config: Any, seed: int) -> None:
    attach(model, config, name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in trained_tensors(model, name).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def loaded(directory: Path, *configs: Any, **load: Any) -> Any:
    model = models.load(directory, **load).model
    for number, config in enumerate(configs):
        add(model, f"a{number}", config, number + 1)
    return model


def expected(directory: Path, model: nn.Module, weights: dict[str, float]) -> Tensor:
    """Logits of a plain model whose weights are W + sum of w_i (merged_i - W)."""
    plain = models.load(directory).model
    views = base_layers(plain)
    for path, module in adapter_modules(model).items():
        weight = views[path].dense_weight().double()
        total = weight.clone()
        for name, factor in weights.items():
            if name in module.adapters:
                layer: Any = module.adapters[name]
                total += factor * (layer.merged_weight(module.base, weight.float()).double() - weight)
        if path.endswith("embed_tokens"):  # tied with the head, which stays as it is
            plain.get_submodule(path).weight = nn.Parameter(total.t().float())
        else:
            views[path].replace_weight(total)
    return logits(plain)


CASES: dict[str, tuple[str, list[Any]]] = {
    "lora": ("llama", [LoraConfig(rank=4, target_modules=Q["llama"]), LoraConfig(rank=2, use_rslora=True)]),
    "lora on gpt2": ("gpt2", [LoraConfig(rank=4, target_modules=Q["gpt2"]), LoraConfig(rank=2)]),
    "lora on embeddings": (
        "gemma3_text",
        [LoraConfig(rank=4, target_modules=Q["gemma3_text"]), LoraConfig(rank=2)],
    ),
    "other methods": (
        "llama",
        [LohaConfig(rank=2), LokrConfig(rank=2), VeraConfig(rank=8), LoraFaConfig(rank=3)],
    ),
}

WEIGHTS = [0.7, -1.5, 2.0, 0.25]


@pytest.mark.parametrize("case", CASES)
def test_weights_act(tiny_dir: Callable[..., Path], case: str) -> None:
    family, configs = CASES[case]
    model = loaded(tiny_dir(family), *configs)
    names, weights = list(adapters_of(model)), WEIGHTS[: len(configs)]
    set_active(model, names, weights)
    chosen = dict(zip(names, weights, strict=True))
    assert active_weights(model) == chosen
    live = logits(model)
    torch.testing.assert_close(
        live, expected(tiny_dir(family), model, chosen), atol=TOLERANCE, rtol=TOLERANCE
    )
    with disabled(model):
        torch.testing.assert_close(logits(model), logits(models.load(tiny_dir(family)).model))
    assert torch.equal(logits(model), live)
    set_active(model, names)
    ones = expected(tiny_dir(family), model, dict.fromkeys(names, 1.0))
    torch.testing.assert_close(logits(model), ones, atol=TOLERANCE, rtol=TOLERANCE)
    assert (live - ones).abs().max() > 0.1
    set_active(model, names, [0.0] * len(names))
    torch.testing.assert_close(logits(model), logits(models.load(tiny_dir(family)).model))


def test_weights_beside_a_method_that_does_not_add_up(tiny_dir: Callable[..., Path]) -> None:
    model = loaded(tiny_dir("llama"), DoraConfig(rank=2), LoraConfig(rank=2))
    set_active(model, ["a0", "a1"], [1, 0.5])
    wanted = expected(tiny_dir("llama"), model, {"a0": 1.0, "a1": 0.5})
    torch.testing.assert_close(logits(model), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_is_a_factor_on_alpha(tiny_dir: Callable[..., Path], family: str) -> None:
    """With gradients: weight 0.5 on alpha 8 is alpha 4."""
    found = []
    for alpha, weight in ((8.0, 0.5), (4.0, 1.0)):
        model = loaded(tiny_dir(family), LoraConfig(rank=4, alpha=alpha, target_modules=Q[family]))
        set_active(model, "a0", [weight])
        model(IDS).logits.square().mean().backward()
        found.append({name: tensor.grad for name, tensor in trained_tensors(model, "a0").items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4)


def test_a_merge_takes_the_weight_along(tiny_dir: Callable[..., Path]) -> None:
    model = loaded(tiny_dir("llama"), LoraConfig(rank=4), LohaConfig(rank=2), VeraConfig(rank=8))
    set_active(model, ["a0", "a1", "a2"], WEIGHTS[:3])
    live = logits(model)
    for name in ("a1", "a0", "a2"):
        merge_into(model, name)
        torch.testing.assert_close(logits(model), live, atol=TOLERANCE, rtol=TOLERANCE)
    assert not adapters_of(model)


def test_weights_of_the_others_stay_when_one_goes(tiny_dir: Callable[..., Path]) -> None:
    model = loaded(tiny_dir("llama"), *(LoraConfig(rank=2) for _ in range(3)))
    set_active(model, ["a2", "a0", "a1"], [2, 0.5, 1])
    detach(model, "a1")
    assert active_weights(model) == {"a2": 2.0, "a0": 0.5}
    wanted = expected(tiny_dir("llama"), model, {"a2": 2.0, "a0": 0.5})
    torch.testing.assert_close(logits(model), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    set_active(model, "a0")
    assert active_weights(model) == {"a0": 1.0}
    set_active(model, None)
    assert active_weights(model) == {}


def test_an_adapter_that_is_refused_leaves_the_weights(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    fresh = models.load(tiny_dir("llama")).model
    attach(fresh, LoraConfig(rank=2))
    save_adapter(fresh, tmp_path / "idle")
    model = loaded(tiny_dir("llama"), LoraConfig(rank=2), LoraConfig(rank=2))
    set_active(model, ["a1", "a0"], [0.5, 3])
    live = logits(model)
    with pytest.raises(AdapterError, match="was it ever trained"):
        load_adapter(model, tmp_path / "idle")
    assert active_weights(model) == {"a1": 0.5, "a0": 3.0}
    assert torch.equal(logits(model), live)


NOT_ADDITIVE = [DoraConfig(rank=2), Ia3Config(feedforward_modules=("down_proj",)), OftConfig(block_size=8)]


@pytest.mark.parametrize("config", NOT_ADDITIVE, ids=lambda config: config.method)
def test_methods_without_an_update_refuse_a_weight_by_name(
    tiny_dir: Callable[..., Path], config: Any
) -> None:
    model = loaded(tiny_dir("llama"), LoraConfig(rank=2), config)
    set_active(model, ["a0"], [0.5])
    live = logits(model)
    with pytest.raises(AdapterError, match=f"'a1' cannot act with weight 0.5: it is {config.method}"):
        set_active(model, ["a0", "a1"], [1, 0.5])
    assert active_weights(model) == {"a0": 0.5}
    assert torch.equal(logits(model), live)
    set_active(model, ["a1"], [1])


def test_a_module_trained_in_full_refuses_a_weight(tiny_dir: Callable[..., Path]) -> None:
    model = loaded(tiny_dir("llama"), LoraConfig(rank=2, modules_to_save=("norm",)))
    with pytest.raises(AdapterError, match="trains it in full") as caught:
        set_active(model, "a0", [0.5])
    assert caught.value.where == "model.norm"


BAD: list[tuple[Any, Any, str]] = [
    (["a0", "a1"], [0.5], "1 weights"),
    (["a0"], [0.5, 1], "2 weights"),
    (["a0", "a0"], [0.5, 1], "2 weights"),
    (None, [1], "1 weights"),
    ("a0", [math.nan], "weight nan"),
    ("a0", [math.inf], "weight inf"),
    ("a0", [True], "weight True"),
    ("a0", "1", "weight '1'"),
    ("a0", 0.5j, "weight 0.5j"),
]


@pytest.mark.parametrize(("names", "weights", "what"), BAD)
def test_weights_that_cannot_be(tiny_dir: Callable[..., Path], names: Any, weights: Any, what: str) -> None:
    model = loaded(tiny_dir("llama"), LoraConfig(rank=2), LoraConfig(rank=2))
    with pytest.raises(AdapterError, match=what) as caught:
        set_active(model, names, weights)
    assert caught.value.where == "weights"


def test_what_acts_is_saved_weights_and_all(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_dir("llama")
    configs = [LoraConfig(rank=4, target_modules=("q_proj", "embed_tokens")), LokrConfig(rank=2)]
    model = loaded(directory, *configs, LoraConfig(rank=2))
    set_active(model, ["a0", "a1"], [0.7, -1.5])
    live = logits(model)
    with pytest.raises(AdapterError, match="'a0' acts with weight 0.7") as caught:
        save_adapter(model, tmp_path / "a", "a0")
    assert "graft.save_active" in caught.value.fix
    save_adapter(model, tmp_path / "a", "a2")  # which does not act
    save_active(model, tmp_path / "both")
    again = models.load(directory).model
    load_adapter(again, tmp_path / "both")
    torch.testing.assert_close(logits(again), live, atol=TOLERANCE, rtol=TOLERANCE)
    told = json.loads((tmp_path / "both" / "graft.json").read_text())["facts"]["composed"]
    assert told["weights"] == [0.7, -1.5]
    assert [parent["method"] for parent in told["parents"]] == ["lora", "lokr"]
    save_adapter(loaded(directory, configs[0]), tmp_path / "first", "a0")
    own = json.loads((tmp_path / "first" / "graft.json").read_text())
    assert told["parents"][0]["tensors"] == own["tensors"]


def test_what_cannot_be_saved_as_one(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    cases: list[tuple[Any, list[Any], list[float], str]] = [
        ([], [], [], "no adapter acts"),
        (["a0"], [DoraConfig(rank=2)], [1], "depends on the base's own weight"),
        (["a0"], [LoraConfig(rank=2, modules_to_save=("norm",))], [1], "trains model.norm in full"),
        (["a0"], [LoraConfig(rank=2)], [0], "nothing is left"),
    ]
    for names, configs, weights, what in cases:
        model = loaded(tiny_dir("llama"), *configs)
        set_active(model, names, weights)
        with pytest.raises(AdapterError, match=what):
            save_active(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_adapter_with_a_weight_is_not_trained(tiny_dir: Callable[..., Path]) -> None:
    model = loaded(tiny_dir("llama"), LoraConfig(rank=2))
    set_active(model, "a0", [0.5])
    with pytest.raises(TrainingError, match="'a0' acts with weight 0.5") as caught:
        adapter_to_train(model)
    assert "set_active" in caught.value.fix
    set_active(model, "a0", [1.0])
    assert adapter_to_train(model) is adapters_of(model)["a0"]


def test_on_a_quantized_base(tiny_dir: Callable[..., Path]) -> None:
    """In bfloat16 as near to the model in float32 as an adapter without a weight is."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        for alpha, weight in ((8.0, 0.25), (2.0, 1.0)):
            how = {"quantization": "nf4", "dtype": dtype}
            model = loaded(tiny_dir("llama"), LoraConfig(rank=4, alpha=alpha), **how)
            set_active(model, "a0", [weight])
            found[dtype, weight] = logits(model).float()
    exact = found["float32", 1.0]
    torch.testing.assert_close(found["float32", 0.25], exact, atol=TOLERANCE, rtol=TOLERANCE)
    gaps = {weight: float((found["bfloat16", weight] - exact).square().mean()) for weight in (0.25, 1.0)}
    assert 0 < gaps[0.25] < 1.5 * gaps[1.0]
