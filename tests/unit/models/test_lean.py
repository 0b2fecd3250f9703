"""Norms and gated MLPs that keep less: the same numbers, fewer bytes, and the model as it was afterwards."""

from __future__ import annotations

import contextlib
import copy
import gc
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
from graft.evaluate.loss import token_losses
from graft.kernels.wide import is_wide
from graft.models.lean import GatedMLP, LeanNorm, lean
from graft.models.load import load
from graft.models.recipes import Recipes


def make_batch(packing: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (30, 9, 20, 31)]
    return next(
        Loader([Sample(row, [-100, *row[1:]]) for row in ids], 4, 40, packing, shuffle=False).epoch(0)
    )


def loss_and_gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], recipes: Recipes, autocast: bool = False
) -> list[torch.Tensor]:
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), recipes.hooks():
        loss, _ = token_losses(model, make_batch())
    loss.backward()
    recipes.finish()
    found = [loss.detach(), *(p.grad.clone() for p in parameters.values() if p.grad is not None)]
    model.zero_grad()
    return found


def adapted(directory: Path, dtype: str = "float32", dropout: float = 0.0, **how: Any) -> Any:
    base = load(directory, dtype=dtype, **how)
    attach(base.model, LoraConfig(rank=4, dropout=dropout), seed=1)
    for parameter in adapter_tensors(base.model).values():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    return base.model.train()


def same_but_for_sums(found: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    """The same loss; gradients differ by the order in which a norm's two gradients join the residual's."""
    assert torch.equal(found[0], plain[0])
    for one, other in zip(found, plain, strict=True):
        rounding = 1e-5 if other.dtype == torch.float32 else 2.0**-8
        assert float((one - other).norm()) <= rounding * float(other.norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_get_the_same_gradients_on_every_family(
    tiny_dir: Callable[..., Path], tiny_family: str, dtype: str
) -> None:
    model = adapted(tiny_dir(tiny_family), dtype, dropout=0.1)
    parameters = adapter_tensors(model)
    plain = loss_and_gradients(model, parameters, Recipes())
    recipes = Recipes()
    with lean(model, recipes) as count:
        assert count
        found = loss_and_gradients(model, parameters, recipes)
    same_but_for_sums(found, plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_full_fine_tuning_gets_the_same_gradients(tiny_dir: Callable[..., Path], autocast: bool) -> None:
    model = load(tiny_dir("qwen3")).model.train()
    parameters = dict(model.named_parameters())
    model.requires_grad_(True)
    plain = loss_and_gradients(model, parameters, Recipes(), autocast)
    recipes = Recipes()
    with lean(model, recipes):
        found = loss_and_gradients(model, parameters, recipes, autocast)
    assert len(found) == len(parameters) + 1
    same_but_for_sums(found, plain)


def kept_bytes(model: nn.Module, recipes: Recipes) -> int:
    """Bytes of all memory that the backward pass holds besides the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, Any] = {}
    put = recipes.store.put

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return put(tensor)

    recipes.store.put = count  # type: ignore[method-assign]
    with recipes.hooks():
        loss, _ = token_losses(model, make_batch(packing=False))
    loss.backward()
    return sum(storage.nbytes() for storage in held.values())


def test_what_is_kept_for_a_token_is_what_the_formula_says(tiny_dir: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}
    model = adapted(tiny_dir("llama", **sizes), "bfloat16")
    plain = kept_bytes(model, Recipes())
    recipes = Recipes()
    with lean(model, recipes):
        less = kept_bytes(model, recipes)
    batch = make_batch(packing=False)
    # Halves: two residuals, q, k, v, attention out, gate, up; floats: sums of 4 heads; x A' of seven layers.
    width, inner, keys = 64, 192, 32
    product_bytes = 4 if is_wide(torch.bfloat16, "cpu") else 2
    block = 2 * (2 * width + 2 * width + 2 * keys + 2 * inner) + 4 * 4 + product_bytes * 7 * 4
    formula = 6 * block * batch.input_ids.numel()
    assert formula <= less < 1.15 * formula
    assert less < 0.6 * plain


def test_names_and_modules_are_back_afterwards(tiny_dir: Callable[..., Path]) -> None:
    model = adapted(tiny_dir("llama"))
    before = dict(model.named_modules())
    names = list(model.state_dict())
    with contextlib.suppress(KeyError), lean(model, Recipes()):
        assert list(model.state_dict()) == names
        kinds = [type(module) for module in model.modules()]
        assert (kinds.count(LeanNorm), kinds.count(GatedMLP)) == (5, 2)
        model.eval()
        raise KeyError
    assert dict(model.named_modules()) == before
    assert not any(module.training for module in model.modules())


class Louder(nn.Module):
    """An MLP with the usual names and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
        self.down_proj, self.act_fn = nn.Linear(8, 4), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(2 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return found


def test_an_mlp_of_another_formula_is_left_alone() -> None:
    model = nn.Sequential(Louder())
    with lean(model, Recipes()) as count:
        assert count == 0
    assert copy.deepcopy(model)[0](torch.ones(1, 4)).shape == (1, 4)


def test_a_tensor_that_was_written_to_is_kept_as_it_is() -> None:
    recipes, x = Recipes(), torch.ones(3)
    with recipes.hooks():
        output = x * 2
        recipes.note("norm", output, lambda x: x * 2, x)
        assert recipes.pack(output)[0] is not None
        output.add_(1)
        assert recipes.unpack(recipes.pack(output)).tolist() == [3, 3, 3]


def test_an_input_that_was_written_to_is_no_source() -> None:
    recipes, x = Recipes(), torch.ones(3)
    with recipes.hooks():
        output = x * 2
        recipes.note("norm", output, lambda x: x * 2, x)
        handle = recipes.pack(output)
        x.add_(1)
        with pytest.raises(RuntimeError, match="written to"):
            recipes.unpack(handle)
        assert recipes.pack(output)[0] is None


def test_a_pass_whose_backward_pass_never_comes_leaves_nothing(tiny_dir: Callable[..., Path]) -> None:
    model, recipes = adapted(tiny_dir("llama")), Recipes()

    def bytes_held() -> int:
        gc.collect()
        # Other tests leave tensors without memory and objects that stand for tensors.
        found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())

    with lean(model, recipes):
        for turn in range(3):
            with recipes.hooks():
                loss, _ = token_losses(model, make_batch())
            del loss  # as where it is not finite, or memory ran out
            recipes.release()
            if not turn:
                before = bytes_held()
        assert bytes_held() <= before
