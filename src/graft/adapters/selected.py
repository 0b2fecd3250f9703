"""What an adapter's settings select in a model, and what of it cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from graft.adapters.adapted import SavedModule
from graft.adapters.attached import adapter_modules
from graft.adapters.base import AdapterConfig, kinds_of, method_of
from graft.adapters.patterns import first_match
from graft.adapters.shipped import refuse_unquantizable
from graft.adapters.targets import (
    Selection,
    in_order,
    select_biases,
    select_rows,
    select_saved,
    select_targets,
    tied_pair,
)
from graft.adapters.trainable_tokens import token_rows
from graft.config import did_you_mean
from graft.errors import AdapterError, TargetError
from graft.models.layers import BaseLayer


def selection_of(config: AdapterConfig) -> Selection:
    """Where an adapter's settings put it."""
    return Selection(
        config.target_modules,
        config.exclude_modules,
        config.layers,
        modules_to_save=config.modules_to_save,
    )


def selected(
    model: nn.Module, config: AdapterConfig, selection: Selection, *, strict: bool
) -> tuple[AdapterConfig, dict[str, BaseLayer], dict[str, nn.Module], list[str]]:
    """What an adapter acts on in a model, which is not changed and may be on the meta device.

    Args:
        model: Where it is to go.
        config: The method's settings.
        selection: Where it goes.
        strict: Whether a part of the selection may have no effect.

    Returns:
        Its settings with what follows from the layers filled in, its targets, the modules that it trains in
        full and those of which it trains the bias, by path.

    Raises:
        TargetError: Nothing is selected, or what the method cannot do.
        AdapterError: A module is already trained in full.
    """
    targets = select_targets(model, selection, strict=strict)
    saved = select_saved(model, selection.modules_to_save)
    rows = select_rows(model, config)
    if strict:
        _refuse_rows_twice(targets, saved, rows)
    targets = in_order(model, {**targets, **rows})
    refuse_kinds(config, targets)
    refuse_unquantizable(model, config, targets)
    resolve = getattr(method_of(config), "resolved", None)
    config = config if resolve is None else resolve(config, targets)
    for path, base in targets.items():
        method_of(config).tensor_shapes(base, config.at(path))  # refuses what it cannot do, before a change
    _refuse_overlap(model, targets, saved)
    _refuse_tied(config, model, (*targets, *saved))
    biases = select_biases(model, config, targets, saved)
    if strict:
        _refuse_idle_patterns(config, targets)
        _refuse_idle_bias(config, targets, biases)
    return config, targets, saved, biases


def _refuse_rows_twice(
    targets: Collection[str], saved: Collection[str], rows: Mapping[str, BaseLayer]
) -> None:
    for path in rows:
        if path in targets or path in saved:
            raise TargetError(
                f"{path} is a target or trained in full, and trainable_token_indices trains rows of it",
                where="adapter.trainable_token_indices",
                fix="leave one of them out",
            )


def refuse_kinds(config: AdapterConfig, targets: Mapping[str, BaseLayer]) -> None:
    """Refuse targets that a method does not adapt.

    Args:
        config: Its settings.
        targets: Layers by path.

    Raises:
        TargetError: One is of another kind, or of a form that the method does not take.
    """
    kinds = kinds_of(method_of(config))
    for path, base in targets.items():
        if base.kind not in kinds:
            raise TargetError(
                f"{path} is of kind {base.kind}, which {config.method} does not adapt",
                where="adapter.target_modules",
                fix=f"take it out of the targets: {config.method} adapts {', '.join(kinds)}",
            )
        if base.kind == "conv2d":  # which may be of a form that the method does not take
            method_of(config).tensor_shapes(base, config.at(path))


def _refuse_overlap(model: nn.Module, targets: dict[str, BaseLayer], saved: dict[str, nn.Module]) -> None:
    for path, module in adapter_modules(model).items():
        whole = isinstance(module, SavedModule)
        in_saved = any(f"{path}.".startswith(f"{outer}.") for outer in saved)
        if (path in targets and whole) or (in_saved and not (whole and path in saved)):
            holders = module.copies if isinstance(module, SavedModule) else module.adapters
            raise AdapterError(
                f"{path} belongs to adapter {', '.join(holders)}: it cannot both carry an adapter and be "
                "trained in full",
                where=path,
                fix="detach the other adapter first, or leave the module out of one of them",
            )


def _refuse_tied(config: AdapterConfig, model: nn.Module, places: Collection[str]) -> None:
    embedding, head = tied_pair(model) or ("", "")
    if not token_rows(config) or embedding not in places:
        return
    if head in places or isinstance(model.get_submodule(head), SavedModule):
        raise TargetError(
            f"{head} shares its weight with {embedding}, of which rows train: both sides have to see them",
            where="adapter.target_modules",
            fix=f"take {head} out of target_modules and modules_to_save, of other adapters too",
        )


def _refuse_idle_patterns(config: AdapterConfig, targets: Mapping[str, BaseLayer]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for item in getattr(config, field, ()):
            if not any(list(first_match((item,), path)) for path in targets):
                raise TargetError(
                    f"{item!r} matches none of the {len(targets)} targets",
                    where=f"adapter.{field}",
                    fix=did_you_mean(item.rpartition("=")[0], {path.rpartition(".")[2] for path in targets}),
                )


def _refuse_idle_bias(config: AdapterConfig, targets: Mapping[str, BaseLayer], biases: list[str]) -> None:
    wanted = getattr(config, "bias", "none")
    if wanted != "none" and not biases and all(base.bias is None for base in targets.values()):
        raise TargetError(
            f"bias {wanted!r} selects nothing: "
            + ("no target has a bias" if wanted == "lora_only" else "the model has no bias"),
            where="adapter.bias",
            fix="leave it out; adapter.lora_bias gives lora_B one",
        )
