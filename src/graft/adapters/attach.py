"""Put adapters into a model and take them out again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from graft.adapters.adapted import AdaptedLayer, SavedModule, unwrapped
from graft.adapters.attached import (
    Adapter,
    Attachments,
    active_weights,
    adapter,
    adapter_modules,
    adapter_tensors,
    adapters_of,
    attachments,
    disabled,
    refuse_merged,
    set_active,
    stays_tied,
    trained_tensors,
)
from graft.adapters.base import AdapterConfig, method_of
from graft.adapters.data_starts import Pass
from graft.adapters.initializers import generator_for
from graft.adapters.rounding_starts import Start
from graft.adapters.selected import selected, selection_of
from graft.adapters.settings import DATA, without_start
from graft.adapters.starts import Starts, check_targets, is_made_elsewhere, make_starts
from graft.adapters.targets import ALL_LINEAR, Selection, base_layers, tied_pair
from graft.dialects import explained
from graft.errors import AdapterError, ConfigError
from graft.models.experts import stacked_experts
from graft.models.layers import BaseLayer
from graft.models.packed_layers import passes_gradient
from graft.models.save import guard_save_pretrained
from graft.quant.linear import QuantizedLinear

__all__ = [
    "Adapter",
    "adapter_tensors",
    "adapters_of",
    "attach",
    "detach",
    "disabled",
    "install",
    "set_active",
]


@explained
def attach(
    model: nn.Module,
    config: AdapterConfig,
    name: str = "default",
    *,
    seed: int = 0,
    batches: Iterable[Mapping[str, Any] | Pass] | None = None,
) -> Adapter:
    """Put a new adapter into a model, freeze everything else, and make it the active one.

    The model's own modules are replaced in place; the classes are left alone. The first output equals the
    base's; with init "loftq" that of the base before it was rounded, as near as the rank allows.

    Args:
        model: A model of `graft.load`, or any `nn.Module` with linear layers.
        config: The method's settings.
        name: Names the adapter where a model carries several.
        seed: With a layer's path it decides that layer's first values, whatever else was attached before.
        batches: For a start that looks at data (init "eva" or "lora_ga"): what the model takes, on its
            device, labels among it; as many are taken as `init_batches` says.

    Returns:
        The adapter: its targets, how many numbers train, what to know about it.

    Raises:
        TargetError: A part of the settings selects nothing.
        AdapterError: The name is taken or cannot be used, or a module is trained in full by another adapter.
        ConfigError: The settings are not those of a method, or their start cannot be made here.
    """
    method_of(config)
    if batches is not None and getattr(config, "init", None) not in DATA:
        raise ConfigError(
            f"init {getattr(config, 'init', 'of ' + config.method)!r} looks at no batches",
            where="batches",
            fix=f"leave them out; init {' and '.join(DATA)} look at data",
        )
    return install(model, config, selection_of(config), name, seed=seed, batches=batches)


def install(
    model: nn.Module,
    config: AdapterConfig,
    selection: Selection,
    name: str,
    *,
    seed: int | None,
    strict: bool = True,
    batches: Iterable[Mapping[str, Any] | Pass] | None = None,
    starts: Starts | None = None,
) -> Adapter:
    """Put an adapter into a model and make it the active one.

    Args:
        model: Where to put it.
        config: The method's settings.
        selection: Where it goes.
        name: What to call it.
        seed: For its first values; None leaves the tensors to be filled.
        strict: Whether a part of the selection may have no effect.
        batches: For a start that looks at data.
        starts: Where its layers start, where that is known; settings and targets are then those in it.

    Raises:
        TargetError: Nothing is selected.
        AdapterError: The name cannot be used, or a module is already trained in full.
        ConfigError: Unknown method, or a start that cannot be made.
    """
    check_name(model, name)
    method_of(config)
    config, targets, saved, biases = selected(model, config, selection, strict=strict)
    if seed is not None:
        _refuse_without_gradient(targets)
        check_targets(config, targets)
        if starts is None and targets and is_made_elsewhere(config):
            starts = make_starts(model, config, targets, batches)
    if starts is not None:
        config, targets = starts.config, {path: targets[path] for path in starts.targets}
    record = attachments(model)
    if not record.adapters:
        record = Attachments(frozen=[p for p in model.parameters() if p.requires_grad])
        model.graft_attachments = record  # type: ignore[assignment]
        for parameter in record.frozen:
            parameter.requires_grad_(False)
    shared = shared_of(config, targets)
    for path, base in targets.items():
        start = None if starts is None else starts.layers.get(path)
        _adapt(model, path, base, config, name, seed, shared, start)
    _adapt_tied(model, name, targets, saved)
    for path in (*saved, *biases):
        _save_module(model, path, name, whole=path in saved)
    adapter = Adapter(name, config, tuple(targets), tuple(saved), 0, tuple(biases), shared=shared)
    record.adapters[name] = adapter
    adapter.num_trainable = sum(tensor.numel() for tensor in trained_tensors(model, name).values())
    adapter.notes += tied_notes(model, (*targets, *saved), together=stays_tied(model, name))
    adapter.notes += starts.notes if starts is not None else ()
    if selection.target_modules == ALL_LINEAR and (stacks := stacked_experts(model)):
        adapter.notes.append(f"the experts carry no adapter: {stacks}")
    guard_save_pretrained(model)
    set_active(model, name)
    return adapter


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or that cannot name a module, and a base that holds a merged adapter.

    Raises:
        AdapterError: In these cases.
    """
    refuse_merged(model)
    if name in attachments(model).adapters:
        raise AdapterError(
            f"the model already has an adapter {name!r}",
            where="name",
            fix="give it another name, or detach it",
        )
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(
            f"an adapter cannot be called {name!r}", where="name", fix="use another word, without dots"
        )


