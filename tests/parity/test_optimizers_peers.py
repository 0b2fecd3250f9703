"""The 8-bit optimizer against bitsandbytes', Lion against bitsandbytes' and LoRA+ against PEFT's groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.kernels.reference import Rounding
from graft.models.load import load
from graft.training.adamw_8bit import AdamW8bit
from graft.training.config import TrainingConfig
from graft.training.flat_state import FlatState
from graft.training.groups import Treatment, treatments
from graft.training.optim import Optimizer
from graft.training.pages import Kind
from graft.training.paging import Paging, pages_and_store

bnb = pytest.importorskip("bitsandbytes")

SHAPES = ((64, 64), (100, 77), (600, 512), (4099,))
"""Whole blocks, a short last block, several pieces, a vector."""


def pairs() -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    ours = {str(shape): nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES}
    return ours, {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}


def give_gradients(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in ours.items():
        spread = torch.rand(parameter.shape, generator=generator) ** 4
        parameter.grad = torch.randn(parameter.shape, generator=generator) * spread
        theirs[name].grad = parameter.grad.clone()


def alone_in_8_bits(
    params: dict[str, nn.Parameter], config: TrainingConfig, rounding: Rounding = "nearest"
) -> FlatState:
    """The rule over all tensors, whatever their size, without clipping."""
    rule = AdamW8bit(config, torch.device("cpu"), rounding)
    kinds = {name: Kind(rule, 1.0, config.weight_decay, p.dtype) for name, p in params.items()}
    return FlatState(params, *pages_and_store(params, kinds, Paging(None, None, ".")))


def loaded(optimizer: FlatState, name: str) -> dict[str, Tensor]:
    return {part: value.load() for part, value in optimizer.state(name).items()}


def test_through_the_grid_every_bit_is_bitsandbytes() -> None:
    ours, theirs = pairs()
    config = TrainingConfig(weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-6)
    mine = alone_in_8_bits(ours, config, rounding="grid")
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    peer = bnb.optim.AdamW8bit(theirs.values(), **settings)
    for seed in range(8):
        give_gradients(ours, theirs, seed)
        mine.step(1e-3, {})
        peer.step()
        for name, other in theirs.items():
            state, held = loaded(mine, name), peer.state[other]
            assert torch.equal(ours[name], other), (seed, name)
            for part, their in (("exp_avg", "1"), ("exp_avg_sq", "2")):
                assert torch.equal(state[part], held[f"state{their}"])
                assert torch.equal(state[f"{part}_absmax"], held[f"absmax{their}"])


def test_without_the_grid_codes_differ_where_the_grid_is_coarse() -> None:
    """After one step: first moments by one code at most; second moments likewise above 1% of their largest.

    The codes are 0.7% of the largest and more apart there, hundreds of points of the grid (3e-5). Below, the
    grid is coarser than the map: bitsandbytes has no second moment under 1.5e-5 of the largest on CPU.
    """
    ours, theirs = pairs()
    mine = alone_in_8_bits(ours, TrainingConfig())
    peer = bnb.optim.AdamW8bit(theirs.values(), lr=1e-3, weight_decay=0.0)
    give_gradients(ours, theirs, 0)
    mine.step(1e-3, {})
    peer.step()
    for name, other in theirs.items():
        assert torch.equal(ours[name], other)  # nothing was decoded yet
        held = peer.state[other]
        state = loaded(mine, name)
        for part, their, least in (("exp_avg", "1", 1e-3), ("exp_avg_sq", "2", 1e-2)):
            book = held[f"qmap{their}"]
            codes, peers = state[part].flatten().int(), held[f"state{their}"].flatten().int()
            large = book[peers].abs() >= least
            gap = (codes - peers)[large].abs()
            assert int(gap.max()) <= 1
            assert float((gap > 0).float().mean()) < 0.02  # as near to both


def regression(make: Callable[[dict[str, nn.Parameter]], Callable[[], None]], steps: int) -> list[float]:
    """Losses of a two-layer network that learns another one's answers."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 128, generator=generator) / 8, torch.randn(128, 32, generator=generator) / 11
    start = torch.randn(64, 256, generator=generator) / 8, torch.randn(256, 32, generator=generator) / 16
    params = {str(index): nn.Parameter(value.clone()) for index, value in enumerate(start)}
    step = make(params)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 64, generator=generator)
        found = torch.tanh(x @ params["0"]) @ params["1"]
        loss = (found - torch.tanh(x @ teacher[0]) @ teacher[1]).square().mean()
        loss.backward()
        step()
        losses.append(float(loss.detach()))
    return losses


def test_it_learns_as_well_as_in_float32_and_as_bitsandbytes() -> None:
    def of_graft(name: str) -> Callable[[dict[str, nn.Parameter]], Callable[[], None]]:
        def make(params: dict[str, nn.Parameter]) -> Callable[[], None]:
            optimizer = Optimizer(params, TrainingConfig(optimizer=name, max_grad_norm=0.0))  # type: ignore[arg-type]
            return lambda: optimizer.step(3e-3, 1.0)

        return make

    def of_peer(params: dict[str, nn.Parameter]) -> Callable[[], None]:
        peer = bnb.optim.AdamW8bit(params.values(), lr=3e-3, weight_decay=0.0)

        def step() -> None:
            peer.step()
            peer.zero_grad()

        return step

    exact, ours, peer = (
        torch.tensor(regression(make, 200)) for make in (of_graft("adamw"), of_graft("adamw_8bit"), of_peer)
    )
    last = {"exact": exact, "ours": ours, "peer": peer}
    means = {name: float(losses[-20:].mean()) for name, losses in last.items()}
    assert means["exact"] < 0.2 * float(exact[0]), "it learns at all"
    assert abs(means["ours"] / means["exact"] - 1) < 0.02, means
    assert abs(means["ours"] / means["peer"] - 1) < 0.02, means
    # Over the whole course, in the mean of ten steps.
    smooth = [losses.view(-1, 10).mean(1) for losses in (ours, exact, peer)]
    assert float((smooth[0] / smooth[1] - 1).abs().max()) < 0.1
    assert float((smooth[0] / smooth[2] - 1).abs().max()) < 0.1


def test_lion_is_bitsandbytes_lion() -> None:
    ours, theirs = pairs()
    config = TrainingConfig(optimizer="lion", learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.0)
    mine = Optimizer(ours, config, dict.fromkeys(ours, Treatment()))
    peer = bnb.optim.Lion(theirs.values(), lr=1e-3, weight_decay=0.1)
    for seed in range(5):
        give_gradients(ours, theirs, seed)
        mine.step(1e-3, 1.0)
        peer.step()
        for name, other in theirs.items():
            assert torch.equal(ours[name], other), (seed, name)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks for what transformers gives up
def test_lora_plus_groups_are_pefts(tiny_dir: Callable[..., Path]) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    directory, rates = tiny_dir("llama"), {"lr": 1e-4, "loraplus_lr_ratio": 16.0}
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    peer = create_loraplus_optimizer(model, torch.optim.AdamW, **rates)
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = {
        names[id(p)].removeprefix("base_model.model.").replace(".default", ""): group["lr"]
        for group in peer.param_groups
        for p in group["params"]
    }
    base = load(str(directory))
    attach(base.model, LoraConfig(rank=4, target_modules=("q_proj", "down_proj")))
    config = TrainingConfig(lora_plus_ratio=16.0)
    found = treatments(base.model, adapter_tensors(base.model), config, peak=1e-4)
    assert {name: 1e-4 * each.rate for name, each in found.items()} == theirs
