"""target_modules to layers of a model, or an error that names what is there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from graft.adapters.adapted import AdaptedLayer, SavedModule, unwrapped
from graft.adapters.patterns import Selector
from graft.adapters.trainable_tokens import INPUT_EMBEDDING
from graft.config import closest
from graft.errors import AdapterError, TargetError
from graft.models.experts import stacked_experts
from graft.models.layers import BaseLayer

ALL_LINEAR = "all-linear"
"""Every linear and Conv1D layer but the output head."""


@dataclass(frozen=True)
class Selection:
    """What an adapter's settings say about where it goes."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    """Names of the containers that `layers` counts; any where empty (PEFT's layers_pattern)."""
    modules_to_save: tuple[str, ...] = ()


def base_layers(model: nn.Module) -> dict[str, BaseLayer]:
    """All layers that can carry an adapter, by path, in the order of the model.

    Layers that carry some already are found at their own path, seen without them.
    """
    return dict(_walk(model, ""))


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, BaseLayer]]:
    if isinstance(module, AdaptedLayer):
        yield path, module.base
        return
    module = unwrapped(module)
    base = BaseLayer.of(module)
    if base is not None:
        yield path, base
        return
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits of a transformers model, without adapters; None for other modules."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return unwrapped(head) if isinstance(head, nn.Module) else None


def tied_pair(model: nn.Module) -> tuple[str, str] | None:
    """Paths of the input embedding and the output head where they share one weight."""
    head = output_head(model)
    ask = getattr(model, "get_input_embeddings", None)
    inputs = ask() if callable(ask) else None
    if head is None or not isinstance(inputs, nn.Module):
        return None
    inputs = unwrapped(inputs)
    if inputs is head or getattr(inputs, "weight", None) is not getattr(head, "weight", head):
        return None
    paths = {id(base.module): path for path, base in _walk(model, "")}
    found = paths.get(id(inputs)), paths.get(id(head))
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def input_embedding(model: nn.Module) -> dict[str, BaseLayer]:
    """The layer that looks up the input tokens, by its path; none where the model does not tell."""
    ask = getattr(model, "get_input_embeddings", None)
    inputs = ask() if callable(ask) else None
    wanted = unwrapped(inputs) if isinstance(inputs, nn.Module) else None
    return {
        path: base for path, base in _walk(model, "") if base.module is wanted and base.kind == "embedding"
    }


def select_rows(model: nn.Module, config: Any) -> dict[str, BaseLayer]:
    """The embedding of which some rows train beside LoRA (`trainable_token_indices`), by its path.

    Args:
        model: A model, with or without adapters.
        config: The adapter's settings; only LoRA's have the field.

    Raises:
        TargetError: The model has no such layer.
    """
    if not getattr(config, "trainable_token_indices", ()):
        return {}
    found = input_embedding(model)
    if not found:
        raise TargetError(
            f"{_label(model)} does not tell its input embedding",
            where="adapter.trainable_token_indices",
            fix="train its embedding in full: adapter.modules_to_save",
        )
    return found


def in_order(model: nn.Module, chosen: Mapping[str, BaseLayer]) -> dict[str, BaseLayer]:
    """Layers by path in the order of the model."""
    return {path: base for path, base in base_layers(model).items() if path in chosen}


def select_targets(model: nn.Module, selection: Selection, *, strict: bool = True) -> dict[str, BaseLayer]:
    """The layers that a setting selects.

    Args:
        model: A model, with or without adapters.
        selection: What to select.
        strict: Refuse names and block numbers that select nothing while others select something; files of
            other tools may carry such names.

    Returns:
        Layers by path in the order of the model; empty only where target_modules is empty.

    Raises:
        TargetError: Nothing is selected, or (strict) a part of the setting has no effect.
    """
    if not selection.target_modules:
        return {}
    layers = base_layers(model)
    kept = Selector(selection.modules_to_save, "adapter.modules_to_save")
    targets = _by_name(model, layers, selection, strict)
    targets = {path: base for path, base in targets.items() if not kept.selects_inside(path)}
    excluded = Selector(selection.exclude_modules, "adapter.exclude_modules")
    left = {path: base for path, base in targets.items() if not excluded.selects(path)}
    if strict and excluded.unused:
        _refuse(model, layers, "exclude_modules", excluded.unused, "among the targets")
    left = _in_blocks(model, left, selection, strict)
    if not left:
        raise TargetError(
            f"no layer is left: exclude_modules and modules_to_save take out all {len(targets)} targets",
            where="adapter.exclude_modules",
            fix="exclude fewer",
        )
    return left


def _by_name(
    model: nn.Module, layers: dict[str, BaseLayer], selection: Selection, strict: bool
) -> dict[str, BaseLayer]:
    setting = selection.target_modules
    if setting == INPUT_EMBEDDING:
        found = input_embedding(model)
        if not found:
            _refuse(model, layers, "target_modules", [INPUT_EMBEDDING])
        return found
    if setting == ALL_LINEAR:
        head = output_head(model)
        found = {
            path: base
            for path, base in layers.items()
            if base.kind in ("linear", "conv1d") and base.module is not head
        }
        if not found:
            _refuse(model, layers, "target_modules", [ALL_LINEAR])
        return found
    selector = Selector(setting, "adapter.target_modules")
    found = {path: base for path, base in layers.items() if selector.selects(path)}
    unused = selector.unused
    if unused and (strict or not found):
        if not isinstance(setting, str):
            _refuse_containers(model, unused)
        _refuse(model, layers, "target_modules", unused)
    return found


def _in_blocks(
    model: nn.Module, targets: dict[str, BaseLayer], selection: Selection, strict: bool
) -> dict[str, BaseLayer]:
    if selection.layers is None:
        return targets
    numbers = {path: block_number(path, selection.layers_pattern) for path in targets}
    found = {path: base for path, base in targets.items() if numbers[path] in selection.layers}
    missing = sorted(set(selection.layers) - set(numbers.values()))
    if missing and (strict or not found):
        known = sorted({number for number in numbers.values() if number is not None})
        there = f"{known[0]} to {known[-1]}" if known else "none"
        raise TargetError(
            f"layers {missing[:20]} hold no target in {_label(model)}",
            where="adapter.layers",
            fix=f"blocks with targets there: {there}",
        )
    return found


def block_number(path: str, containers: tuple[str, ...] = ()) -> int | None:
    """The number of the block that a path lies in: of its first "name.number." part.

    Args:
        path: Dotted path of a layer.
        containers: Names that may stand before the number; any where empty.
    """
    for match in re.finditer(r"(?:^|\.)([^.]+)\.(\d+)(?=\.)", path):
        if not containers or match[1] in containers:
            return int(match[2])
    return None


def select_saved(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that modules_to_save names, by path: those whose path ends with a name.

    Raises:
        TargetError: A name fits no module with parameters, or a module whose weight is quantized.
    """
    if not names:
        return {}
    selector = Selector(names, "adapter.modules_to_save")
    found: dict[str, nn.Module] = {}
    candidates: set[str] = set()
    for path, module in _modules(model, ""):
        if next(module.parameters(), None) is None and not _holds_quantized(module):
            continue
        candidates.add(path.rpartition(".")[2])
        if path and selector.selects(path) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    if selector.unused:
        name = selector.unused[0]
        raise TargetError(
            f"modules_to_save {selector.unused[:10]} fit no module with parameters of {_label(model)}",
            where="adapter.modules_to_save",
            fix=_did_you_mean(name, candidates - {""}),
        )
    for path, module in found.items():
        refuse_quantized(path, module)
    return found


