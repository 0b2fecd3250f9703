"""An adapter directory in PEFT's format read, checked and matched with a model, and put into none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import unwrapped
from graft.adapters.base import method_of
from graft.adapters.peft_config import (
    SEQUENCE_CLASSIFICATION,
    PeftSettings,
    check_training,
    read_settings,
)
from graft.adapters.peft_stacks import current_names, split_stacks
from graft.adapters.peft_tensors import WEIGHTS, full_name, match, open_weights, read_tensors
from graft.adapters.selected import refuse_kinds
from graft.adapters.side_file import FILE, SideFile, check_base, read_side_file, settings_digest
from graft.adapters.targets import (
    Selection,
    refuse_quantized,
    select_biases,
    select_rows,
    select_targets,
    tied_pair,
)
from graft.errors import AdapterError, ConfigError, TargetError
from graft.models.classifier import is_classifier
from graft.models.layers import BaseLayer
from graft.models.shards import StoredTensor

CONFIG = "adapter_config.json"

_NO_TARGETS: dict[str, Any] = {
    "exclude_modules": (),
    "layers": None,
    "rank_pattern": (),
    "alpha_pattern": (),
    "lora_bias": False,
    "trainable_token_indices": (),
}
"""What is left of the fields that only act on targets where a file has none."""


@dataclass(frozen=True)
class Description:
    """What an adapter directory says of its adapter."""

    directory: Path
    settings: PeftSettings
    raw: dict[str, Any]
    """The content of adapter_config.json."""
    side: SideFile | None
    """graft.json, where there is one."""


@dataclass(frozen=True)
class Opened:
    """An adapter whose files fit a model; its tensors are not read yet."""

    settings: PeftSettings
    """With full paths in place of PEFT's own ways of naming modules."""
    targets: dict[str, BaseLayer]
    """The layers that it adapts, by path."""
    stored: dict[str, StoredTensor]
    """The tensors of the file by their keys (`peft_tensors.full_name`), those of stacks expert by expert."""
    saved: dict[str, StoredTensor]
    """The tensors as the file has them."""
    copies: list[str]
    """Keys among them that only repeat base weights."""


def describe(directory: Path) -> Description:
    """Read what an adapter directory says.

    Raises:
        AdapterError: A file is missing or damaged, was changed after it was saved, or has an option that is
            refused.
    """
    side = read_side_file(directory)
    settings, raw = read_settings(directory / CONFIG, *(("",) if side is None else (side.method, side.own)))
    if side is not None and side.settings != settings_digest(raw):
        raise AdapterError(
            "the file was changed after the adapter was saved: its digest is not the one in graft.json",
            where=str(directory / CONFIG),
            fix=f"restore it, or remove {FILE} if you mean the change; the base is then not checked",
        )
    return Description(directory, settings, raw, side)


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter directory that was read and fits a model; the model does not carry it."""

    directory: Path
    settings: PeftSettings
    """With full paths for what it selects."""
    values: dict[str, Tensor]
    """Its tensors by their keys, as its layers hold them; each one that the settings ask for is there."""
    copies: dict[str, Tensor]
    """Base weights that the file repeats, by their keys; see `check_base_copy`."""
    side: SideFile | None
    forced: bool
    """Whether the model is another base than the one it was trained on."""
    notes: tuple[str, ...]
    """What its user should know."""


def read_adapter(
    model: nn.Module, directory: Path, *, force_base: bool = False, trainable: bool = False
) -> StoredAdapter:
    """Read an adapter directory for a model, which stays as it is; its parameters may be on the meta device.

    Args:
        model: The base model, with or without other adapters.
        directory: In PEFT's format.
        force_base: Accept a base other than the one that it was trained on.
        trainable: Whether it is to be trained further.

    Raises:
        AdapterError: The files are missing, damaged, hold NaN, do not fit the model or use an option that is
            not supported; file and tensor are named.
        FingerprintError: The adapter belongs to another base.
    """
    told, file = describe(directory), directory / WEIGHTS
    check_training(directory / CONFIG, told.settings.only_used if trainable else ())
    check_task(model, told)
    forced, notes = check_base(model, told.side, directory, force=force_base)
    opened = open_adapter(model, told)
    values = read_tensors(opened.stored, told.side, file, opened.saved)
    copies = {key: values.pop(key) for key in opened.copies}
    return StoredAdapter(
        directory=directory,
        settings=opened.settings,
        values=restored(model, opened.settings, values, file),
        copies=copies,
        side=told.side,
        forced=forced,
        notes=(*notes, *opened.settings.notes),
    )


def check_task(model: nn.Module, told: Description) -> None:
    """Refuse an adapter of a classifier where the model is none.

    Raises:
        AdapterError: That is so.
    """
    if told.raw.get("task_type") == SEQUENCE_CLASSIFICATION and not is_classifier(model):
        raise AdapterError(
            "the adapter is a classifier: its head over classes has no place in a language model",
            where=str(told.directory),
            fix="graft evaluate --adapter does it; in Python graft.as_classifier first",
        )


def open_adapter(model: nn.Module, told: Description) -> Opened:
    """Match the files of an adapter with a model, key by key and shape by shape; only headers are read.

    Args:
        model: The base; its weights are not read and may be on the meta device.
        told: What `describe` found.

    Raises:
        AdapterError: The tensors are missing, damaged, or do not fit the model.
    """
    directory, raw = told.directory, told.raw
    saved, ours = open_weights(directory), told.side is not None
    stored = current_names(model, saved)
    settings, stored = split_stacks(
        model, told.settings, stored, raw.get("peft_version"), directory / WEIGHTS, ours=ours
    )
    stored = _without_tied_copy(model, settings, stored)
    try:
        settings = _resolved(model, settings, stored, "loftq" if told.side and told.side.makes_up else "")
        targets = select_targets(model, settings.selection, strict=False)
        refuse_kinds(settings.config, targets)
        expected = _expected_shapes(model, settings, targets, raw)
    except (TargetError, ConfigError) as error:
        raise AdapterError(error.what, where=f"{directory / CONFIG}: {error.where}", fix=error.fix) from error
    copies = match(model, expected, stored, directory / WEIGHTS)
    return Opened(settings, targets, stored, saved, copies)


def restored(
    model: nn.Module, settings: PeftSettings, values: dict[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The tensors of a file as the layers hold them (`AdapterMethod.restored`).

    Args:
        model: The base.
        settings: Of the adapter that was opened.
        values: By their keys.
        file: For the message.

    Raises:
        AdapterError: The method cannot take them.
    """
    restore = getattr(method_of(settings.config), "restored", None)
    if restore is None:
        return values
    made = dict(values)
    for path, base in select_targets(model, settings.selection, strict=False).items():
        for key in [key for key in values if key.startswith(f"{path}.")]:
            leaf, where = key.removeprefix(f"{path}."), f"{file}, tensor {full_name(key)!r}"
            made[key] = restore(base, settings.config.at(path), leaf, values[key], where)
    return made


