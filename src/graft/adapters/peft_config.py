"""adapter_config.json to and from our settings: the only place that says r, lora_alpha, layers_to_transform.

Format: PEFT 0.21's LoraConfig. An option that would change what the model computes and that graft does not
have is refused by its name.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graft.adapters.attached import Adapter
from graft.adapters.lora import LoraConfig
from graft.adapters.targets import Selection, base_layers, select_targets
from graft.errors import AdapterError, ConfigError, TargetError
from graft.models.classifier import is_classifier

SEQUENCE_CLASSIFICATION = "SEQ_CLS"
"""PEFT's task_type of an adapter with a head over classes."""

MAX_BYTES = 64 << 20
"""Largest adapter_config.json that is read."""

_REFUSED: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "megatron_config": None,
    "loftq_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "ensure_weight_tying": False,
}
"""Options that change the function, with the value that leaves it as it is."""

_HONOURED = frozenset({
    "peft_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "base_model_name_or_path", "revision", "target_parameters",
})  # fmt: skip

_WITHOUT_EFFECT = frozenset({
    "task_type", "peft_version", "auto_mapping", "inference_mode", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "eva_config", "runtime_config",
})  # fmt: skip
"""Options that say how the file came about, or that follow from the model."""

_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""


@dataclass(frozen=True)
class PeftSettings:
    """What an adapter_config.json says."""

    config: LoraConfig
    selection: Selection
    """Where the adapter goes; target_modules is empty where the file leaves it to the tensors."""
    base_name: str | None
    revision: str | None
    notes: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    """Stacks of experts that PEFT adapted as wholes (`peft_stacks.split_stacks`)."""


def read_settings(path: Path) -> tuple[PeftSettings, dict[str, Any]]:
    """Read an adapter_config.json.

    Args:
        path: The file.

    Returns:
        What it says, and its raw content.

    Raises:
        AdapterError: The file is missing, damaged, not LoRA, or has an option or a value that is refused; the
            option is named.
    """
    raw = read_object(path)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"peft_type {_shown(raw.get('peft_type'))} is not LORA",
            where=str(path),
            fix="graft reads LoRA adapters; merge other kinds into their base with PEFT",
        )
    _refuse_unsupported(raw, path)
    field = _Field(raw, path)
    layers = field.read("layers_to_transform", _integers, None) or None
    try:
        config = LoraConfig(
            rank=field.read("r", _whole, 8),
            alpha=field.read("lora_alpha", _number, 8.0),
            dropout=field.read("lora_dropout", _number, 0.0),
            target_modules=field.read("target_modules", _names, ()) or "all-linear",
            exclude_modules=field.read("exclude_modules", _names, ()),
            layers=layers,
            init="gaussian" if raw.get("init_lora_weights") == "gaussian" else "kaiming",
            use_rslora=field.read("use_rslora", _flag, False),
            modules_to_save=field.read("modules_to_save", _list_of_names, ()),
            rank_pattern=field.read("rank_pattern", _pattern(_whole), ()),
            alpha_pattern=field.read("alpha_pattern", _pattern(_number), ()),
        )
    except ConfigError as error:
        raise AdapterError(error.what, where=f"{path}: {_theirs(error.where)}", fix=error.fix) from error
    selection = Selection(
        field.read("target_modules", _names, ()),
        config.exclude_modules,
        config.layers,
        _as_tuple(field.read("layers_pattern", _names, ())),
        config.modules_to_save,
    )
    unknown = sorted(
        key for key in raw if key not in _HONOURED | _WITHOUT_EFFECT | set(_REFUSED) and raw[key]
    )
    notes = (f"unknown options of {path.name} left aside: {', '.join(unknown[:20])}",) if unknown else ()
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    stacks = field.read("target_parameters", _list_of_names, ())
    return PeftSettings(config, selection, name and str(name), revision and str(revision), notes, stacks), raw


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


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    for name, harmless in _REFUSED.items():
        value = raw.get(name, harmless)
        if value not in (harmless, None, False) and value not in ([], {}):
            raise AdapterError(
                f"{name} = {_shown(value)} is not supported",
                where=f"{path}: {name}",
                fix="train without it, or merge this adapter into its base with PEFT",
            )
    init = raw.get("init_lora_weights", True)
    if init is not None and init not in _INITS:
        raise AdapterError(
            f"init_lora_weights = {_shown(init)} is not supported: it changes the base weights",
            where=f"{path}: init_lora_weights",
            fix="save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )


class _Field:
    """Reads typed fields of a configuration, naming file and field where the type is wrong."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self._raw = raw
        self._path = path

    def read(self, name: str, kind: Callable[[Any], Any], default: Any) -> Any:
        value = self._raw.get(name)
        if value is None:
            return default
        try:
            return kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterError(
                f"{name} = {_shown(value)} is not {error}",
                where=f"{self._path}: {name}",
                fix="mend adapter_config.json, or save the adapter again",
            ) from error


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("a finite number")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _list_of_names(value)


def _list_of_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise TypeError("a list of names")
    return tuple(value)


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(_whole(item) for item in (value if isinstance(value, list) else [value]))


def _pattern(kind: Callable[[Any], float]) -> Callable[[Any], tuple[str, ...]]:
    def read(value: Any) -> tuple[str, ...]:
        if not isinstance(value, dict):
            raise TypeError("a mapping of patterns to numbers")
        return tuple(f"{pattern}={kind(number)!r}" for pattern, number in value.items())

    return read


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return ((names,) if names else ()) if isinstance(names, str) else names


def _theirs(where: str) -> str:
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "layers": "layers_to_transform"}
    ours = where.removeprefix("adapter.")
    return names.get(ours, ours)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else text[:77] + "..."


def write_settings(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json of an adapter, with PEFT's keys, in a fixed order.

    Targets are written as the short names that select exactly them, else as full paths; PEFT matches
    modules_to_save by bare string endings, so those are always full paths.
    """
    config: LoraConfig = adapter.config
    names, layers = _target_names(model, adapter)
    views = base_layers(model)
    per_layer = {path: config.at(path) for path in adapter.targets}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "auto_mapping": None,
        "base_model_name_or_path": getattr(model, "graft_name", None),
        "revision": getattr(model, "graft_revision", None),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": names,
        "exclude_modules": None,
        "modules_to_save": sorted(adapter.saved_modules) or None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {p: c.rank for p, c in per_layer.items() if c.rank != config.rank},
        "alpha_pattern": {p: _plain(c.alpha) for p, c in per_layer.items() if c.alpha != config.alpha},
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": any(views[path].kind == "conv1d" for path in adapter.targets),
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "bias": "none",
        "use_dora": False,
        "lora_bias": False,
    }


def _task_type(model: nn.Module) -> str | None:
    if is_classifier(model):
        return SEQUENCE_CLASSIFICATION
    return "CAUSAL_LM" if hasattr(model, "generate") else None


def _target_names(model: nn.Module, adapter: Adapter) -> tuple[list[str], list[int] | None]:
    short = tuple(sorted({path.rpartition(".")[2] for path in adapter.targets}))
    layers = adapter.config.layers
    for blocks in (None, layers) if layers else (None,):
        if _selects(model, Selection(short, (), blocks, (), adapter.saved_modules), adapter.targets):
            return list(short), list(blocks) if blocks else None
    return sorted(adapter.targets), None


def _selects(model: nn.Module, selection: Selection, wanted: tuple[str, ...]) -> bool:
    try:
        return tuple(select_targets(model, selection)) == wanted
    except TargetError:
        return False


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number
