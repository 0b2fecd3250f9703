"""What stands in the model where adapters are: adapted layers and modules trained in full."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graft.adapters.base import is_additive, replaces_base
from graft.models.layers import BaseLayer


class AdaptedLayer(nn.Module):
    """A base layer and the adapter layers over it, of which the active ones act, in order.

    Anything asked of it that it does not have (weight, in_features, ...) is answered by the base layer, since
    model code reads such attributes.

    Args:
        base: View of the layer that it takes the place of.
    """

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.base_layer = base.module
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.weights: dict[str, float] = {}
        """Factors on the updates of additive adapters; one where missing."""
        self.train(base.module.training)

    def forward(self, x: Tensor) -> Tensor:
        """The base output with the active adapters' updates: x (..., in) to (..., out)."""
        if any(name in self.weights for name in self.active):
            return self._weighted(x)
        layers: list[Any] = [self.adapters[name] for name in self.active]
        if layers and replaces_base(layers[0]):  # the only one: see `set_active`
            whole: Tensor = layers[0](x, None, self.base)
            return whole
        if len(layers) > 1 and not all(is_additive(layer) for layer in layers):
            return self._summed(x, layers)
        if len(layers) == 1:
            x = _given(layers[0], x)
        begun = [layer.begin(x) if hasattr(layer, "begin") else None for layer in layers]
        output: Tensor = self.base_layer(x)
        for layer, start in zip(layers, begun, strict=True):
            output = layer(x, output, self.base) if start is None else start(output, self.base)
        return output

    def _summed(self, x: Tensor, layers: list[Any]) -> Tensor:
        """The base output and what each layer alone would change of it.

        Cost: a copy of the output for each layer, a base pass more for each that changes the input.
        """
        plain: Tensor = self.base_layer(x)
        total = plain
        for layer in layers:
            total = total + self._change(x, plain, layer)
        return total

    def _weighted(self, x: Tensor) -> Tensor:
        """The base output and each layer's change times its weight.

        Cost: a tensor of the output's size for each layer.
        """
        plain: Tensor = self.base_layer(x)
        total = plain
        for name in self.active:
            layer: Any = self.adapters[name]
            if is_additive(layer):
                change = layer(x, torch.zeros_like(plain), self.base)
                total = torch.add(total, change, alpha=self.weights.get(name, 1.0))
            else:
                total = total + self._change(x, plain, layer)
        return total

    def _change(self, x: Tensor, plain: Tensor, layer: Any) -> Tensor:
        given = _given(layer, x)
        below = plain.clone() if given is x else self.base_layer(given)
        changed: Tensor = layer(given, below, self.base) - plain
        return changed

    def activate(self, names: tuple[str, ...]) -> None:
        """Let those of the named adapters act that this layer has."""
        self.active = tuple(name for name in names if name in self.adapters)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "base"):  # not set yet: while copying or unpickling
                raise
            return getattr(self.base_layer, name)


class SavedModule(nn.Module):
    """A module that is trained in full: the frozen original and one fp32 copy of its parameters per adapter.

    The forward runs the original's code with the copy's parameters cast to the original's dtypes. A copy may
    hold the bias alone; the original's other parameters stay in use.

    Args:
        original: The module that it takes the place of.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.train(original.training)

    def add_copy(self, name: str) -> None:
        """Start a copy at the original's values."""
        self.copies[name] = copy.deepcopy(self.original).float().train(self.training)

    def add_bias(self, name: str) -> None:
        """Start a copy of the bias alone at the original's value."""
        bias = self.original.bias
        assert isinstance(bias, Tensor)
        part = nn.Module()
        part.bias = nn.Parameter(bias.detach().float().clone())
        self.copies[name] = part

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The copy's parameters by their names within the module."""
        return dict(self.copies[name].named_parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, with the active copy's parameters if there is one."""
        if not self.active:
            return self.original(*args, **kwargs)
        trained = self.tensors(self.active[0])
        cast = {
            name: trained[name].to(old.dtype)
            for name, old in self.original.named_parameters()
            if name in trained
        }
        return functional_call(self.original, cast, args, kwargs)

    def activate(self, names: tuple[str, ...]) -> None:
        """Let the copy of one of the named adapters act, if this module has one."""
        self.active = tuple(name for name in names if name in self.copies)
        assert len(self.active) <= 1, self.active

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)


def _given(layer: Any, x: Tensor) -> Tensor:
    adapt = getattr(type(layer), "adapt_input", None)
    given: Tensor = x if adapt is None else adapt(layer, x)
    return given


def unwrapped(module: nn.Module) -> nn.Module:
    """The base module behind whatever stands in its place."""
    if isinstance(module, AdaptedLayer):
        return module.base_layer
    return module.original if isinstance(module, SavedModule) else module


@dataclass(eq=False)
class Merged:
    """An adapter that is in the weights of a model in memory, and what it takes to get it out again."""

    name: str
    kept: list[tuple[nn.Module, str, nn.Parameter]]
    """Modules, names and the base's own parameters, which stand aside untouched."""
    active: dict[str, float]
    """Adapters that acted before, and the factors on their updates."""
    tied: bool
    """Whether embedding and head shared one weight until then and do not now."""
