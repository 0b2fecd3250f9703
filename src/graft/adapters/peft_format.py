"""Adapter directories in PEFT's format, written and read, with our graft.json beside its two files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import unwrapped
from graft.adapters.attach import check_name, detach, install
from graft.adapters.attached import (
    Adapter,
    active_adapters,
    adapter,
    adapter_tensors,
    adapters_of,
    refuse_merged,
    set_active,
    trained_tensors,
)
from graft.adapters.base import method_of
from graft.adapters.effect import idle_layers
from graft.adapters.peft_config import (
    SEQUENCE_CLASSIFICATION,
    PeftSettings,
    directory_of,
    method_written,
    read_settings,
    write_settings,
)
from graft.adapters.peft_stacks import current_names, split_stacks
from graft.adapters.peft_tensors import (
    WEIGHTS,
    base_tensor,
    check_base_copy,
    check_finite,
    full_name,
    match,
    open_weights,
    read_tensors,
)
from graft.adapters.side_file import (
    FILE,
    SideFile,
    base_fingerprint,
    check_base,
    read_side_file,
    settings_digest,
    tensors_digest,
)
from graft.adapters.targets import Selection, refuse_quantized, select_targets
from graft.dialects import explained
from graft.errors import AdapterError, ConfigError, TargetError
from graft.files import new_directory, write_json, write_tensors
from graft.models.classifier import is_classifier, write_classes
from graft.models.shards import StoredTensor

CONFIG = "adapter_config.json"

_NO_TARGETS: dict[str, Any] = {
    "exclude_modules": (),
    "layers": None,
    "rank_pattern": (),
    "alpha_pattern": (),
}
"""What is left of the fields that only act on targets where a file has none."""


@explained
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter as a directory that PEFT, vLLM and others load.

    The same adapter gives the same bytes. An existing directory of that name is replaced as a whole.

    Args:
        model: The model that carries it.
        directory: Where to write.
        name: Which adapter.
        facts: What to remember of how it was made (JSON values); by default what it was loaded with.

    Returns:
        The directory.

    Raises:
        AdapterError: No such adapter, one is merged into the weights, or a tensor is not finite.
        StorageError: The place cannot be written; what was there is untouched.
    """
    directory = directory_of(directory, "directory")
    refuse_merged(model)
    known = adapter(model, name)
    tensors = {
        full_name(key): tensor.detach().float().cpu().contiguous()
        for key, tensor in {**adapter_tensors(model, name), **_shared(known)}.items()
    }
    for key, tensor in tensors.items():
        check_finite(tensor, key, f"adapter {name!r}")
    settings = write_settings(model, known)
    side = SideFile(
        base_fingerprint(model),
        tensors_digest(tensors.items()),
        settings_digest(settings),
        known.forced_base,
        dict(known.facts if facts is None else facts),
        "" if method_written(settings) == known.config.method else known.config.method,
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_directory(directory, replace=True, needed_bytes=size) as partial:
        write_tensors(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)
        write_json(partial / CONFIG, settings)
        write_json(partial / FILE, side.to_dict())
        if is_classifier(model):
            write_classes(model, partial)
    return directory


@dataclass(kw_only=True)
class StoredAdapter:
    """An adapter directory that was read and fits a model; the model does not carry it."""

    directory: Path
    settings: PeftSettings
    """With full paths for what it selects."""
    values: dict[str, Tensor]
    """Its tensors by their keys, as stored; each one that the settings ask for is there."""
    copies: dict[str, Tensor]
    """Base weights that the file repeats, by their keys; see `check_base_copy`."""
    side: SideFile | None
    forced: bool
    """Whether the model is another base than the one it was trained on."""
    notes: list[str]
    """What its user should know."""


def read_adapter(model: nn.Module, directory: Path, *, force_base: bool = False) -> StoredAdapter:
    """Read an adapter directory for a model, which stays as it is; its parameters may be on the meta device.

    Args:
        model: The base model, with or without other adapters.
        directory: As for `load_adapter`.
        force_base: As for `load_adapter`.

    Raises:
        AdapterError: As for `load_adapter`, but that it may change nothing.
        FingerprintError: The adapter belongs to another base.
    """
    side = read_side_file(directory)
    settings, raw = read_settings(directory / CONFIG, "" if side is None else side.method)
    if side is not None and side.settings != settings_digest(raw):
        raise AdapterError(
            "the file was changed after the adapter was saved: its digest is not the one in graft.json",
            where=str(directory / CONFIG),
            fix=f"restore it, or remove {FILE} if you mean the change; the base is then not checked",
        )
    if raw.get("task_type") == SEQUENCE_CLASSIFICATION and not is_classifier(model):
        raise AdapterError(
            "the adapter is a classifier: its head over classes has no place in a language model",
            where=str(directory),
            fix="graft evaluate --adapter does it; in Python graft.as_classifier first",
        )
    stored = open_weights(directory)
    version = raw.get("peft_version")
    stored = current_names(model, stored)
    settings, stored = split_stacks(model, settings, stored, version, directory / WEIGHTS)
    forced, notes = check_base(model, side, directory, force=force_base)
    try:
        settings = _resolved(model, settings, stored)
        expected = _expected_shapes(model, settings, raw)
    except (TargetError, ConfigError) as error:
        raise AdapterError(error.what, where=f"{directory / CONFIG}: {error.where}", fix=error.fix) from error
    copies = match(model, expected, stored, directory / WEIGHTS)
    values = read_tensors(stored, side, directory / WEIGHTS)
    return StoredAdapter(
        directory=directory,
        settings=settings,
        copies={key: values.pop(key) for key in copies},
        values=values,
        side=side,
        forced=forced,
        notes=[*notes, *settings.notes],
    )


@explained
def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    force_base: bool = False,
    trainable: bool = False,
) -> Adapter:
    """Put an adapter from a directory into a model and make it the active one.

    Every tensor of the file is used, and every tensor that the settings call for must be there, in its shape
    and finite. Nothing is changed in the model until all of that is known. To be used, not trained, it must
    change an output.

    Args:
        model: The base model, with or without other adapters.
        directory: Written by graft, PEFT or a tool that speaks PEFT's format.
        name: What to call it; "default", or the directory's name where "default" is taken.
        force_base: Accept a base other than the one it was trained on; this is remembered.
        trainable: Whether its tensors get gradients, to train it further.

    Returns:
        The adapter, with notes on what its user should know.

    Raises:
        AdapterError: The files are missing, damaged, hold NaN, do not fit the model, change nothing or use an
            option that is not supported; file and tensor are named.
        FingerprintError: The adapter belongs to another base.
    """
    directory = directory_of(directory, "directory")
    name = name or _free_name(model, directory)
    check_name(model, name)
    stored = read_adapter(model, directory, force_base=force_base)
    settings, values, side = stored.settings, stored.values, stored.side
    for key, value in stored.copies.items():
        own = base_tensor(model, key)
        assert own is not None
        check_base_copy(own, key, value, directory / WEIGHTS)
    before = active_adapters(model)
    made = install(model, settings.config, settings.selection, name, seed=None, strict=False)
    with torch.no_grad():
        for key, tensor in {**adapter_tensors(model, name), **_shared(made)}.items():
            if key in values:  # shared ones may be left out of a file
                tensor.copy_(values[key])
    made.trainable = trainable
    for tensor in trained_tensors(model, name).values():
        tensor.requires_grad_(trainable)
    made.forced_base = stored.forced or (side is not None and side.forced_base)
    made.facts = dict(side.facts) if side is not None else {}
    made.notes += stored.notes
    if not trainable:
        _check_effect(model, made, before, directory)
    here = getattr(model, "graft_name", None)
    if side is None and settings.base_name and here and here != settings.base_name:
        made.notes.append(f"{CONFIG} names the base {settings.base_name!r}, this one is {here!r}")
    return made


