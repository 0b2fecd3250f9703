"""Which adapters a model carries and which of them act."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, SavedModule
from graft.adapters.base import frozen_tensors, method_of
from graft.config import closest
from graft.errors import AdapterError
from graft.quant.linear import quantized_modules


@dataclass(eq=False)
class Adapter:
    """A named adapter in a model."""

    name: str
    """What it is called in this model."""
    config: Any
    """Its settings, such as a LoraConfig."""
    targets: tuple[str, ...]
    """Paths of the layers that carry it, in the order of the model."""
    saved_modules: tuple[str, ...]
    """Paths of the modules that it trains in full."""
    num_trainable: int
    """Numbers in its tensors."""
    trainable: bool = True
    """Whether its tensors get gradients while it is active."""
    notes: list[str] = field(default_factory=list)
    """What its user should know: tied embeddings, a base that differs, options that were left aside."""
    forced_base: bool = False
    """Whether it was put on a base that it was not trained on."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What its file says about how it was made."""
    shared: nn.Module | None = None
    """Holds the tensors that its layers share (`AdapterMethod.build_shared`); they do not train."""


@dataclass(eq=False)
class Merged:
    """An adapter that is in the weights of a model in memory, and what it takes to get it out again."""

    name: str
    kept: list[tuple[nn.Module, str, nn.Parameter]]
    """Modules, names and the base's own parameters, which stand aside untouched."""
    active: tuple[str, ...]
    """Adapters that acted before."""
    tied: bool
    """Whether embedding and head shared one weight until then."""


@dataclass(eq=False)
class Attachments:
    """What graft remembers on a model that carries adapters."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    frozen: list[nn.Parameter] = field(default_factory=list)
    """Base parameters that took gradients before the first adapter came."""
    merged: Merged | None = None
    """The adapter that is in the weights now."""


def attachments(model: object) -> Attachments:
    """The model's record of its adapters; an empty one where it has none.

    Raises:
        AdapterError: It is no model.
    """
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)
        raise AdapterError(
            f"a {type(model).__name__} is no torch module",
            where="model",
            fix="give its .model" if inner else "give the model that graft.load(...).model is",
        )
    found = getattr(model, "graft_attachments", None)
    return found if isinstance(found, Attachments) else Attachments()


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in a model by name, in the order in which they came."""
    return dict(attachments(model).adapters)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act now."""
    return attachments(model).active


def adapter(model: nn.Module, name: str) -> Adapter:
    """The adapter of a name.

    Raises:
        AdapterError: The model has none of that name.
    """
    known = attachments(model).adapters
    if name not in known:
        near = closest(name, known)
        there = f"did you mean {near!r}?" if near else f"adapters there: {', '.join(known) or 'none'}"
        raise AdapterError(f"the model has no adapter {name!r}", where="name", fix=there)
    return known[name]


def refuse_merged(model: nn.Module) -> None:
    """Refuse what needs the plain base while an adapter is in its weights.

    Raises:
        AdapterError: One is.
    """
    merged = attachments(model).merged
    if merged is not None:
        raise AdapterError(
            f"the adapter {merged.name!r} is merged into the weights, so the model is not its base now",
            where="model",
            fix="graft.unmerge(model) first",
        )


def adapter_modules(model: nn.Module) -> dict[str, AdaptedLayer | SavedModule]:
    """All modules that stand for a base module, by the path of what they stand for."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer | SavedModule)}


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The tensors of one adapter, in the order of the model.

    Args:
        model: A model that carries it.
        name: The adapter.

    Returns:
        fp32 parameters by the keys that PEFT files have after "base_model.model.", such as
        "model.layers.0.self_attn.q_proj.lora_A.weight".

    Raises:
        AdapterError: The model has no such adapter.
    """
    adapter(model, name)
    found: dict[str, nn.Parameter] = {}
    for path, module in adapter_modules(model).items():
        for leaf, tensor in _tensors(module, name).items():
            found[f"{path}.{leaf}" if path else leaf] = tensor
    return found


def trained_tensors(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Those of an adapter's tensors that can train, as `adapter_tensors` has them.

    Args:
        model: A model that carries it.
        name: The adapter.

    Raises:
        AdapterError: The model has no such adapter.
    """
    return _of_kind(model, name, frozen=False)