def select_biases(
    model: nn.Module, config: Any, targets: Collection[str], saved: Collection[str]
) -> list[str]:
    """The modules beside an adapter's targets whose bias trains (`bias: all`), by path.

    Args:
        model: A model, with or without adapters.
        config: The adapter's settings; only LoRA's have the field.
        targets: Paths of its targets, whose layers train their biases themselves.
        saved: Paths of what it trains in full.

    Raises:
        AdapterError: A module with a bias carries another adapter, or holds a target.
    """
    if getattr(config, "bias", "none") != "all":
        return []
    found = []
    for path, module in _modules(model, ""):
        inside = any(f"{path}.".startswith(f"{outer}.") for outer in saved)
        if path in targets or inside or unwrapped(module)._parameters.get("bias") is None:
            continue
        if isinstance(module, AdaptedLayer) or any(inner.startswith(f"{path}.") for inner in targets):
            raise AdapterError(
                f"the bias of {path} cannot train alone: it carries another adapter, or holds a target",
                where=path,
                fix="detach the other adapter, or take bias lora_only",
            )
        found.append(path)
    return found


def refuse_quantized(path: str, module: nn.Module) -> None:
    """Refuse a module of modules_to_save that is stored in codes.

    Raises:
        TargetError: It is, or a module in it.
    """
    if _holds_quantized(module):
        raise TargetError(
            f"{path} is quantized and cannot be trained in full",
            where="adapter.modules_to_save",
            fix="keep it dense with quantization.skip_modules, or make it a target",
        )


def _holds_quantized(module: nn.Module) -> bool:
    return any(base.quantized for _, base in _walk(module, ""))


def _modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    if isinstance(module, AdaptedLayer | SavedModule):
        return
    for name, child in module.named_children():
        yield from _modules(child, f"{path}.{name}" if path else name)


def _refuse_containers(model: nn.Module, names: list[str]) -> None:
    selector = Selector(names, "adapter.target_modules")
    for path, module in _modules(model, ""):
        if selector.selects(path) and unwrapped(module) is module:
            raise TargetError(
                f"{path} is a {type(module).__name__}, which cannot carry an adapter",
                where="adapter.target_modules",
                fix="name the linear layers inside it, or train it in full with modules_to_save",
            )


def _refuse(
    model: nn.Module, layers: dict[str, BaseLayer], field: str, names: list[str], among: str = ""
) -> NoReturn:
    there = sorted({path.rpartition(".")[2] for path in layers})
    shown = names[:5] + ([f"... and {len(names) - 5} more"] if len(names) > 5 else [])
    matched = f"matched no layer {among}".strip()
    if len(names) == 1 and names[0] in there:
        fix = f'a plain string is a regular expression for the whole path: write the list ["{names[0]}"]'
    else:
        fix = stacked_experts(model) or _did_you_mean(names[0], there)
    raise TargetError(
        f"{field} {[name[:80] for name in shown]} {matched} of {_label(model)}. "
        f"Layers there: {' '.join(there[:60])}",
        where=f"adapter.{field}",
        fix=fix,
    )


def _did_you_mean(name: str, names: set[str] | list[str]) -> str:
    near = closest(name.rpartition(".")[2], names)
    if near:
        return f'did you mean {near!r}? Or use "all-linear"'
    return f"one of: {' '.join(sorted(names)[:60])}"


def _label(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return f"{getattr(model, 'graft_name', 'the model')} ({kind})"