def _check_effect(model: nn.Module, made: Adapter, before: Sequence[str], directory: Path) -> None:
    idle, places = idle_layers(model, made.name), (*made.targets, *made.saved_modules)
    if len(idle) == len(places):
        detach(model, made.name)
        set_active(model, list(before))
        raise AdapterError(
            f"none of its {len(places)} layers changes any output: was it ever trained?",
            where=str(directory / WEIGHTS),
            fix="train it first (graft.load_adapter(..., trainable=True) takes it for that)",
        )
    if idle:
        some = ", ".join([*idle[:5], *(["..."] if len(idle) > 5 else [])])
        made.notes.append(f"{len(idle)} of its {len(places)} layers change nothing: {some}")


def _free_name(model: nn.Module, directory: Path) -> str:
    if "default" not in adapters_of(model):
        return "default"
    return directory.resolve().name.replace(".", "-")


def _resolved(model: nn.Module, settings: PeftSettings, stored: dict[str, StoredTensor]) -> PeftSettings:
    """The settings with PEFT's own ways of naming modules replaced by full paths.

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
        settings.config, target_modules=targets, modules_to_save=saved, **({} if targets else cleared)
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
    model: nn.Module, settings: PeftSettings, raw: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    method: Any = method_of(settings.config)
    targets = select_targets(model, settings.selection, strict=False)
    expected: dict[str, tuple[int, ...]] = {}
    for path, base in targets.items():
        for leaf, shape in method.tensor_shapes(base, settings.config.at(path)).items():
            expected[f"{path}.{leaf}"] = shape
    for path in settings.selection.modules_to_save:
        for leaf, tensor in unwrapped(model.get_submodule(path)).named_parameters():
            expected[f"{path}.{leaf}"] = tuple(tensor.shape)
    if targets and hasattr(method, "shared_shapes") and raw.get("save_projection", True):
        shapes = method.shared_shapes(list(targets.values()), settings.config)
        expected |= {f".{name}": shape for name, shape in shapes.items()}
    return expected


def _shared(known: Adapter) -> dict[str, Tensor]:
    """The tensors that an adapter's layers share, by their keys."""
    return {} if known.shared is None else {f".{name}": t for name, t in known.shared.named_buffers()}
