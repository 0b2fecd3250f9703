"""MLPs that work on a part of the tokens at a time: the same numbers, and nothing wide is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.data.loader import Batch, Loader
from graft.data.masking import Sample
from graft.errors import ModelError
from graft.evaluate.loss import token_losses
from graft.models.lean import lean
from graft.models.load import load
from graft.models.recipes import Recipes
from graft.models.tiled import TiledMLP
from graft.training.recompute import recomputed

TILES = [1, 7, 32, 1000]


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (30, 9, 20, 31)]
    return next(Loader([Sample(row, [-100, *row[1:]]) for row in ids], 4, 40, True, shuffle=False).epoch(0))


def model_of(
    directory: Path, kind: str, dtype: str, dropout: float = 0.0, targets: Any = "all-linear"
) -> tuple[Any, dict[str, nn.Parameter]]:
    base = load(directory, dtype=dtype, quantization="nf4" if kind == "qlora" else None)
    if kind == "full":
        base.model.requires_grad_(True)
        return base.model.train(), dict(base.model.named_parameters())
    attach(base.model, LoraConfig(rank=4, dropout=dropout, target_modules=targets), seed=1)
    for parameter in adapter_tensors(base.model).values():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    return base.model.train(), adapter_tensors(base.model)


def gradients(
    model: Any,
    parameters: dict[str, nn.Parameter],
    tile: int | None,
    *,
    every: int = 0,
    autocast: bool = False,
) -> list[torch.Tensor]:
    recipes = Recipes()
    with lean(model, recipes, (), tile), recomputed(model, every, recipes.store):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), recipes.hooks():
            loss, _ = token_losses(model, make_batch())
        loss.backward()
        recipes.finish()
    found = [
        loss.detach(),
        torch.rand(1),
        *(p.grad.clone() for p in parameters.values() if p.grad is not None),
    ]
    model.zero_grad()
    return found


def assert_near(found: list[torch.Tensor], plain: list[torch.Tensor], rounding: float) -> None:
    assert len(found) == len(plain)
    assert torch.equal(found[1], plain[1]), "the stream of random numbers stands elsewhere"
    for one, other in zip(found, plain, strict=True):
        assert float((one - other).norm()) <= rounding * float(other.norm())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("lora", "float32"), ("qlora", "float32"), ("full", "float32"), ("lora", "bfloat16")]
)
def test_the_same_gradients(tiny_dir: Callable[..., Path], kind: str, dtype: str, tile: int) -> None:
    model, parameters = model_of(tiny_dir("llama"), kind, dtype)
    plain = gradients(model, parameters, None)
    found = gradients(model, parameters, tile)
    # Sums over tokens are added tile by tile: where tokens are halves, sums of tiles are rounded to halves.
    assert_near(found, plain, 1e-5 if dtype == "float32" else 2.0**-7)


@pytest.mark.parametrize("every", [1, 2])
def test_the_same_gradients_where_blocks_are_recomputed(tiny_dir: Callable[..., Path], every: int) -> None:
    model, parameters = model_of(tiny_dir("llama"), "lora", "float32", dropout=0.3)
    once = gradients(model, parameters, 16)
    again = gradients(model, parameters, 16, every=every)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_dropout_is_that_of_the_forward_pass(tiny_dir: Callable[..., Path]) -> None:
    """Against differences of the loss, whose dropout is the same each time."""
    model, parameters = model_of(
        tiny_dir("llama"), "lora", "float32", dropout=0.3, targets=("up_proj", "down_proj")
    )
    model.double()
    (name, parameter), *_ = [(n, p) for n, p in parameters.items() if "layers.0" in n and "lora_B" in n]
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    recipes = Recipes()
    with lean(model, recipes, (), 16):

        def loss_at(distance: float) -> torch.Tensor:
            parameter.data.add_(direction, alpha=distance)
            torch.manual_seed(5)
            with recipes.hooks():
                loss, _ = token_losses(model, make_batch())
            parameter.data.sub_(direction, alpha=distance)
            return loss

        loss_at(0.0).backward()
        assert parameter.grad is not None, name
        slope = float((parameter.grad * direction).sum())
        measured = float((loss_at(3e-3) - loss_at(-3e-3)).detach()) / 6e-3
    assert slope == pytest.approx(measured, rel=5e-3)  # the loss is float32, of about 900


def test_adapters_in_the_first_mlp_alone_learn(tiny_dir: Callable[..., Path]) -> None:
    """There the input has no gradient."""
    model, parameters = model_of(tiny_dir("llama"), "lora", "float32", targets=("gate_proj", "down_proj"))
    assert_near(gradients(model, parameters, 16), gradients(model, parameters, None), 1e-5)


def test_autocast_in_the_backward_pass_is_that_of_the_forward_pass(tiny_dir: Callable[..., Path]) -> None:
    model, parameters = model_of(tiny_dir("llama"), "full", "float32")
    plain = gradients(model, parameters, None, autocast=True)
    assert_near(gradients(model, parameters, 16, autocast=True), plain, 2.0**-6)


def test_nothing_inside_an_mlp_is_kept_or_as_long_as_the_row(tiny_dir: Callable[..., Path]) -> None:
    inner = 200
    model, _ = model_of(tiny_dir("llama", intermediate_size=inner), "lora", "float32")
    longest: list[int] = []
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.act_fn.register_forward_hook(lambda m, args, out: longest.append(out.numel() // inner))
    kept: list[torch.Tensor] = []
    recipes = Recipes()
    put = recipes.store.put
    recipes.store.put = lambda tensor: kept.append(tensor) or put(tensor)  # type: ignore
    with lean(model, recipes, (), 16):
        with recipes.hooks():
            loss, _ = token_losses(model, make_batch())
        assert not any(inner in tensor.shape and not isinstance(tensor, nn.Parameter) for tensor in kept)
        loss.backward()
    assert max(longest) == 16


def test_a_recomputed_block_runs_its_mlp_once_more_and_not_twice(tiny_dir: Callable[..., Path]) -> None:
    model, parameters = model_of(tiny_dir("llama"), "lora", "float32")
    rows = [0]

    def count(module: Any, args: Any, out: torch.Tensor) -> None:
        rows[0] += out.shape[:-1].numel()

    model.model.layers[0].mlp.gate_proj.register_forward_hook(count)
    gradients(model, parameters, None)
    once = rows[0]
    gradients(model, parameters, 16, every=1)
    tokens = make_batch().input_ids.numel()
    probe = once - tokens  # by which the stand-in tells what the MLP computes
    assert rows[0] - once == 2 * tokens + probe


def test_without_gradients(tiny_dir: Callable[..., Path]) -> None:
    model, _ = model_of(tiny_dir("llama"), "lora", "float32")
    batch = make_batch()
    with torch.no_grad():
        plain = model(input_ids=batch.input_ids).logits
        with lean(model, Recipes(), (), 7):
            assert isinstance(model.model.layers[0].mlp, TiledMLP)
            assert torch.allclose(model(input_ids=batch.input_ids).logits, plain, atol=1e-5)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_a_model_without_a_gated_mlp_is_refused(tiny_dir: Callable[..., Path]) -> None:
    model, _ = model_of(tiny_dir("gpt2"), "lora", "float32")
    with (
        pytest.raises(ModelError, match=r"no MLP of GPT2LMHeadModel can work on 16 tokens"),
        lean(model, Recipes(), (), 16),
    ):
        pass
