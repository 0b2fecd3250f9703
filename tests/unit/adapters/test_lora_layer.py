"""The LoRA layers: values and gradients against the formula and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from graft.adapters.adapted import AdaptedLayer
from graft.adapters.initializers import fill_lora, generator_for
from graft.adapters.lora import LoraConfig
from graft.adapters.lora_layer import LoraEmbedding, LoraLinear
from graft.adapters.lora_update import LoraUpdate, StartedUpdate
from graft.models.layers import BaseLayer


def over(module: nn.Module, rank: int = 3, scaling: float = 0.7, dropout: float = 0.0) -> AdaptedLayer:
    base = BaseLayer.of(module.requires_grad_(False))
    assert base is not None
    kind = LoraEmbedding if base.kind == "embedding" else LoraLinear
    layer = kind(base.in_features, base.out_features, rank, scaling, dropout)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    adapted = AdaptedLayer(base)
    adapted.adapters["default"] = layer
    adapted.activate(("default",))
    return adapted


def quantized(in_features: int, out_features: int) -> nn.Module:
    from graft.quant.linear import QuantizedLinear

    return QuantizedLinear.from_weight(torch.randn(out_features, in_features))


LINEARS: dict[str, Any] = {
    "linear": lambda: nn.Linear(8, 6),
    "no bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
    "nf4": lambda: quantized(8, 6),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", LINEARS)
def test_output_is_the_formula(kind: str) -> None:
    adapted = over(LINEARS[kind](), rank=3, scaling=0.7)
    layer: Any = adapted.adapters["default"]
    x = torch.randn(2, 5, 8)
    weight = adapted.base.dense_weight() + 0.7 * layer.lora_B @ layer.lora_A
    expected = x @ weight.T + (0 if adapted.base.bias is None else adapted.base.bias)
    torch.testing.assert_close(adapted(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_in_float64(in_place: bool) -> None:
    def update(x: torch.Tensor, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # In place on a leaf is forbidden to everybody: a layer's output never is one.
        return LoraUpdate.apply(x, base * 1.0, a, b, 0.7, in_place)

    shapes = ((2, 3, 5), (2, 3, 4), (2, 5), (4, 2))
    given = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(update, given)


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_of_started_updates_in_float64(in_place: bool) -> None:
    start = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def update(x: torch.Tensor, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return StartedUpdate.apply(x, base * 1.0, a, b, *start, 0.7, in_place)

    shapes = ((2, 3, 5), (2, 3, 4), (2, 5), (4, 2))
    given = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(update, given)


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("started", [False, True])
def test_backward_equals_plain_autograd(kind: str, dtype: torch.dtype, started: bool) -> None:
    adapted = over(LINEARS[kind]().to(dtype))
    layer: Any = adapted.adapters["default"]
    if started:
        layer.start_A, layer.start_B = (0.3 * torch.randn(t.shape) for t in (layer.lora_A, layer.lora_B))
    weights = torch.randn(2, 5, 6, dtype=dtype)
    results = []
    for path in (layer.forward, layer.reference_forward):
        layer.zero_grad()
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        output = path(x, adapted.base_layer(x), adapted.base)
        (output * weights).sum().backward()
        assert output.dtype == dtype
        results.append([output.detach(), x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    assert results[0][2].dtype == results[0][3].dtype == torch.float32
    # bf16 keeps 8 bits; the two paths round in different places.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, atol=tolerance, rtol=tolerance)


def test_first_gradient_reaches_B_only() -> None:
    adapted = over(nn.Linear(8, 6))
    layer: Any = adapted.adapters["default"]
    fill_lora(layer, adapted.base, LoraConfig(), generator_for(0, "x"))
    adapted(torch.randn(4, 8)).square().sum().backward()
    assert float(layer.lora_A.grad.abs().max()) == 0
    assert float(layer.lora_B.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", LINEARS)
def test_an_update_is_measured_from_its_start(kind: str) -> None:
    adapted = over(LINEARS[kind]())
    layer: Any = adapted.adapters["default"]
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    x = torch.randn(2, 5, 8)
    layer.begin_at(a, b, subtract=True)
    torch.testing.assert_close(adapted(x), adapted.base_layer(x), atol=1e-6, rtol=1e-6)
    layer.lora_A.data *= 2
    expected = adapted.base_layer(x) + 0.7 * x @ (b @ a).T
    torch.testing.assert_close(adapted(x), expected, atol=1e-5, rtol=1e-5)
    weight = adapted.base.dense_weight()
    merged = layer.merged_weight(adapted.base, weight)
    torch.testing.assert_close(merged, weight + 0.7 * b @ a, atol=1e-6, rtol=1e-6)
    assert torch.equal(layer.start_A, a)
    assert torch.equal(layer.start_B, b)


def test_backward_from_a_start_keeps_no_joined_factor() -> None:
    adapted = over(nn.Linear(8, 6), rank=3)
    layer: Any = adapted.adapters["default"]
    layer.begin_at(layer.lora_A.detach(), layer.lora_B.detach(), subtract=True)
    kept: list[tuple[int, ...]] = []
    x = torch.randn(2, 5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapted(x)
    assert sorted(kept) == sorted([(2, 5, 8), (10, 6), (3, 8), (6, 3), (3, 8), (6, 3)])


def test_backward_keeps_the_input_and_nothing_of_the_size_of_the_output() -> None:
    adapted = over(nn.Linear(8, 6), rank=3)
    kept: list[tuple[int, ...]] = []
    x = torch.randn(2, 5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapted(x)
    assert sorted(kept) == sorted([(2, 5, 8), (10, 3), (3, 8), (6, 3)])


def test_no_input_is_kept_where_lora_A_is_frozen() -> None:
    adapted = over(nn.Linear(8, 6), rank=3)
    layer: Any = adapted.adapters["default"]
    layer.lora_A.requires_grad_(False)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapted(torch.randn(2, 5, 8)).sum().backward()
    assert (2, 5, 8) not in kept
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is not None


def test_result_is_written_into_the_base_output_but_not_under_a_hook() -> None:
    adapted = over(nn.Linear(8, 6, bias=False))
    layer: Any = adapted.adapters["default"]
    x = torch.randn(2, 8)
    output = adapted.base_layer(x)
    assert layer(x, output, adapted.base).data_ptr() == output.data_ptr()
    seen: list[torch.Tensor] = []
    adapted.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    adapted(x)
    torch.testing.assert_close(seen[0], x @ adapted.base_layer.weight.T)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", LINEARS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    adapted = over(LINEARS[kind](), dropout=0.5).train()
    x = torch.randn(3, 8, requires_grad=True)
    grads = []
    for wrapped in (False, True):
        adapted.zero_grad()
        torch.manual_seed(4)
        output = checkpoint(adapted, x, use_reentrant=reentrant) if wrapped else adapted(x)
        output.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in adapted.adapters.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", [*LINEARS, "embedding"])
def test_autocast(kind: str) -> None:
    adapted = over(nn.Embedding(8, 6) if kind == "embedding" else LINEARS[kind]())
    x = torch.randint(0, 8, (3, 2)) if kind == "embedding" else torch.randn(3, 8, requires_grad=True)
    plain = adapted(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted(x)
        output.float().sum().backward()
    torch.testing.assert_close(output.float(), plain, atol=6e-2, rtol=6e-2)
    for parameter in adapted.adapters.parameters():
        assert parameter.grad.dtype == torch.float32


def test_dropout_acts_on_the_update_in_training_only() -> None:
    adapted = over(nn.Linear(8, 6), dropout=0.5)
    x = torch.randn(4000, 8)
    adapted.eval()
    exact = adapted(x)
    assert torch.equal(adapted(x), exact)
    adapted.train()
    noisy = adapted(x)
    assert not torch.equal(noisy, adapted(x))
    base = adapted.base_layer(x)
    # The mean over 4000 rows has a deviation of about 0.02 of the update's size.
    torch.testing.assert_close((noisy - base).mean(0), (exact - base).mean(0), atol=0.1, rtol=0)


def test_embedding_changes_only_rows_with_an_update_and_keeps_the_padding_row() -> None:
    adapted = over(nn.Embedding(10, 6, padding_idx=0))
    layer: Any = adapted.adapters["default"]
    layer.lora_embedding_A.data[:, 4:] = 0
    ids = torch.arange(10)
    update = adapted(ids) - adapted.base_layer(ids)
    expected = 0.7 * (layer.lora_embedding_B @ layer.lora_embedding_A).T
    torch.testing.assert_close(update, expected, atol=1e-6, rtol=1e-5)
    assert not update[4:].any()
    adapted(ids).sum().backward()
    assert float(layer.lora_embedding_A.grad[:, 0].abs().max()) == 0


@torch.no_grad()
def test_first_values() -> None:
    linear, wide = LoraLinear(4096, 5, 4, 1.0), LoraLinear(4096, 5, 4, 1.0)
    base: Any = BaseLayer.of(nn.Linear(4096, 5))
    fill_lora(linear, base, LoraConfig(), generator_for(0, "a"))
    fill_lora(wide, base, LoraConfig(init="gaussian"), generator_for(0, "a"))
    bound = 1 / 64
    assert float(linear.lora_A.abs().max()) <= bound
    # Deviation of a uniform law: bound / sqrt(3); of 16384 samples to 2 percent.
    assert float(linear.lora_A.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert float(wide.lora_A.std()) == pytest.approx(1 / 4, rel=0.02)
    assert float(linear.lora_B.abs().max()) == float(wide.lora_B.abs().max()) == 0
    embedding = LoraEmbedding(7, 4096, 4, 1.0)
    fill_lora(embedding, base, LoraConfig(), generator_for(0, "a"))
    assert float(embedding.lora_embedding_A.abs().max()) == 0
    assert float(embedding.lora_embedding_B.std()) == pytest.approx(1, rel=0.02)


def test_generator_depends_on_seed_and_path_only() -> None:
    first = torch.rand(4, generator=generator_for(1, "a.b"))
    torch.manual_seed(99)
    assert torch.equal(torch.rand(4, generator=generator_for(1, "a.b")), first)
    assert not torch.equal(torch.rand(4, generator=generator_for(2, "a.b")), first)
    assert not torch.equal(torch.rand(4, generator=generator_for(1, "a.c")), first)
