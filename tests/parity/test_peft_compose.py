"""Composition beside PEFT's add_weighted_adapter: the same where that is right, else how far off it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft.models.load as models
from graft.adapters.attach import attach, set_active
from graft.adapters.attached import trained_tensors
from graft.adapters.compose import compose
from graft.adapters.composition import ComposeConfig
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import load_adapter, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 1e-5
IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
WEIGHTS = (0.7, 1.5)
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def pair(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one rank and target set, which is what PEFT takes; alpha is not the rank."""
    out = tmp_path_factory.mktemp("pair")
    for name, alpha, seed in (("one", 16, 1), ("two", 6, 2)):
        base = models.load(tiny_dir("llama"))
        attach(base.model, LoraConfig(rank=4, alpha=alpha, target_modules=TARGETS), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in trained_tensors(base.model).values():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        save_adapter(base.model, out / name)
    return [out / "one", out / "two"]


def plain(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def theirs(directory: Path, pair: list[Path], kind: str, **how: Any) -> Any:
    """PEFT's model with its own composition of the two active."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain(directory), pair[0], adapter_name="one").eval()
    model.load_adapter(pair[1], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "mixed", combination_type=kind, **how)
    model.set_adapter("mixed")
    return model


def ours(directory: Path, adapter: Path) -> Any:
    """PEFT's model with an adapter that we composed."""
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(directory), adapter).eval()


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    return {
        path: module.get_delta_weight(name).detach().double()
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and (name in module.lora_A or name in module.lora_embedding_A)
    }


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative Frobenius distance of a layer."""
    assert one.keys() == other.keys()
    assert one
    return max(float((one[path] - other[path]).norm() / other[path].norm()) for path in other)


def true_sum(model: Any) -> dict[str, Tensor]:
    one, two = deltas(model, "one"), deltas(model, "two")
    return {path: WEIGHTS[0] * one[path] + WEIGHTS[1] * two[path] for path in one}


def test_cat_is_what_peft_makes_and_what_acts_with_weights(
    tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path
) -> None:
    directory = tiny_dir("llama")
    compose(pair, ComposeConfig(operation="cat", weights=WEIGHTS), tmp_path / "c")
    in_peft = ours(directory, tmp_path / "c")
    other = theirs(directory, pair, "cat")
    base = models.load(directory)
    for name, adapter in zip(("one", "two"), pair, strict=True):
        load_adapter(base.model, adapter, name)
    set_active(base.model, ["one", "two"], WEIGHTS)
    live = logits(base.model)
    torch.testing.assert_close(logits(in_peft), live, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(logits(other), live, atol=TOLERANCE, rtol=TOLERANCE)
    assert (live - logits(plain(directory))).abs().max() > 0.1
    assert gap(deltas(in_peft, "default"), true_sum(other)) < 1e-6


def test_svd_is_what_peft_makes(tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path) -> None:
    directory = tiny_dir("llama")
    compose(pair, ComposeConfig(operation="svd", weights=WEIGHTS, rank=3), tmp_path / "c")
    other = theirs(directory, pair, "svd", svd_rank=3)
    assert gap(deltas(ours(directory, tmp_path / "c"), "default"), deltas(other, "mixed")) < TOLERANCE
    assert gap(deltas(other, "mixed"), true_sum(other)) > 0.1  # three of eight are a real cut


def test_thinned_deltas_are_those_of_pefts_svd_variants(
    tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path
) -> None:
    """ties_svd and magnitude_prune_svd work on true deltas, each scaled once."""
    directory = tiny_dir("llama")
    for operation, majority in (("ties", "total"), ("ties", "frequency"), ("magnitude_prune", None)):
        out = tmp_path / f"{operation}-{majority}"
        how: dict[str, Any] = {} if majority is None else {"majority": majority}
        config = ComposeConfig(operation=operation, weights=WEIGHTS, density=0.3, rank=5, **how)  # type: ignore[arg-type]
        compose(pair, config, out)
        signs = {} if majority is None else {"majority_sign_method": majority}
        other = theirs(directory, pair, f"{operation}_svd", density=0.3, svd_rank=5, **signs)
        assert gap(deltas(ours(directory, out), "default"), deltas(other, "mixed")) < TOLERANCE, out.name


def test_pefts_sums_of_factors_are_not_sums_of_deltas(
    tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path
) -> None:
    """`linear` adds up A's and B's apart, so that B_1 A_2 and B_2 A_1 come in; `ties` thins both apart."""
    directory = tiny_dir("llama")
    compose(pair, ComposeConfig(operation="cat", weights=WEIGHTS), tmp_path / "c")
    mine = deltas(ours(directory, tmp_path / "c"), "default")
    linear = theirs(directory, pair, "linear")
    wanted = true_sum(linear)
    assert gap(mine, wanted) < 1e-6
    off = {
        path: float((delta - wanted[path]).norm() / wanted[path].norm())
        for path, delta in deltas(linear, "mixed").items()
    }
    assert min(off.values()) > 0.9, off  # as much as the sum itself
    # What is off is exactly the cross terms, with sqrt(w s) on every factor.
    for path, module in linear.named_modules():
        if path not in off:
            continue
        roots = [(w * module.scaling[n]) ** 0.5 for n, w in zip(("one", "two"), WEIGHTS, strict=True)]
        down = [module.lora_A[name].weight.double() for name in ("one", "two")]
        up = [module.lora_B[name].weight.double() for name in ("one", "two")]
        cross = roots[0] * roots[1] * (up[0] @ down[1] + up[1] @ down[0])
        torch.testing.assert_close(deltas(linear, "mixed")[path] - wanted[path], cross, atol=1e-6, rtol=1e-5)
    compose(pair, ComposeConfig(operation="ties", weights=WEIGHTS, density=0.3, energy=1), tmp_path / "t")
    ties = theirs(directory, pair, "ties", density=0.3)
    assert gap(deltas(ties, "mixed"), deltas(ours(directory, tmp_path / "t"), "default")) > 0.9


def test_ranks_of_single_layers_load_in_peft(
    tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path
) -> None:
    directory = tiny_dir("llama")
    report = compose(pair, ComposeConfig(operation="svd", weights=WEIGHTS, energy=0.8), tmp_path / "c")
    assert len({layer.rank for layer in report.layers}) > 1
    told = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert told["rank_pattern"]
    model = ours(directory, tmp_path / "c")
    ranks = {
        path.removeprefix("base_model.model."): module.r["default"]
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert ranks == {layer.path: layer.rank for layer in report.layers}
    base = models.load(directory)
    load_adapter(base.model, tmp_path / "c")
    torch.testing.assert_close(logits(model), logits(base.model), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "targets"), [("gpt2", ("c_attn",)), ("gemma3_text", ("embed_tokens", "o_proj"))]
)
def test_other_layouts_load_in_peft(
    tiny_dir: Callable[..., Path], family: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    directory = tiny_dir(family)
    base = models.load(directory)
    for name, seed in (("one", 1), ("two", 2)):
        attach(base.model, LoraConfig(rank=3, target_modules=targets), name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in trained_tensors(base.model, name).values():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        save_adapter(base.model, tmp_path / name, name)
    compose(
        [tmp_path / "one", tmp_path / "two"], ComposeConfig(operation="cat", weights=WEIGHTS), tmp_path / "c"
    )
    set_active(base.model, ["one", "two"], WEIGHTS)
    in_peft = ours(directory, tmp_path / "c")
    torch.testing.assert_close(logits(in_peft), logits(base.model), atol=TOLERANCE, rtol=TOLERANCE)


def test_adapters_of_peft_are_composed(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoHaConfig, PeftModel, get_peft_model
    from peft import LoraConfig as Theirs

    directory = tiny_dir("llama")
    configs = [
        Theirs(
            task_type="CAUSAL_LM",
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "embed_tokens"],
        ),
        LoHaConfig(task_type="CAUSAL_LM", r=2, alpha=3, target_modules=["v_proj"]),
    ]
    generator = torch.Generator().manual_seed(4)
    total: dict[str, Tensor] = {}
    for number, config in enumerate(configs):
        model = get_peft_model(plain(directory), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / str(number))
        for path, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default").detach().double()
                total[path] = total.get(path, 0) + WEIGHTS[number] * delta
    config = ComposeConfig(operation="cat", weights=WEIGHTS)
    report = compose([tmp_path / "0", tmp_path / "1"], config, tmp_path / "c", base=directory)
    # Beside an embedding's factors PEFT saves its base weight, which the composed adapter has no need of.
    assert "0 repeats base weights, left out: model.embed_tokens.base_layer.weight" in report.notes
    mixed = PeftModel.from_pretrained(plain(directory), tmp_path / "c")
    assert gap(deltas(mixed, "default"), total) < 1e-6
