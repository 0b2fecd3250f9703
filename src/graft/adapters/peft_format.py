"""Adapter directories in PEFT's format, written and read, with our graft.json beside its two files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import unwrapped
from graft.adapters.attach import check_name, detach, install
from graft.adapters.attached import (
    Adapter,
    active_weights,
    adapter,
    adapter_tensors,
    adapters_of,
    refuse_merged,
    set_active,
    trained_tensors,
)
from graft.adapters.base import method_of, ships_quantized
from graft.adapters.effect import adapted_layers, idle_layers
from graft.adapters.foreign_files import is_foreign
from graft.adapters.peft_config import (
    directory_of,
    method_written,
    own_settings,
    write_settings,
)
from graft.adapters.peft_join import join_experts, joined_settings
from graft.adapters.peft_open import CONFIG, read_adapter
from graft.adapters.peft_tensors import WEIGHTS, base_tensor, check_base_copy, check_finite, full_name
from graft.adapters.plain import plain_form
from graft.adapters.side_file import (
    FILE,
    SideFile,
    base_fingerprint,
    settings_digest,
    tensors_digest,
)
from graft.dialects import explained
from graft.errors import AdapterError
from graft.files import new_directory, write_json, write_tensors
from graft.models.classifier import is_classifier, write_classes


@explained
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter as a directory that PEFT, vLLM and others load.

    The same adapter gives the same bytes. An existing directory of that name is replaced as a whole. Updates
    that are measured from a start (init "pissa", "olora", "lora_ga") are written as a plain LoRA of twice the
    rank over the original base.

    Args:
        model: The model that carries it.
        directory: Where to write.
        name: Which adapter.
        facts: What to remember of how it was made (JSON values); by default what it was loaded with.

    Returns:
        The directory.

    Raises:
        AdapterError: No such adapter, it acts with a weight, one is merged into the weights, or a tensor is
            not finite.
        StorageError: The place cannot be written; what was there is untouched.
    """
    directory = directory_of(directory, "directory")
    refuse_merged(model)
    known = adapter(model, name)
    _refuse_weighted(model, name)
    written, own, stacks = join_experts(model, *_stored(model, known))
    tensors = {
        full_name(key): tensor.detach().float().cpu().contiguous()
        for key, tensor in {**own, **_shared(known)}.items()
    }
    for key, tensor in tensors.items():
        check_finite(tensor, key, f"adapter {name!r}")
    settings = joined_settings(write_settings(model, written), stacks)
    side = SideFile(
        base_fingerprint(model),
        tensors_digest(tensors.items()),
        settings_digest(settings),
        known.forced_base,
        dict(known.facts if facts is None else facts),
        "" if method_written(settings) == written.config.method else written.config.method,
        known.makes_up,
        own_settings(written.config),
        _weight_dtype(model, known),
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_directory(directory, replace=True, needed_bytes=size) as partial:
        write_files(partial, tensors, settings, side)
        if is_classifier(model):
            write_classes(model, partial)
    return directory


def _stored(model: nn.Module, known: Adapter) -> tuple[Adapter, Mapping[str, Tensor]]:
    """An adapter and its tensors as files hold them (`AdapterMethod.stored`)."""
    tensors: dict[str, Tensor] = dict(adapter_tensors(model, known.name))
    store = getattr(method_of(known.config), "stored", None)
    if store is None:
        return plain_form(model, known)
    config, of_layers = store(adapted_layers(model, known.name), known.config)
    saved = {
        key: tensor
        for key, tensor in tensors.items()
        if any(key.startswith(f"{path}.") for path in known.saved_modules)
    }
    own = {f"{path}.{leaf}": tensor for path, parts in of_layers.items() for leaf, tensor in parts.items()}
    return dataclasses.replace(known, config=config, targets=tuple(of_layers)), {**own, **saved}


def _refuse_weighted(model: nn.Module, name: str) -> None:
    # PEFT's format has no place for a weight: what is loaded again would act in full.
    weight = active_weights(model).get(name, 1.0)
    if weight != 1:
        raise AdapterError(
            f"adapter {name!r} acts with weight {weight:g}, which its files cannot hold",
            where="name",
            fix="graft.save_active writes what acts, weights folded in; "
            f"graft.set_active(model, {name!r}) makes it whole again",
        )


def _weight_dtype(model: nn.Module, known: Adapter) -> str:
    """Of the weights that a layer quantizes with its update in them: the codes depend on it."""
    if not known.targets or not ships_quantized(method_of(known.config)):
        return ""
    first: Any = unwrapped(model.get_submodule(known.targets[0]))
    return str(first.weight.dtype).removeprefix("torch.")


def write_files(
    partial: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], side: SideFile
) -> None:
    """Write the three files of an adapter into a directory that is being made.

    Args:
        partial: What `files.new_directory` yields.
        tensors: By their names in the file, contiguous, on the CPU.
        settings: The adapter_config.json.
        side: The graft.json.
    """
    write_tensors(dict(tensors), partial / WEIGHTS, metadata={"format": "pt"})
    (partial / WEIGHTS).chmod(0o644)
    write_json(partial / CONFIG, dict(settings))
    write_json(partial / FILE, side.to_dict())


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
        directory: Written by graft, PEFT or a tool that speaks PEFT's format; or by mlx-lm or torchtune, see
            `load_foreign_adapter`.
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
    if is_foreign(directory):
        from graft.adapters.foreign import load_foreign_adapter  # which stands on this file

        return load_foreign_adapter(model, directory, name, trainable=trainable)
    name = name or free_name(model, directory)
    check_name(model, name)
    stored = read_adapter(model, directory, force_base=force_base, trainable=trainable)
    settings, values, side = stored.settings, stored.values, stored.side
    for key, value in stored.copies.items():
        own = base_tensor(model, key)
        assert own is not None
        check_base_copy(own, key, value, directory / WEIGHTS)
    before = active_weights(model)
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
        check_effect(model, made, before, directory / WEIGHTS)
    here = getattr(model, "graft_name", None)
    if side is None and settings.base_name and here and here != settings.base_name:
        made.notes.append(f"{CONFIG} names the base {settings.base_name!r}, this one is {here!r}")
    return made


def check_effect(model: nn.Module, made: Adapter, before: Mapping[str, float], file: Path) -> None:
    """Check that an adapter to be used changes something; layers that do not are noted.

    Args:
        model: The model that carries it.
        made: The adapter.
        before: The adapters that acted before it with their weights; they do again where it is refused.
        file: Of its tensors.

    Raises:
        AdapterError: It changes nothing; it is taken out again.
    """
    idle, places = idle_layers(model, made.name), made.places
    if len(idle) == len(places):
        detach(model, made.name)
        set_active(model, list(before), list(before.values()))
        raise AdapterError(
            f"none of its {len(places)} layers changes any output: was it ever trained?",
            where=str(file),
            fix="train it first (graft.load_adapter(..., trainable=True) takes it for that)",
        )
    if idle:
        some = ", ".join([*idle[:5], *(["..."] if len(idle) > 5 else [])])
        made.notes.append(f"{len(idle)} of its {len(places)} layers change nothing: {some}")


def free_name(model: nn.Module, directory: Path) -> str:
    """What to call an adapter: "default", or its directory's name where that is taken."""
    if "default" not in adapters_of(model):
        return "default"
    return directory.resolve().name.replace(".", "-")


def _shared(known: Adapter) -> dict[str, Tensor]:
    """The tensors that an adapter's layers share, by their keys."""
    return {} if known.shared is None else {f".{name}": t for name, t in known.shared.named_buffers()}
