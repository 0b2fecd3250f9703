"""The promises of an adapter method, each tried on small layers; run through `base.check_adapter_method`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.models.layers import BaseLayer

if TYPE_CHECKING:
    from graft.adapters.base import AdapterMethod

TOLERANCE = 1e-5
"""Largest gap allowed between merged and live outputs of order one, in fp32."""


def sample_layers() -> list[tuple[BaseLayer, Tensor]]:
    """A linear, a Conv1D and an embedding, frozen, with an input for each."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 12, generator=generator)
    ids = torch.randint(0, 12, (2, 3), generator=generator)
    pairs: list[tuple[nn.Module, Tensor]] = [
        (nn.Linear(12, 20), x),
        (nn.Linear(12, 20, bias=False), x),
        (Conv1D(20, 12), x),
        (nn.Embedding(12, 20), ids),
    ]
    layers = []
    for module, given in pairs:
        for parameter in module.parameters():
            parameter.data.normal_(generator=generator).mul_(0.3)
            parameter.requires_grad_(False)
        base = BaseLayer.of(module)
        assert base is not None
        layers.append((base, given))
    return layers


def check_layer(method: AdapterMethod, config: Any, base: BaseLayer, x: Tensor) -> None:
    """Try every promise on one base layer.

    Raises:
        AssertionError: The first promise that is not kept.
    """
    label = f"{method.name} on {base.kind}"
    layer: Any = method.build_layer(base, config, torch.Generator().manual_seed(1)).eval()
    _check_tensors(method, config, base, layer, label)
    _check_start(base, layer, x, label)
    _check_generator(method, config, base, layer, label)
    with torch.no_grad():
        for number, tensor in enumerate(layer.tensors().values()):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    _check_gradients(base, layer, x, label)
    _check_merge(base, layer, x, label)


def _check_tensors(method: AdapterMethod, config: Any, base: BaseLayer, layer: Any, label: str) -> None:
    tensors = layer.tensors()
    assert list(tensors.values()) == [] or all(t.dtype == torch.float32 for t in tensors.values()), (
        f"{label}: adapter tensors must be float32"
    )
    assert {id(t) for t in tensors.values()} == {id(t) for t in layer.parameters()}, (
        f"{label}: tensors() must name exactly the parameters"
    )
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    assert shapes == method.tensor_shapes(base, config), f"{label}: tensor_shapes() differs from {shapes}"
    assert layer.num_parameters == sum(t.numel() for t in tensors.values()), (
        f"{label}: num_parameters is wrong"
    )


def _check_start(base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    expected = base.module(x)
    assert torch.equal(layer(x, base.module(x), base), expected), (
        f"{label}: at the start the output must equal the base's"
    )


def _check_generator(method: AdapterMethod, config: Any, base: BaseLayer, layer: Any, label: str) -> None:
    torch.rand(7)
    again: Any = method.build_layer(base, config, torch.Generator().manual_seed(1))
    same = all(
        torch.equal(a, b) for a, b in zip(layer.tensors().values(), again.tensors().values(), strict=True)
    )
    assert same, f"{label}: the first values must come from the generator alone"


def _check_gradients(base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    before = [(name, tensor.clone()) for name, tensor in base.module.named_parameters()]
    output = layer(x, base.module(x), base)
    output.square().sum().backward()
    for name, tensor in layer.tensors().items():
        assert tensor.grad is not None, f"{label}: {name} gets no gradient"
        assert bool(tensor.grad.abs().max() > 0), f"{label}: the gradient of {name} is zero"
    for (name, old), (_, new) in zip(before, base.module.named_parameters(), strict=True):
        assert torch.equal(old, new), f"{label}: the base's {name} was changed"


def _check_merge(base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    with torch.no_grad():
        live = layer(x, base.module(x), base)
        assert torch.equal(live, layer(x, base.module(x), base)), f"{label}: two calls differ"
        weight = base.dense_weight()
        kept = weight.clone()
        merged = layer.merged_weight(base, weight)
        assert torch.equal(weight, kept), f"{label}: merged_weight() changed the weight it was given"
        if base.kind == "embedding":
            plain = functional.embedding(x, merged.t()) * base.output_scale
        else:
            plain = functional.linear(x, merged, base.bias)
        gap = float((plain - live).abs().max())
        assert gap <= TOLERANCE, f"{label}: merged and live outputs differ by {gap:.2e}"
        assert not torch.allclose(live, base.module(x)), f"{label}: the adapter has no effect"
