"""The optimizers besides AdamW: what they compute, what their states take, and how those come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.errors import CheckpointError, ConfigError
from graft.kernels.reference import Rounding
from graft.training import adamw_8bit
from graft.training.adamw_8bit import AdamW8bit
from graft.training.config import TrainingConfig
from graft.training.flat_state import FlatState
from graft.training.groups import Treatment
from graft.training.optim import Optimizer
from graft.training.pages import Kind
from graft.training.paging import Paging, pages_and_store
from graft.training.rules import SGD, AdamW, Lion

SHAPES = {"a": (64, 80), "b": (3, 2048), "c": (100, 77), "d": (70, 70), "small": (60, 60), "vector": (50,)}
"""5120, 6144, 7700 and 4900 numbers, two of them no whole blocks; and tensors that stay in float32."""

CONFIGS = {
    "adamw": TrainingConfig(weight_decay=0.1),
    "adamw_8bit": TrainingConfig(optimizer="adamw_8bit", weight_decay=0.1),
    "sgd": TrainingConfig(optimizer="sgd", learning_rate=1.0, sgd_momentum=0.9, weight_decay=0.1),
    "sgd without momentum": TrainingConfig(optimizer="sgd", learning_rate=1.0, weight_decay=0.1),
    "lion": TrainingConfig(optimizer="lion", learning_rate=1.0, weight_decay=0.1),
}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(params: dict[str, nn.Parameter], seed: int, without: str = "") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in params.items():
        # From 1e-9 to 1: within a block most second moments are far below the largest.
        scale = 10 ** (-9 * torch.rand(parameter.shape, generator=generator))
        gradient = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
        parameter.grad = None if name == without else gradient


def step(optimizer: Optimizer, params: dict[str, nn.Parameter], seed: int, without: str = "") -> None:
    set_gradients(params, seed, without)
    optimizer.step(1e-2, optimizer.gradient_norm())


def equal(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def small_pages(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    for rule in (AdamW8bit, AdamW, SGD, Lion):
        monkeypatch.setattr(rule, "numbers", numbers)


def alone_in_8_bits(
    params: dict[str, nn.Parameter], config: TrainingConfig, rounding: Rounding = "nearest"
) -> FlatState:
    """The rule over all tensors, whatever their size, without clipping."""
    rule = AdamW8bit(config, torch.device("cpu"), rounding)
    kinds = {name: Kind(rule, 1.0, config.weight_decay, p.dtype) for name, p in params.items()}
    return FlatState(params, *pages_and_store(params, kinds, Paging(None, None, ".")))


def loaded(optimizer: FlatState, name: str) -> dict[str, Tensor]:
    return {part: value.load() for part, value in optimizer.state(name).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_state_comes_back_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pages(monkeypatch, 2048)  # tensors of several pages, pages of several tensors
    straight, stopped = parameters(), parameters()
    one, two = Optimizer(straight, CONFIGS[name]), Optimizer(stopped, CONFIGS[name])
    for seed in range(4):
        for params, optimizer in ((straight, one), (stopped, two)):
            step(optimizer, params, seed, without="d" if seed == 1 else "")
    assert name == "sgd without momentum" or two.state()
    fresh = {key: nn.Parameter(p.detach().clone()) for key, p in stopped.items()}
    three = Optimizer(fresh, CONFIGS[name])
    three.load_state(dict(two.state()))
    assert equal(three.state(), two.state())
    for seed in range(4, 8):
        for params, optimizer in ((straight, one), (fresh, three)):
            step(optimizer, params, seed)
    assert equal(straight, fresh)
    assert equal(one.state(), three.state())


def test_a_state_of_another_optimizer_is_refused() -> None:
    for name, other in (("adamw_8bit", "adamw"), ("adamw", "adamw_8bit"), ("lion", "adamw")):
        params = parameters()
        optimizer = Optimizer(params, CONFIGS[name])
        step(optimizer, params, 0)
        with pytest.raises(CheckpointError, match=r"optimizer state a\|"):
            Optimizer(parameters(), CONFIGS[other]).load_state(optimizer.state())


def test_eight_bits_take_two_bytes_and_a_bit() -> None:
    params = {"a": nn.Parameter(torch.randn(256, 256)), "b": nn.Parameter(torch.randn(16, 512))}
    optimizer = Optimizer(params, CONFIGS["adamw_8bit"])
    step(optimizer, params, 0)
    num = sum(p.numel() for p in params.values())
    counts = 4 * len(params)
    assert optimizer.state_bytes == num * 2 + num // 256 * 2 * 4 + counts
    assert round(optimizer.state_bytes / num, 2) == 2.03


def test_small_tensors_and_embeddings_keep_float32() -> None:
    params = parameters()
    treated = {name: Treatment(float32_state=name == "c") for name in params}
    optimizer = Optimizer(params, CONFIGS["adamw_8bit"], treated)
    step(optimizer, params, 0)
    kinds = {name: optimizer.state()[f"{name}|exp_avg"].dtype for name in params}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {"c", "small", "vector"}
    assert {name for name, kind in kinds.items() if kind == torch.uint8} == {"a", "b", "d"}


@pytest.mark.parametrize("piece", [1024, 1 << 14, 1 << 18])
def test_pieces_change_no_bit(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(size: int) -> tuple[dict[str, nn.Parameter], Mapping[str, Tensor]]:
        small_pages(monkeypatch, size)
        params = parameters()
        optimizer = Optimizer(params, CONFIGS["adamw_8bit"])
        for seed in range(4):
            step(optimizer, params, seed, without="b" if seed == 2 else "")
        return params, optimizer.state()

    (one, first), (two, second) = run(4096), run(piece)
    assert equal(one, two)
    assert equal(first, second)


def test_a_step_is_adamw_over_the_decoded_moments() -> None:
    """Against torch's AdamW, which is given the decoded moments before every step."""
    config = CONFIGS["adamw_8bit"]
    params = {name: p for name, p in parameters().items() if p.numel() >= 4096}
    ours = alone_in_8_bits(params, config)
    peers = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    peer = torch.optim.AdamW(peers.values(), lr=1e-2, weight_decay=0.1)
    for seed in range(5):
        set_gradients(params, seed)
        for name, other in peers.items():
            state = loaded(ours, name)
            if state:
                peer.state[other]["exp_avg"] = decoded(state, "exp_avg", adamw_8bit.ABSMAX_FORMAT)
                peer.state[other]["exp_avg_sq"] = decoded(state, "exp_avg_sq", adamw_8bit.UNSIGNED_FORMAT)
            other.data.copy_(params[name].detach())
            other.grad = params[name].grad
        ours.step(1e-2, {})
        peer.step()
        for name, other in peers.items():
            # A few roundings of float32, of steps of up to 3e-2 and of values of up to 4.
            assert torch.allclose(params[name], other, rtol=1e-6, atol=1e-7), (seed, name)


