"""The DoRA layer: values and gradients against the dense formula, what is kept, what happens to its norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graft.adapters.adapted import AdaptedLayer
from graft.adapters.dora import DoraConfig, DoraMethod
from graft.adapters.dora_layer import row_squares
from graft.models.layers import BaseLayer


def quantized(in_features: int, out_features: int, **how: Any) -> nn.Module:
    from graft.quant.linear import QuantizedLinear

    bias = torch.randn(out_features) if how.pop("bias", False) else None
    return QuantizedLinear.from_weight(torch.randn(out_features, in_features), bias, **how)


BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(8, 6),
    "no bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
    "nf4": lambda: quantized(8, 6),
    "nf4 bias": lambda: quantized(8, 6, bias=True),
    "embedding": lambda: nn.Embedding(8, 6),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def over(module: nn.Module, **settings: Any) -> AdaptedLayer:
    base = BaseLayer.of(module.requires_grad_(False))
    assert base is not None
    layer = DoraMethod().build_layer(base, DoraConfig(rank=3, alpha=2.1, **settings), None)
    for parameter in layer.tensors().values():
        nn.init.normal_(parameter, mean=0.5, std=0.3)
    adapted = AdaptedLayer(base)
    adapted.adapters["default"] = layer
    adapted.activate(("default",))
    return adapted


def given(kind: str) -> torch.Tensor:
    return torch.randint(0, 8, (2, 5)) if kind == "embedding" else torch.randn(2, 5, 8)


def formula(adapted: AdaptedLayer, x: torch.Tensor) -> torch.Tensor:
    """The dense equation with a constant norm, made of nothing but torch."""
    layer: Any = adapted.adapters["default"]
    down, up, magnitude = layer.tensors().values()
    dense = adapted.base.dense_weight() + 0.7 * up @ down
    weight = magnitude[:, None] * dense / dense.norm(dim=1, keepdim=True).detach()
    if adapted.base.kind == "embedding":
        return nn.functional.embedding(x, weight.T)
    return nn.functional.linear(x, weight, adapted.base.bias)


@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_those_of_the_dense_formula(kind: str) -> None:
    adapted, x = over(BASES[kind]()), given(kind)
    layer: Any = adapted.adapters["default"]
    leaves = [*layer.tensors().values(), *([x.requires_grad_()] if x.is_floating_point() else [])]
    weights = torch.randn(2, 5, 6)
    output, expected = adapted(x), formula(adapted, x)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((output * weights).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_norms_of_the_merged_rows_are_the_magnitudes(kind: str) -> None:
    adapted = over(BASES[kind]())
    layer: Any = adapted.adapters["default"]
    merged = layer.merged_weight(adapted.base, adapted.base.dense_weight())
    torch.testing.assert_close(merged.norm(dim=1), layer.magnitude.abs(), atol=1e-6, rtol=1e-5)


def test_magnitudes_start_as_norms_of_what_a_quantized_base_computes_with() -> None:
    module = quantized(64, 6)
    base = BaseLayer.of(module)
    assert base is not None
    layer: Any = DoraMethod().build_layer(base, DoraConfig(), torch.Generator().manual_seed(0))
    expected = torch.stack(
        [module.dense_weight(torch.float32)[row].square().sum().sqrt() for row in range(6)]
    )
    torch.testing.assert_close(layer.magnitude.data, expected, atol=1e-6, rtol=1e-6)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x, module(x), base), module(x))


def test_the_norm_is_a_constant_in_the_backward_pass() -> None:
    """Else the gradient of B would have no part along the rows of the new weight."""
    adapted = over(nn.Linear(8, 6, bias=False))
    layer: Any = adapted.adapters["default"]
    down, up, _ = layer.tensors().values()
    adapted(torch.randn(4, 8)).sum().backward()
    along = ((up.grad @ down) * (adapted.base.dense_weight() + 0.7 * up @ down)).sum(1)
    assert float(along.detach().abs().max()) > 1e-2


def test_neither_a_dense_sum_nor_anything_of_the_size_of_the_weight_is_kept() -> None:
    adapted = over(nn.Linear(8, 6))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapted(torch.randn(2, 5, 8))
    # x, x A', the factors; the result, magnitudes, norms, bias.
    assert sorted(kept) == sorted([(2, 5, 8), (10, 3), (3, 8), (6, 3), (2, 5, 6), (6,), (6,), (6,)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_takes_from_all_that_differs_from_the_base(dtype: torch.dtype) -> None:
    adapted = over(nn.Linear(8, 6).to(dtype), dropout=0.5).train()
    layer: Any = adapted.adapters["default"]
    x = torch.randn(3, 8).to(dtype)
    torch.manual_seed(5)
    output = adapted(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5).float()
    weight = layer.merged_weight(adapted.base, adapted.base.dense_weight())
    expected = adapted.base_layer(x).float() + dropped @ (weight - adapted.base.dense_weight()).T
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8e-2  # 8 bits, values up to 4
    torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=tolerance)
    assert not torch.equal(adapted(x), output)
    assert torch.equal(adapted.eval()(x), adapted(x))


def test_rows_of_zeros_stay_finite() -> None:
    module = nn.Linear(8, 6)
    module.weight.data[2] = 0
    base = BaseLayer.of(module.requires_grad_(False))
    assert base is not None
    layer: Any = DoraMethod().build_layer(base, DoraConfig(), torch.Generator().manual_seed(0))
    x = torch.randn(3, 8)
    output = layer(x, module(x), base)
    assert torch.equal(output, module(x))
    output.sum().backward()
    assert all(bool(torch.isfinite(tensor.grad).all()) for tensor in layer.tensors().values())


def test_norms_follow_every_change_of_factors_scaling_and_base() -> None:
    adapted = over(nn.Linear(8, 6)).eval()
    layer: Any = adapted.adapters["default"]
    x = torch.randn(3, 8)

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(adapted(x), formula(adapted, x), atol=1e-5, rtol=1e-5)

    check()
    with torch.no_grad():
        layer.lora_A.mul_(1.5)
    check()
    torch.optim.AdamW(layer.parameters(), lr=0.1)  # a step moves the factors in place
    layer(x, adapted.base_layer(x), adapted.base).sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    check()
    adapted.base.replace_weight(adapted.base.dense_weight() * 3)
    check()
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        twin.base_layer.weight.add_(1)
        twin.base = BaseLayer.of(twin.base_layer)
    torch.testing.assert_close(twin(x), formula(twin, x), atol=1e-5, rtol=1e-5)
    check()


def test_evaluation_makes_the_norms_once(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = over(nn.Linear(8, 6)).eval()
    layer: Any = adapted.adapters["default"]
    calls: list[int] = []
    made = layer.norms
    monkeypatch.setattr(layer, "norms", lambda base: calls.append(1) or made(base))
    with torch.no_grad():
        adapted(torch.randn(1, 8))
        adapted(torch.randn(1, 8))
    assert len(calls) == 1
    adapted(torch.randn(1, 8))
    assert len(calls) == 2


def test_inference_mode_before_training() -> None:
    adapted = over(nn.Linear(8, 6)).eval()
    with torch.inference_mode():
        adapted(torch.randn(2, 8))
    adapted(torch.randn(2, 8)).sum().backward()


def test_row_squares_are_sums_over_inputs() -> None:
    module = Conv1D(6, 8)
    base = BaseLayer.of(module)
    assert base is not None
    torch.testing.assert_close(row_squares(base, torch.float32), module.weight.data.square().sum(0))


@pytest.mark.parametrize("kind", ["linear", "nf4 bias"])
def test_gradients_in_bfloat16_are_close_to_those_in_float32(kind: str) -> None:
    adapted = over(BASES[kind]())
    layer: Any = adapted.adapters["default"]
    with torch.no_grad():  # where training is: magnitudes near the norms
        layer.magnitude.copy_(layer.norms(adapted.base) * torch.linspace(0.7, 1.4, 6))
    twin = copy.deepcopy(adapted)
    if kind == "linear":
        twin.base_layer.to(torch.bfloat16)
    twin.base = BaseLayer.of(twin.base_layer)
    x, weights = torch.randn(40, 8), torch.randn(40, 6)
    (adapted(x) * weights).sum().backward()
    (twin(x.to(torch.bfloat16)) * weights.to(torch.bfloat16)).float().sum().backward()
    pairs = zip(adapted.adapters.parameters(), twin.adapters.parameters(), strict=True)
    for one, other in pairs:
        # Sums of 40 rows of values of order one with 8 bits each.
        torch.testing.assert_close(other.grad, one.grad, atol=0.3, rtol=5e-2)


def test_products_with_few_rows_are_those_of_the_weight() -> None:
    rows = torch.randn(3, 8)
    for make in BASES.values():
        base = BaseLayer.of(make())
        assert base is not None
        torch.testing.assert_close(base.product(rows), rows @ base.dense_weight().T, atol=1e-5, rtol=1e-5)