def _refuse_without_gradient(targets: Mapping[str, BaseLayer]) -> None:
    # One layer of each class tells; graft's own are known.
    packed = {type(base.module): path for path, base in targets.items() if base.quantized}
    packed.pop(QuantizedLinear, None)
    for kind, path in packed.items():
        if not passes_gradient(targets[path].module, targets[path].in_features):
            raise AdapterError(
                f"{path}, a {kind.__name__}, gives no gradient to its input: nothing before it can learn",
                where=path,
                fix="load the dense model with quantization=; the library's layers are for inference",
            )


def shared_of(config: AdapterConfig, targets: Mapping[str, BaseLayer]) -> nn.Module | None:
    """What all layers of an adapter share (`AdapterMethod.build_shared`); None where they share nothing."""
    build = getattr(method_of(config), "build_shared", None)
    made: nn.Module | None = build(list(targets.values()), config) if build is not None and targets else None
    return made


def _adapt(
    model: nn.Module,
    path: str,
    base: BaseLayer,
    config: AdapterConfig,
    name: str,
    seed: int | None,
    shared: nn.Module | None,
    start: Start | None,
) -> None:
    module = model.get_submodule(path)
    if not isinstance(module, AdaptedLayer):
        module = AdaptedLayer(base)
        replace_module(model, path, module)
    empty = base.device.type == "meta"  # where only shapes are asked for
    generator = None if seed is None or empty or start is not None else generator_for(seed, path)
    one = config.at(path)
    if start is None and is_made_elsewhere(config):  # such as a dense layer in a quantized base
        one = without_start(one)
    layer: Any = method_of(config).build_layer(base, one, generator)
    if start is not None:
        layer.begin_at(start.lora_A, start.lora_B, subtract=start.subtract)
    if shared is not None:
        layer.share(shared)
    module.adapters[name] = layer.to(base.device).train(module.training)


def _adapt_tied(
    model: nn.Module, name: str, targets: Mapping[str, BaseLayer], saved: Collection[str]
) -> None:
    """Put the rows of an embedding into the output head too that shares its weight."""
    embedding, head = tied_pair(model) or ("", "")
    if embedding not in targets:
        return
    layer: Any = model.get_submodule(embedding)
    own = layer.adapters[name]
    if not hasattr(own, "tied_layer"):
        return
    module = model.get_submodule(head)
    if not isinstance(module, AdaptedLayer):
        module = AdaptedLayer(base_layers(model)[head])
        replace_module(model, head, module)
    module.adapters[name] = own.tied_layer().train(module.training)


def _save_module(model: nn.Module, path: str, name: str, *, whole: bool) -> None:
    module = model.get_submodule(path)
    if not isinstance(module, SavedModule):
        module = SavedModule(module)
        replace_module(model, path, module)
    if whole:
        module.add_copy(name)
    else:
        module.add_bias(name)


def tied_notes(model: nn.Module, paths: Collection[str], *, together: bool) -> list[str]:
    """What to know about an adapter over one half, or both, of a tied embedding and head.

    Args:
        model: The model.
        paths: What the adapter changes.
        together: Whether it does the same to both, so that they keep sharing a weight (`stays_tied`).
    """
    pair = tied_pair(model)
    touched = [path for path in pair or () if path in paths]
    if pair is None or not touched or together:
        return []
    other = [path for path in pair if path not in touched]
    what = f"{' and '.join(touched)} {'are' if len(touched) > 1 else 'is'} trained"
    rest = f"{other[0]} stays as in the base" if other else "each on its own"
    return [
        f"{pair[0]} and {pair[1]} share one weight in the base; {what}, {rest}. A merge writes them untied."
    ]


def detach(model: nn.Module, name: str = "default") -> None:
    """Take an adapter out of a model; with the last one the model is as it was before the first.

    Raises:
        AdapterError: The model has no such adapter.
    """
    adapter(model, name)
    record = attachments(model)
    left = {other: weight for other, weight in active_weights(model).items() if other != name}
    set_active(model, list(left), list(left.values()))
    del record.adapters[name]
    for path, module in adapter_modules(model).items():
        holder = module.copies if isinstance(module, SavedModule) else module.adapters
        if name in holder:
            del holder[name]
        if not holder:
            replace_module(model, path, unwrapped(module))
    if not record.adapters:
        for parameter in record.frozen:
            parameter.requires_grad_(True)
        del model.graft_attachments
        guard_save_pretrained(model)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a model; it takes over the training mode of what was there."""
    parent, _, leaf = path.rpartition(".")
    module.train(model.get_submodule(path).training)
    setattr(model.get_submodule(parent), leaf, module)
