"""Which adapters a model carries and which of them act."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, Merged, SavedModule
from graft.adapters.base import frozen_tensors, is_additive, method_of, replaces_base
from graft.adapters.settings import is_number
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
    bias_modules: tuple[str, ...] = ()
    """Paths of the modules beside its targets whose bias it trains."""
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

    @property
    def places(self) -> tuple[str, ...]:
        """Paths of all that it trains something of."""
        return (*self.targets, *self.saved_modules, *self.bias_modules)

    @property
    def makes_up(self) -> bool:
        """Whether it makes up for the rounding of its quantized base, so that it is wrong on any other."""
        return getattr(self.config, "init", "") == "loftq"


@dataclass(eq=False)
class Attachments:
    """What graft remembers on a model that carries adapters."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    """Factors on the updates of active adapters; one where missing."""
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


def stays_tied(model: nn.Module, name: str) -> bool:
    """Whether an adapter does the same to embedding and output head, so that they keep sharing a weight."""
    own = adapter(model, name).places
    return any(
        path not in own and isinstance(module, AdaptedLayer) and name in module.adapters
        for path, module in adapter_modules(model).items()
    )


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act now."""
    return attachments(model).active


def active_weights(model: nn.Module) -> dict[str, float]:
    """The adapters that act now, in order, and the factor on each one's update."""
    record = attachments(model)
    return {name: record.weights.get(name, 1.0) for name in record.active}


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
    """Those of an adapter's tensors that can train, as `adapter_tensors` has them; none without numbers.

    Args:
        model: A model that carries it.
        name: The adapter.

    Raises:
        AdapterError: The model has no such adapter.
    """
    return _of_kind(model, name, frozen=False)


def fixed_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Those of an adapter's tensors that no gradient changes: what its layers share, start from, their state.

    Args:
        model: A model that carries it.
        name: The adapter.

    Returns:
        Tensors by the keys of `adapter_tensors`; shared ones by the names of `AdapterMethod.build_shared`.

    Raises:
        AdapterError: The model has no such adapter.
    """
    shared = adapter(model, name).shared
    return {
        **_of_kind(model, name, frozen=True),
        **start_tensors(model, name),
        **({} if shared is None else dict(shared.named_buffers())),
        **_states(model, name),
    }


def start_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What an adapter's updates are measured from, as `adapter_tensors` has its tensors; empty for zero.

    Args:
        model: A model that carries it.
        name: The adapter.
    """
    return {
        f"{path}.{leaf}" if path else leaf: tensor
        for path, module in adapter_modules(model).items()
        if isinstance(module, AdaptedLayer) and name in module.adapters
        for leaf, tensor in _start(module.adapters[name]).items()
    }


def active_fixed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`fixed_tensors` of the adapters that act."""
    return {
        key: tensor for name in active_adapters(model) for key, tensor in fixed_tensors(model, name).items()
    }


def all_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Every tensor of an adapter: `trained_tensors` and `fixed_tensors`."""
    return {**trained_tensors(model, name), **fixed_tensors(model, name)}