def fixed_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Those of an adapter's tensors that never train, those that its layers share among them.

    Args:
        model: A model that carries it.
        name: The adapter.

    Returns:
        Tensors by the keys of `adapter_tensors`; shared ones by the names of `AdapterMethod.build_shared`.

    Raises:
        AdapterError: The model has no such adapter.
    """
    shared = adapter(model, name).shared
    return {**_of_kind(model, name, frozen=True), **({} if shared is None else dict(shared.named_buffers()))}


def active_fixed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`fixed_tensors` of the adapters that act."""
    return {
        key: tensor for name in active_adapters(model) for key, tensor in fixed_tensors(model, name).items()
    }


def all_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Every tensor of an adapter: `trained_tensors` and `fixed_tensors`."""
    return {**trained_tensors(model, name), **fixed_tensors(model, name)}


def _of_kind(model: nn.Module, name: str, *, frozen: bool) -> dict[str, nn.Parameter]:
    known = adapter(model, name)
    return {
        f"{path}.{leaf}" if path else leaf: tensor
        for path, module in adapter_modules(model).items()
        for leaf, tensor in _tensors(module, name).items()
        if (leaf in _frozen(module, known)) == frozen
    }


def _frozen(module: AdaptedLayer | SavedModule, known: Adapter) -> frozenset[str]:
    return frozenset() if isinstance(module, SavedModule) else frozen_tensors(method_of(known.config))


def _tensors(module: AdaptedLayer | SavedModule, name: str) -> dict[str, nn.Parameter]:
    if isinstance(module, SavedModule):
        return module.tensors(name) if name in module.copies else {}
    if name not in module.adapters:
        return {}
    layer: Any = module.adapters[name]
    tensors: dict[str, nn.Parameter] = layer.tensors()
    return tensors


def set_active(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Choose the adapters that act; the updates of several add up.

    Only the active ones' tensors get gradients, and only if they are trainable.

    Args:
        model: A model with adapters.
        names: One name, several, or None for the plain base.

    Raises:
        AdapterError: No such adapter, two of them train the same module in full, or one is merged into the
            weights.
    """
    refuse_merged(model)
    activate(model, names)


def activate(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """`set_active`, also while an adapter is merged.

    Raises:
        AdapterError: As there.
    """
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in chosen:
        adapter(model, name)
    record = attachments(model)
    modules = adapter_modules(model)
    for path, module in modules.items():
        if isinstance(module, SavedModule):
            holders = [name for name in chosen if name in module.copies]
            if len(holders) > 1:
                raise AdapterError(
                    f"{' and '.join(holders)} each train {path} in full; only one can act",
                    where=path,
                    fix="activate one of them",
                )
    record.active = chosen
    for module in modules.values():
        module.activate(chosen)
        for name, known in record.adapters.items():
            trains, frozen = name in chosen and known.trainable, _frozen(module, known)
            for leaf, tensor in _tensors(module, name).items():
                tensor.requires_grad_(trains and leaf not in frozen)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the plain base; afterwards the same adapters act as before.

    Raises:
        AdapterError: One is merged into the weights.
    """
    refuse_merged(model)
    modules = adapter_modules(model).values()
    before = [(module, module.active) for module in modules]
    try:
        for module in modules:
            module.active = ()
        yield
    finally:
        for module, active in before:
            module.active = active


def num_base_parameters(model: nn.Module) -> int:
    """Numbers in the base under a model's adapters: tied ones once, a quantized weight by its shape."""
    own = {id(tensor) for name in adapters_of(model) for tensor in adapter_tensors(model, name).values()}
    quantized = list(quantized_modules(model).values())
    own |= {id(tensor) for layer in quantized for tensor in layer.parameters() if tensor.dtype == torch.uint8}
    dense = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in own)
    return dense + sum(layer.in_features * layer.out_features for layer in quantized)


def base_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the base under the names that they have without adapters, as `state_dict` orders them."""
    inner: list[tuple[str, str]] = []
    for path, module in adapter_modules(model).items():
        if isinstance(module, SavedModule):
            inner += [(f"{path}.original.", f"{path}."), (f"{path}.copies.", "")]
        else:
            inner += [(f"{path}.base_layer.", f"{path}."), (f"{path}.adapters.", "")]
    renames = dict(inner)
    marks = re.compile(r".*?\.(?:original|base_layer|copies|adapters)\.")
    for name, tensor in model.state_dict().items():
        mark = marks.match(name)
        prefix = mark[0] if mark and mark[0] in renames else ""
        if not prefix:
            yield name, tensor
        elif renames[prefix]:
            yield renames[prefix] + name.removeprefix(prefix), tensor
