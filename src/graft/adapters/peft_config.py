"""adapter_config.json to and from our settings: where an adapter goes, and with `peft_dialects` what it is.

Format: PEFT 0.21's configurations. What is said in PEFT's words (r, lora_alpha, layers_to_transform) is said
in these two files only.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graft.adapters.attached import Adapter
from graft.adapters.base import METHODS
from graft.adapters.peft_dialect import Dialect
from graft.adapters.peft_dialects import check_options, dialect_for, dialect_of
from graft.adapters.peft_fields import Field, integers, list_of_names, names
from graft.adapters.targets import Selection, base_layers, select_rows, select_targets
from graft.errors import AdapterError, ConfigError, TargetError
from graft.models.classifier import is_classifier

SEQUENCE_CLASSIFICATION = "SEQ_CLS"
"""PEFT's task_type of an adapter with a head over classes."""

SIDE_FILE = "graft.json"
"""Beside it: what PEFT has no place for (`side_file`)."""

MAX_BYTES = 64 << 20
"""Largest adapter_config.json that is read."""

_PLACEMENT = frozenset({
    "peft_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "base_model_name_or_path", "revision",
})  # fmt: skip

_WITHOUT_EFFECT = frozenset({"task_type", "peft_version", "auto_mapping", "inference_mode"})
"""Options that say how the file came about."""


@dataclass(frozen=True)
class PeftSettings:
    """What an adapter_config.json says."""

    config: Any
    """Of the method that the file is of."""
    selection: Selection
    """Where the adapter goes; target_modules is empty where the file leaves it to the tensors."""
    base_name: str | None
    revision: str | None
    notes: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    """Stacks of experts that PEFT adapted as wholes (`peft_stacks.split_stacks`)."""
    leaf: str = ""
    """What the last part of the key of every tensor of its layers starts with."""
    only_used: tuple[str, ...] = ()
    """Options that act in training and that graft does not have: it can be used, not trained further."""


def read_settings(
    path: Path, method: str = "", own: Mapping[str, Any] | None = None
) -> tuple[PeftSettings, dict[str, Any]]:
    """Read an adapter_config.json.

    Args:
        path: The file.
        method: Which method graft.json says it is, where the file alone does not tell.
        own: The settings that graft.json has, as PEFT has no place for them.

    Returns:
        What it says, and its raw content.

    Raises:
        AdapterError: The file is missing, damaged, of a method that graft does not have, or has an option or
            a value that is refused; the option is named.
    """
    raw = read_object(path)
    field = Field(raw, path)
    dialect = dialect_for(field, method)
    check_options(field, dialect)
    try:
        config = METHODS[dialect.method].config_class(
            target_modules=field.read("target_modules", names, ()) or "all-linear",
            exclude_modules=field.read("exclude_modules", names, ()),
            layers=field.read("layers_to_transform", integers, None) or None,
            modules_to_save=field.read("modules_to_save", list_of_names, ()),
            **dialect.read(field),
            **_beside(dialect, own or {}, path),
        )
    except ConfigError as error:
        where = f"{path}: {_theirs(error.where, dialect)}"
        if error.where.removeprefix("adapter.") in dialect.beside:
            where = f"{path.parent / SIDE_FILE}: {error.where}"
        raise AdapterError(error.what, where=where, fix=error.fix) from error
    selection = Selection(
        field.read("target_modules", names, ()),
        config.exclude_modules,
        config.layers,
        _as_tuple(field.read("layers_pattern", names, ())),
        config.modules_to_save,
    )
    known = _PLACEMENT | _WITHOUT_EFFECT | dialect.known
    unknown = sorted(key for key in raw if key not in known and raw[key])
    notes = (f"unknown options of {path.name} left aside: {', '.join(unknown[:20])}",) if unknown else ()
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    settings = PeftSettings(
        config,
        selection,
        name and str(name),
        revision and str(revision),
        notes,
        field.read("target_parameters", list_of_names, ()),
        dialect.leaf,
        tuple(sorted(name for name in dialect.in_training if raw.get(name))),
    )
    return settings, raw


def check_training(path: Path, options: Sequence[str]) -> None:
    """Refuse to train an adapter further whose options act in training alone and are not had here.

    Args:
        path: The adapter_config.json.
        options: Those of `Dialect.in_training` that are set in it.

    Raises:
        AdapterError: There are such options; they are named.
    """
    if options:
        raise AdapterError(
            f"{', '.join(options)}: not supported in training, and the adapter was trained with it",
            where=f"{path}: {options[0]}",
            fix="use it as it is, or set the option to 0 in the file to go on without",
        )


