"""The promises of an adapter method, each tried on small layers; run through `base.check_adapter_method`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.base import frozen_tensors, is_additive
from graft.adapters.effect import factors
from graft.models.layers import BaseLayer

if TYPE_CHECKING:
    from graft.adapters.base import AdapterMethod

TOLERANCE = 1e-5
"""Largest gap allowed between merged and live outputs of order one, in fp32."""

GRADIENT_TOLERANCE = 1e-6
"""Largest share by which gradients in float64 may be off; finite differences are good to about 1e-9."""


def sample_layers() -> list[tuple[BaseLayer, Tensor]]:
    """A linear, a Conv1D, an embedding and convolutions, frozen, with an input for each."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 12, generator=generator)
    image = torch.randn(2, 6, 5, 4, generator=generator)
    ids = torch.randint(0, 12, (2, 3), generator=generator)
    pairs: list[tuple[nn.Module, Tensor]] = [
        (nn.Linear(12, 20), x),
        (nn.Linear(12, 20, bias=False), x),
        (Conv1D(20, 12), x),
        (nn.Embedding(12, 20), ids),
        (nn.Conv2d(6, 10, (3, 2), stride=2, padding=(1, 0)), image),
        (nn.Conv2d(6, 10, 3, padding=2, dilation=2, bias=False, padding_mode="circular"), image),
        (nn.Conv2d(6, 10, 2, groups=2), image),
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
    layer = _built(method, config, base)
    _check_tensors(method, config, base, layer, label)
    _check_start(base, layer, x, label)
    _check_generator(method, config, base, layer, label)
    with torch.no_grad():
        for number, tensor in enumerate(layer.tensors().values()):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    _check_gradients(method, base, layer, x, label)
    _check_exact_gradients(base, layer, x, label)
    _check_additive(base, layer, x, label)
    _check_merge(base, layer, x, label)
    _check_no_state(method, config, base, layer, x, label)


def _built(method: AdapterMethod, config: Any, base: BaseLayer, seed: int = 1) -> Any:
    """The layer as `attach` makes it, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    layer: Any = method.build_layer(base, config.at("layer"), generator).eval()
    if hasattr(method, "build_shared"):
        layer.share(method.build_shared([base], config))
    for name, tensor in layer.tensors().items():
        if name in frozen_tensors(method):
            tensor.requires_grad_(False)
    return layer


def _output(layer: Any, base: BaseLayer, x: Tensor, call: str = "forward") -> Tensor:
    given = layer.adapt_input(x) if hasattr(layer, "adapt_input") else x
    output: Tensor = getattr(layer, call)(given, base.module(given), base)
    return output


def _check_tensors(method: AdapterMethod, config: Any, base: BaseLayer, layer: Any, label: str) -> None:
    tensors = layer.tensors()
    assert list(tensors.values()) == [] or all(t.dtype == torch.float32 for t in tensors.values()), (
        f"{label}: adapter tensors must be float32"
    )
    assert {id(t) for t in tensors.values()} == {id(t) for t in layer.parameters()}, (
        f"{label}: tensors() must name exactly the parameters"
    )
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    wanted = method.tensor_shapes(base, config.at("layer"))
    assert shapes == wanted, f"{label}: tensor_shapes() differs from {shapes}"
    frozen = frozen_tensors(method)
    trained = sum(math.prod(shape) for name, shape in wanted.items() if name not in frozen)
    assert layer.num_parameters == trained, f"{label}: num_parameters is wrong: {trained} numbers train"


def _check_start(base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    pair = factors(layer)
    cancelling = pair is not None and all(bool(factor.any()) for factor in pair)  # but for the sums' rounding
    gap = float((_output(layer, base, x) - base.module(x)).detach().abs().max())
    assert gap <= (TOLERANCE if cancelling else 0), f"{label}: at the start the output must equal the base's"
    assert getattr(layer, "idle", lambda base: True)(base), f"{label}: at the start idle() must be true"


def _check_generator(method: AdapterMethod, config: Any, base: BaseLayer, layer: Any, label: str) -> None:
    torch.rand(7)
    again = _built(method, config, base)
    same = all(
        torch.equal(a, b) for a, b in zip(layer.tensors().values(), again.tensors().values(), strict=True)
    )
    assert same, f"{label}: the first values must come from the generator alone"


def _check_gradients(method: AdapterMethod, base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    before = [(name, tensor.clone()) for name, tensor in base.module.named_parameters()]
    _output(layer, base, x).square().sum().backward()
    for name, tensor in layer.tensors().items():
        if name in frozen_tensors(method):
            assert tensor.grad is None, f"{label}: {name} is frozen and gets a gradient"
            continue
        assert tensor.grad is not None, f"{label}: {name} gets no gradient"
        assert bool(tensor.grad.abs().max() > 0), f"{label}: the gradient of {name} is zero"
    for (name, old), (_, new) in zip(before, base.module.named_parameters(), strict=True):
        assert torch.equal(old, new), f"{label}: the base's {name} was changed"
    layer.zero_grad()


def _check_exact_gradients(base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    """In float64: against `reference_forward`, or by finite differences where there is none."""
    exact, below = copy.deepcopy(layer).double(), BaseLayer.of(copy.deepcopy(base.module).double())
    assert below is not None
    given = x.double().requires_grad_() if x.is_floating_point() else x
    leaves = {name: t for name, t in exact.tensors().items() if t.requires_grad}
    leaves |= {"x": given} if given.requires_grad else {}
    weights = torch.linspace(0.5, 1.5, below.out_features, dtype=torch.float64)

    def loss(call: str) -> Tensor:
        return (_output(exact, below, given, call) * below.spread(weights)).sin().sum()

    names, tensors = list(leaves), list(leaves.values())
    found = torch.autograd.grad(loss("forward"), tensors)
    if hasattr(layer, "reference_forward"):
        wanted = torch.autograd.grad(loss("reference_forward"), tensors)
    else:
        wanted = tuple(_differences(lambda: loss("forward"), tensor) for tensor in tensors)
    for name, one, other in zip(names, found, wanted, strict=True):
        gap = float((one - other).abs().max() / other.abs().max().clamp(min=1e-3))
        assert gap <= GRADIENT_TOLERANCE, f"{label}: the gradient of {name} is wrong by a share of {gap:.1e}"


@torch.no_grad()
def _differences(loss: Callable[[], Tensor], tensor: Tensor, step: float = 1e-5) -> Tensor:
    found = torch.zeros_like(tensor)
    for place in range(tensor.numel()):
        number = tensor.detach().view(-1)[place]
        kept, sides = number.clone(), []
        for moved in (kept + step, kept - step):
            number.copy_(moved)
            sides.append(loss())
        number.copy_(kept)
        found.view(-1)[place] = (sides[0] - sides[1]) / (2 * step)
    return found


def _check_additive(base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    if not is_additive(layer):
        return
    assert not hasattr(layer, "adapt_input"), f"{label}: what changes the input is not additive"
    with torch.no_grad():
        plain = base.module(x)
        gap = float((layer(x, plain + 1, base) - 1 - layer(x, plain.clone(), base)).abs().max())
        assert gap <= TOLERANCE, f"{label}: the update depends on the base output: set additive = False"


def _check_merge(base: BaseLayer, layer: Any, x: Tensor, label: str) -> None:
    with torch.no_grad():
        live = _output(layer, base, x)
        assert torch.equal(live, _output(layer, base, x)), f"{label}: two calls differ"
        weight, bias = base.dense_weight(), base.bias
        kept = weight.clone()
        merged = layer.merged_weight(base, weight)
        assert torch.equal(weight, kept), f"{label}: merged_weight() changed the weight it was given"
        if hasattr(layer, "merged_bias"):
            bias = layer.merged_bias(base, bias)
        if base.kind == "embedding":
            plain = functional.embedding(x, merged.t()) * base.output_scale
        else:
            plain = base.apply(x, merged) + (0.0 if bias is None else base.spread(bias))
        gap = float((plain - live).abs().max())
        assert gap <= TOLERANCE, f"{label}: merged and live outputs differ by {gap:.2e}"
        assert not torch.allclose(live, base.module(x)), f"{label}: the adapter has no effect"
        assert not getattr(layer, "idle", lambda base: False)(base), f"{label}: idle() is true, and it acts"
        if is_additive(layer):
            _check_update(base, layer, merged - weight, label)


def _check_update(base: BaseLayer, layer: Any, update: Tensor, label: str) -> None:
    """What an additive layer adds to a weight, which adapters are composed by."""
    zeros = torch.zeros(base.out_features, base.in_features)
    gap = float((layer.merged_weight(base, zeros) - update).abs().max())
    assert gap <= TOLERANCE, f"{label}: what merged_weight() adds depends on the weight"
    if hasattr(layer, "update_factors"):
        down, up = layer.update_factors()
        gap = float((up @ down - update).abs().max())
        assert gap <= TOLERANCE, f"{label}: update_factors() is off the update by {gap:.2e}"


def _check_no_state(
    method: AdapterMethod, config: Any, base: BaseLayer, layer: Any, x: Tensor, label: str
) -> None:
    """What was computed before decides nothing: changed tensors act at once."""
    with torch.no_grad():
        for tensor in layer.tensors().values():
            tensor.mul_(0.7)
        fresh = _built(method, config, base, seed=2)
        for name, tensor in fresh.tensors().items():
            tensor.copy_(layer.tensors()[name])
        same = torch.equal(_output(fresh, base, x), _output(layer, base, x))
    assert same, f"{label}: the output depends on earlier calls, not on the tensors alone"