def decoded(state: dict[str, Tensor], part: str, fmt: Any) -> Tensor:
    codes, absmax = state[part].flatten().long(), state[f"{part}_absmax"]
    book = torch.tensor(fmt.codebook)
    if part == "exp_avg_sq":
        book[0] = book[1] / 2
    return (book[codes] * absmax.repeat_interleave(256)[: codes.numel()]).view(state[part].shape)


def test_no_step_is_out_of_proportion() -> None:
    """AdamW's first steps are of about the learning rate, for gradients of any size; so are these."""
    params = {"a": nn.Parameter(torch.zeros(64, 256))}
    optimizer = Optimizer(params, TrainingConfig(optimizer="adamw_8bit"))
    before = params["a"].detach().clone()
    for seed in range(20):
        step(optimizer, params, seed)
        moved = (params["a"].detach() - before).abs().max()
        # (1 - beta1) / sqrt(1 - beta2) = 3.2 is what one gradient after none moves (Adam, sec. 2.1).
        assert float(moved) < 3.3e-2, seed
        before = params["a"].detach().clone()


def test_reference_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from graft import kernels
    from graft.kernels import reference, reference_decode

    def run() -> dict[str, Tensor]:
        params = parameters()
        optimizer = Optimizer(params, CONFIGS["adamw_8bit"])
        for seed in range(3):
            step(optimizer, params, seed)
        return {**params, **optimizer.state()}

    compiled = run()
    plain: dict[str, Callable[..., Any]] = {
        "encode_blockwise": reference.encode_blockwise,
        "decode_blockwise": reference_decode.decode_blockwise,
    }
    monkeypatch.setattr(kernels, "call", lambda op, *args, **kwargs: plain[op](*args, **kwargs))
    assert equal(compiled, run())