def _start(layer: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = layer.start() if hasattr(layer, "start") else {}
    return found


def _of_kind(model: nn.Module, name: str, *, frozen: bool) -> dict[str, nn.Parameter]:
    known = adapter(model, name)
    return {
        f"{path}.{leaf}" if path else leaf: tensor
        for path, module in adapter_modules(model).items()
        for leaf, tensor in _tensors(module, name).items()
        if (leaf in _frozen(module, known)) == frozen and (frozen or tensor.numel())
    }


def _states(model: nn.Module, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in adapter_modules(model).items():
        if not isinstance(module, AdaptedLayer) or name not in module.adapters:
            continue
        layer: Any = module.adapters[name]
        own = layer.state_tensors() if hasattr(layer, "state_tensors") else {}
        found |= {f"{path}.{leaf}" if path else leaf: tensor for leaf, tensor in own.items()}
    return found


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


def set_active(
    model: nn.Module, names: str | Sequence[str] | None, weights: Sequence[float] | None = None
) -> None:
    """Choose the adapters that act: y = W x + sum of weight_i * update_i(x).

    Only the active ones' tensors get gradients, and only if they are trainable.

    Args:
        model: A model with adapters.
        names: One name, several, or None for the plain base.
        weights: One for each name; all one where None. They last until the next call, `disabled` keeps them.

    Raises:
        AdapterError: No such adapter, two of them cannot act together on a module, the weights are not one
            finite number for each, an adapter with a weight other than one has no update that a factor could
            be put on, or one is merged into the weights.
    """
    refuse_merged(model)
    activate(model, names, weights)


def activate(
    model: nn.Module, names: str | Sequence[str] | None, weights: Sequence[float] | None = None
) -> None:
    """`set_active`, also while an adapter is merged.

    Raises:
        AdapterError: As there.
    """
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in chosen:
        adapter(model, name)
    factors = {} if weights is None else _weights(names, chosen, weights)
    record = attachments(model)
    modules = adapter_modules(model)
    for path, module in modules.items():
        _refuse_together(path, module, chosen)
        _check_weighable(record, path, module, factors)
    record.active, record.weights = chosen, factors
    for module in modules.values():
        module.activate(chosen)
        if isinstance(module, AdaptedLayer):
            module.weights = dict(factors)
        for name, known in record.adapters.items():
            trains, frozen = name in chosen and known.trainable, _frozen(module, known)
            for leaf, tensor in _tensors(module, name).items():
                tensor.requires_grad_(trains and leaf not in frozen)


def _weights(names: Any, chosen: tuple[str, ...], weights: Sequence[float]) -> dict[str, float]:
    """The weights that are not one, by name.

    Raises:
        AdapterError: They are not one finite number for each name.
    """
    values: list[Any] = list(weights) if isinstance(weights, Sequence) else [weights]
    if len(values) != len(chosen) or (not isinstance(names, str) and len(chosen) != len(names or ())):
        raise AdapterError(
            f"{len(values)} weights {values!r} for the adapters {', '.join(chosen) or 'none'}",
            where="weights",
            fix="give one for each adapter, and each adapter once",
        )
    for value in values:
        if not is_number(value):
            raise AdapterError(
                f"weight {value!r} is not a finite number", where="weights", fix="for example [0.7, 0.3]"
            )
    return {name: float(value) for name, value in zip(chosen, values, strict=True) if value != 1}


def _refuse_together(path: str, module: AdaptedLayer | SavedModule, chosen: Sequence[str]) -> None:
    holder = module.copies if isinstance(module, SavedModule) else module.adapters
    holders = [name for name in chosen if name in holder]
    if len(holders) < 2:
        return
    told = f"{' and '.join(holders)} each train {path} in full; only one can act"
    if isinstance(module, AdaptedLayer):
        alone = next((name for name in holders if replaces_base(module.adapters[name])), None)
        if alone is None:
            return
        others = ", ".join(name for name in holders if name != alone)
        told = f"{alone} quantizes the weight of {path} with its own update in it; {others} cannot act beside"
    raise AdapterError(told, where=path, fix="activate one of them")


def _check_weighable(
    record: Attachments, path: str, module: AdaptedLayer | SavedModule, factors: Mapping[str, float]
) -> None:
    for name, weight in factors.items():
        if isinstance(module, SavedModule):
            unfit, why = name in module.copies, "trains it in full"
        else:
            unfit = name in module.adapters and not is_additive(module.adapters[name])
            why = f"is {record.adapters[name].config.method}, whose change depends on the base's own weight"
        if unfit:
            raise AdapterError(
                f"adapter {name!r} cannot act with weight {weight:g}: it {why}, so that no update adds up",
                where=path,
                fix="leave its weight at 1",
            )


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the plain base; afterwards the same adapters act, weights and all.

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
