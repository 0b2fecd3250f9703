"""Whether an adapter can act: which tensors its settings ask for, updates that are zero, louder updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, unwrapped
from graft.adapters.attached import Adapter, adapter, adapter_modules
from graft.adapters.base import frozen_tensors, method_of
from graft.adapters.targets import Selection, select_rows, select_targets

PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""Names of two factors of an update: where one of them is zero, so is the product."""


CANCELLED = 1e-6
"""Share of its factors' norms below which a product is nothing but the rounding of its sums."""


def adapted_layers(model: nn.Module, name: str) -> dict[str, Any]:
    """The layers of one adapter, by path; what it trains in full is not among them."""
    modules = adapter_modules(model).items()
    return {
        path: module.adapters[name]
        for path, module in modules
        if isinstance(module, AdaptedLayer) and name in module.adapters
    }


def asked_tensors(model: nn.Module, made: Adapter) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors to train that an adapter's settings ask for, found anew from these.

    Args:
        model: The model that carries it.
        made: The adapter.
    """
    config = made.config
    selection = Selection(
        config.target_modules, config.exclude_modules, config.layers, modules_to_save=config.modules_to_save
    )
    method = method_of(config)
    frozen = frozen_tensors(method)
    asked: dict[str, tuple[int, ...]] = {}
    targets = {**select_targets(model, selection, strict=False), **select_rows(model, config)}
    for path, base in targets.items():
        for leaf, shape in method.tensor_shapes(base, config.at(path)).items():
            if leaf not in frozen and 0 not in shape:
                asked[f"{path}.{leaf}"] = tuple(shape)
    for path in made.saved_modules:
        for leaf, tensor in unwrapped(model.get_submodule(path)).named_parameters():
            asked[f"{path}.{leaf}"] = tuple(tensor.shape)
    for path in made.bias_modules:
        bias: Any = unwrapped(model.get_submodule(path)).bias
        asked[f"{path}.bias"] = tuple(bias.shape)
    return asked


def factors(layer: Any) -> tuple[Tensor, Tensor] | None:
    """The two factors of a layer's update, as matrices; None for one that is no plain product of two.

    One that is measured from a start has factors of twice the rank.
    """
    if hasattr(layer, "plain_factors"):
        own: tuple[Tensor, Tensor] = layer.plain_factors()
        return own
    tensors = layer.tensors()
    for first, second in PAIRS:
        if tensors.keys() == {first, second}:
            started = hasattr(layer, "start") and layer.start()
            down, up = layer.factors if started else (tensors[first], tensors[second])
            return down.detach().flatten(1), up.detach().flatten(1)
    return None


def cancels(down: Tensor, up: Tensor) -> bool:
    """Whether the product of two factors is zero but for the rounding of its sums.

    Args:
        down: (rank, in).
        up: (out, rank).

    Cost: two products of rank by rank.
    """
    down, up = down.double(), up.double()
    inner, outer = down @ down.t(), up.t() @ up
    size = float((inner * outer).sum().clamp(min=0).sqrt())
    return size <= CANCELLED * float(inner.trace().sqrt() * outer.trace().sqrt())


def idle_layers(model: nn.Module, name: str) -> list[str]:
    """Paths of the layers and saved modules of an adapter that leave every output as it is.

    An update of two factors is idle where their product is zero, a layer of another kind where it says so, a
    saved module where it is a copy.

    Cost: reads both factors of every layer; for a module trained in full, module and original.
    """
    idle = []
    for path, layer in adapted_layers(model, name).items():
        if is_idle(model, path, layer):
            idle.append(path)
    made = adapter(model, name)
    for path in (*made.saved_modules, *made.bias_modules):
        module: Any = model.get_submodule(path)
        old = dict(module.original.named_parameters())
        if all(torch.equal(new.to(old[leaf]), old[leaf]) for leaf, new in module.tensors(name).items()):
            idle.append(path)
    return idle


def is_idle(model: nn.Module, path: str, layer: Any) -> bool:
    """Whether a layer at a path of a model leaves every output as it is; false where that cannot be told."""
    ask = getattr(layer, "idle", None)
    if ask is not None:
        module: Any = model.get_submodule(path)
        return bool(ask(module.base))
    pair = factors(layer)
    if pair is None:
        return False
    return not (bool(pair[1].any()) and bool(pair[0].any())) or cancels(*pair)


@contextlib.contextmanager
def amplified(model: nn.Module, name: str, factor: float) -> Iterator[bool]:
    """Within the block an adapter's updates are so many times larger; its tensors are not touched.

    Yields:
        Whether every layer of it has a scaling that could be raised.
    """
    layers = list(adapted_layers(model, name).values())
    before = [(layer, layer.scaling) for layer in layers if hasattr(layer, "scaling")]
    for layer, scaling in before:
        layer.scaling = scaling * factor
    try:
        yield bool(layers) and len(before) == len(layers)
    finally:
        for layer, scaling in before:
            layer.scaling = scaling