def _beside(dialect: Dialect, own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    for name in dialect.beside:
        if name not in own:
            raise AdapterError(
                f"{SIDE_FILE} does not say which {name} the adapter was trained with",
                where=str(path.parent / SIDE_FILE),
                fix="restore the file as it was saved",
            )
    return {name: own[name] for name in dialect.beside}


def directory_of(value: object, where: str) -> Path:
    """A path that an argument gives.

    Raises:
        AdapterError: The argument is something else, such as a run or an adapter in memory.
    """
    if isinstance(value, str | os.PathLike):
        return Path(value)
    if isinstance(getattr(value, "adapter", None), os.PathLike):
        fix = "give its .adapter"
    elif isinstance(value, Adapter | nn.Module):
        fix = "write it with graft.save_adapter(model, directory), then give that directory"
    else:
        fix = "give the path of a directory"
    raise AdapterError(f"{reprlib.repr(value)} is no path but a {type(value).__name__}", where=where, fix=fix)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        AdapterError: The file is missing, too large or not a JSON object.
    """
    fix = "restore the file; an adapter directory has adapter_config.json and adapter_model.safetensors"
    inside = path.parent / "adapter" / path.name
    if not path.exists() and inside.exists():
        fix = f"this is a run directory: give {inside.parent}"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AdapterError(f"larger than {MAX_BYTES:,} bytes", where=str(path), fix=fix)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not a JSON file: {error}", where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise AdapterError("not a JSON object", where=str(path), fix=fix)
    return value


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return ((names,) if names else ()) if isinstance(names, str) else names


def _theirs(where: str, dialect: Dialect) -> str:
    ours = where.removeprefix("adapter.")
    return {"layers": "layers_to_transform", **dialect.names}.get(ours, ours)


def write_settings(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json of an adapter, with PEFT's keys, in a fixed order.

    Targets are written as the short names that select exactly them, else as full paths; PEFT matches
    modules_to_save by bare string endings, so those are always full paths.
    """
    config = adapter.config
    dialect = dialect_of(config.method)
    chosen, layers = _target_names(model, adapter, "layers_to_transform" not in dialect.lacks)
    views = base_layers(model)
    placement = {
        "target_modules": chosen,
        "exclude_modules": None,
        "modules_to_save": sorted(adapter.saved_modules) or None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "fan_in_fan_out": any(views[path].kind == "conv1d" for path in adapter.targets),
    }
    return {
        "peft_type": dialect.peft_type,
        "task_type": _task_type(model),
        "auto_mapping": None,
        "base_model_name_or_path": getattr(model, "graft_name", None),
        "revision": getattr(model, "graft_revision", None),
        "inference_mode": True,
        **{
            name: value
            for name, value in placement.items()
            if name not in dialect.lacks or _is_ours(name, value)
        },
        **dialect.write(config, {path: config.at(path) for path in adapter.targets}, chosen),
    }


def _is_ours(name: str, value: object) -> bool:
    # PEFT's trainable tokens know no modules beside them; without the names ours could not be read again.
    return name == "modules_to_save" and bool(value)


def method_written(raw: dict[str, Any]) -> str:
    """The method that an adapter_config.json is taken for without a word from graft.json."""
    return dialect_for(Field(raw, Path("adapter_config.json"))).method


def own_settings(config: Any) -> dict[str, Any]:
    """The settings that graft.json has, as PEFT has no place for them."""
    return {name: getattr(config, name) for name in dialect_of(config.method).beside}


def _task_type(model: nn.Module) -> str | None:
    if is_classifier(model):
        return SEQUENCE_CLASSIFICATION
    return "CAUSAL_LM" if hasattr(model, "generate") else None


def _target_names(model: nn.Module, adapter: Adapter, by_block: bool) -> tuple[list[str], list[int] | None]:
    rows = select_rows(model, adapter.config)
    targets = tuple(path for path in adapter.targets if path not in rows)
    short = tuple(sorted({path.rpartition(".")[2] for path in targets}))
    layers = adapter.config.layers if by_block else None
    for blocks in (None, layers) if layers else (None,):
        if _selects(model, Selection(short, (), blocks, (), adapter.saved_modules), targets):
            return list(short), list(blocks) if blocks else None
    return sorted(targets), None


def _selects(model: nn.Module, selection: Selection, wanted: tuple[str, ...]) -> bool:
    try:
        return tuple(select_targets(model, selection)) == wanted
    except TargetError:
        return False