def _without_tied_copy(
    model: nn.Module, settings: PeftSettings, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors of a file but for rows that PEFT writes a second time, under a tied output head.

    Raises:
        AdapterError: They are other rows than the embedding's.
    """
    own, again = (f"{path}.{settings.leaf}" for path in tied_pair(model) or ("", ""))
    if settings.config.method != "trainable_tokens" or own not in stored or again not in stored:
        return stored
    if not torch.equal(stored[own].load(), stored[again].load()):
        raise AdapterError(
            "embedding and output head share one weight, and their rows differ",
            where=stored[again].where,
            fix="load the base that it was made for",
        )
    return {key: tensor for key, tensor in stored.items() if key != again}


def _resolved(
    model: nn.Module, settings: PeftSettings, stored: dict[str, StoredTensor], init: str
) -> PeftSettings:
    """The settings with PEFT's own ways of naming modules replaced by full paths, and how it started.

    Raises:
        TargetError: modules_to_save fits nothing, or a quantized module.
    """
    selection = settings.selection
    endings = selection.modules_to_save
    saved = tuple(
        path
        for path, module in model.named_modules()
        if path and path.endswith(endings) and next(unwrapped(module).parameters(), None) is not None
    )
    if endings and not saved:
        raise TargetError(
            f"modules_to_save {list(endings)[:10]} fit no module",
            where="modules_to_save",
            fix="check the base",
        )
    for path in saved:
        refuse_quantized(path, model.get_submodule(path))
    targets = selection.target_modules or tuple(
        sorted({path for key in stored if (path := _adapted_path(key, settings.leaf)) is not None})
    )
    selection = dataclasses.replace(selection, target_modules=targets, modules_to_save=saved)
    cleared = {name: value for name, value in _NO_TARGETS.items() if hasattr(settings.config, name)}
    config = dataclasses.replace(
        settings.config,
        target_modules=targets,
        modules_to_save=saved,
        **({} if targets else cleared),
        **({"init": init} if init else {}),
    )
    if selection.layers_pattern:  # ours has no such field: say the same in paths
        found = tuple(select_targets(model, selection, strict=False))
        selection = Selection(found, modules_to_save=saved)
        config = dataclasses.replace(config, target_modules=found, exclude_modules=(), layers=None)
    return dataclasses.replace(settings, config=config, selection=selection)


def _adapted_path(key: str, leaf: str) -> str | None:
    path, mark, _ = key.rpartition(f".{leaf}")
    return path if mark and leaf else None


def _expected_shapes(
    model: nn.Module, settings: PeftSettings, targets: dict[str, BaseLayer], raw: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    method: Any = method_of(settings.config)
    _refuse_kernels(targets, raw)
    shapes_of = getattr(method, "stored_shapes", method.tensor_shapes)
    expected: dict[str, tuple[int, ...]] = {}
    for path, base in {**targets, **select_rows(model, settings.config)}.items():
        for leaf, shape in shapes_of(base, settings.config.at(path)).items():
            expected[f"{path}.{leaf}"] = shape
    for path in settings.selection.modules_to_save:
        for leaf, tensor in unwrapped(model.get_submodule(path)).named_parameters():
            expected[f"{path}.{leaf}"] = tuple(tensor.shape)
    for path in select_biases(model, settings.config, targets, settings.selection.modules_to_save):
        bias: Any = unwrapped(model.get_submodule(path)).bias
        expected[f"{path}.bias"] = tuple(bias.shape)
    if targets and hasattr(method, "shared_shapes") and raw.get("save_projection", True):
        shapes = method.shared_shapes(list(targets.values()), settings.config)
        expected |= {f".{name}": shape for name, shape in shapes.items()}
    return expected


def _refuse_kernels(targets: dict[str, BaseLayer], raw: dict[str, Any]) -> None:
    kerneled = [path for path, base in targets.items() if base.kind == "conv2d" and base.kernel != (1, 1)]
    if kerneled and raw.get("use_effective_conv2d"):
        raise TargetError(
            f"use_effective_conv2d is not supported: {kerneled[0]} would have tensors for its kernel alone",
            where="use_effective_conv2d",
            fix="train without it, or merge this adapter into its base with PEFT",
        )