def test_sgd_is_the_formula() -> None:
    params = parameters()
    expected = {name: p.detach().double().clone() for name, p in params.items()}
    sums: dict[str, Tensor] = {}
    optimizer = Optimizer(params, CONFIGS["sgd"])
    for seed in range(4):
        set_gradients(params, seed)
        norm = optimizer.gradient_norm()
        for name, p in params.items():
            g = p.grad.double() * min(1.0, 1.0 / norm)  # type: ignore[union-attr]
            sums[name] = 0.9 * sums[name] + g if name in sums else g
            expected[name] *= 1 - 1e-2 * (0.1 if p.ndim >= 2 else 0.0)
            expected[name] -= 1e-2 * sums[name]
        optimizer.step(1e-2, norm)
    for name, p in params.items():
        assert torch.allclose(p.detach().double(), expected[name], atol=1e-6), (
            name
        )  # float32 after four steps


def test_lion_is_the_formula() -> None:
    params = {name: nn.Parameter(p.detach().double()) for name, p in parameters().items()}
    expected = {name: p.detach().clone() for name, p in params.items()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    optimizer = Optimizer(params, CONFIGS["lion"])
    for seed in range(4):
        set_gradients(params, seed)
        norm = optimizer.gradient_norm()
        for name, p in params.items():
            g = p.grad * min(1.0, 1.0 / norm)  # type: ignore[operator]
            direction = (0.9 * momenta[name] + 0.1 * g).sign()
            expected[name] *= 1 - 1e-2 * (0.1 if p.ndim >= 2 else 0.0)
            expected[name] -= 1e-2 * direction
            momenta[name] = 0.99 * momenta[name] + 0.01 * g
        optimizer.step(1e-2, norm)
    for name, p in params.items():
        assert torch.allclose(p.detach(), expected[name], atol=1e-12), name


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"optimizer": "sgd", "learning_rate": 1.0, "adam_beta1": 0.8}, "adam_beta1"),
        ({"optimizer": "lion", "learning_rate": 1.0, "adam_beta2": 0.99}, "adam_beta2"),
        ({"optimizer": "lion", "learning_rate": 1.0, "adam_epsilon": 1e-6}, "adam_epsilon"),
        ({"optimizer": "adamw", "sgd_momentum": 0.9}, "sgd_momentum"),
        ({"optimizer": "adamw_8bit", "lion_beta2": 0.9}, "lion_beta2"),
        ({"optimizer": "sgd", "learning_rate": 1.0, "sgd_momentum": 1.0}, "sgd_momentum"),
        ({"optimizer": "sgd"}, "learning_rate"),
        ({"optimizer": "lion"}, "learning_rate"),
        ({"optimizer": "adafactor"}, "optimizer"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio"),
        ({"embedding_learning_rate": float("inf")}, "embedding_learning_rate"),
    ],
)
def test_what_cannot_act_is_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**settings)
    assert caught.value.where == f"training.{field}"
