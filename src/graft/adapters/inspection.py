"""An adapter under the microscope: what its files hold and, with its base at hand, what it does to it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.inspect_files import BASE_COPY, AdapterFile, adapter_in, told_settings, told_training
from graft.adapters.inspect_groups import bands, findings, kinds
from graft.adapters.inspect_layers import Part, build, facts, facts_without_layer, stand_in
from graft.adapters.inspect_records import Finding, Inspection, SavedFacts, TensorFacts
from graft.adapters.lora import ROWS
from graft.adapters.peft_config import directory_of
from graft.adapters.peft_open import CONFIG
from graft.adapters.peft_tensors import WEIGHTS, full_name
from graft.adapters.side_file import settings_digest
from graft.dialects import explained
from graft.errors import AdapterError, FingerprintError
from graft.models.layers import BaseLayer
from graft.models.shards import StoredTensor
from graft.models.weights import Progress, StoredBase

LEADING, THRESHOLD = 10, 0.5
"""How many directions of W + update are looked at, and the |cosine| under which one is new to W."""


@explained
def inspect_adapter(
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    force_base: bool = False,
    directions: int = LEADING,
    threshold: float = THRESHOLD,
    progress: Progress | None = None,
) -> Inspection:
    """Look at an adapter without loading a model.

    Args:
        directory: Of an adapter, in PEFT's format, whoever wrote it; or of a run.
        base: The base model, to measure updates against its weights; these are read one at a time.
        force_base: Accept another base than the one that it was trained on.
        directions: How many leading directions of each changed weight are looked for in the weight before; 0
            for none.
        threshold: The |cosine| under which such a direction counts as new.
        progress: Called with (layers done, layers in all), with the base at hand.

    Returns:
        Tensors, spectra, groups of layers, and what follows from them.

    Raises:
        AdapterError: The files are missing or damaged, hold NaN or an option that graft does not have, do not
            fit together or the base; file and tensor are named.
        FingerprintError: The base at hand is not the one that it was trained on.
        ModelError: The base cannot be read.

    Cost: reads the adapter; with a base also every one of its weights for the fingerprint, and for the
    directions two eigenvalue problems a layer (`new_directions`): `directions=0` leaves these out.
    """
    if directions < 0 or not 0 < threshold <= 1:
        raise AdapterError(
            f"{directions} directions under a |cosine| of {threshold!r} cannot be counted",
            where="directions, threshold",
            fix="directions from 0, a threshold above 0 and up to 1",
        )
    place = adapter_in(directory_of(directory, "directory"))
    file = AdapterFile(place)
    stored_base = None if base is None else StoredBase(base)
    checked = stored_base is not None and _check_base(file, stored_base, force_base)
    if stored_base is not None:
        file.resolve_stacks(stored_base)
    elif file.settings.target_parameters:
        raise AdapterError(
            "the adapter is on whole stacks of experts: which numbers are whose follows from the base",
            where=str(place / CONFIG),
            fix="give the base: --base MODEL",
        )
    layers = tuple(_layers(file, stored_base, directions, progress))
    saved = tuple(_saved(file, stored_base))
    idle = [layer.idle is True for layer in layers] + [item.change_ratio == 0 for item in saved]
    dead = bool(idle) and all(idle)
    own = [item for item in file.stored.values() if not item.name.endswith(BASE_COPY)]
    num_blocks = None if stored_base is None else _num_blocks(stored_base)
    return Inspection(
        directory=str(place),
        method=file.settings.config.method,
        peft_type=str(file.raw.get("peft_type")),
        base_name=file.settings.base_name,
        base_digest=None if file.side is None else file.side.base.short,
        base_quantization=None if file.side is None else file.side.base.quantization,
        base_checked=checked,
        measured_on=None if stored_base is None else stored_base.name,
        settings=told_settings(file.settings),
        trained=told_training(place, file.side),
        bytes=sum(item.nbytes for item in own),
        parameters=sum(_count(item) for item in own),
        dead=dead,
        threshold=threshold,
        tensors=tuple(_tensor(full_name(key), file.values[key]) for key in file.values),
        layers=layers,
        saved=saved,
        bands=bands(layers, num_blocks, threshold),
        kinds=kinds(layers, threshold),
        findings=(
            *findings(layers, saved, dead=dead, threshold=threshold),
            *_notes(file, stored_base, checked),
        ),
    )


def _check_base(file: AdapterFile, base: StoredBase, force: bool) -> bool:
    """Whether the base at hand is known to be that of the adapter.

    Raises:
        FingerprintError: It is not, and that was not accepted.
    """
    if file.side is None or not file.side.base.weights:
        return False
    here = base.digest()
    if here == file.side.base.weights:
        return True
    if not force:
        raise FingerprintError(
            f"the weights of {base.name} are not those that the adapter was trained on: digest "
            f"{here[:12]}, {file.side.base.weights[:12]} in training",
            where=str(file.place),
            fix="give the base it was trained on, or insist with force_base=True (--force-base)",
        )
    return False


def _layers(file: AdapterFile, base: StoredBase | None, directions: int, progress: Progress | None) -> Any:
    parts = file.parts()
    views = {part.path: stand_in(part) if base is None else _view(base, part) for part in parts}
    shared = _shared(file, [view for view in views.values() if view is not None], base is not None)
    needs_shared = hasattr(file.method, "build_shared")
    for number, part in enumerate(parts):
        view = views[part.path]
        values = {leaf: file.values[f"{part.path}.{leaf}"] for leaf in part.stored}
        if view is None or (needs_shared and shared is None):
            yield facts_without_layer(part, values, "its size depends on the base: give --base")
            continue
        layer = build(part, values, file.method, view, shared)
        weight = None if base is None else base.weight(part.path)
        yield facts(part, layer, view, weight, directions)
        if progress is not None and base is not None:
            progress(number + 1, len(parts))


def _view(base: StoredBase, part: Part) -> BaseLayer:
    """The layer of the base that a part is on.

    Raises:
        AdapterError: The base has no such layer.
    """
    found = base.layer(part.path)
    if found is None:
        raise AdapterError(
            f"{base.name} has no layer {part.path!r} that could carry an adapter",
            where=next(iter(part.stored.values())).where,
            fix="give the base that the adapter was made for",
        )
    return found


def _shared(file: AdapterFile, views: list[BaseLayer], sizes_known: bool) -> nn.Module | None:
    if not sizes_known or not views or not hasattr(file.method, "build_shared"):
        return None
    made: nn.Module = file.method.build_shared(views, file.settings.config)
    for name, buffer in made.named_buffers():
        if f".{name}" in file.values:
            value = file.values[f".{name}"]
            if value.shape != buffer.shape:
                raise AdapterError(
                    f"the shape of {name} is {list(value.shape)}, the base makes it {list(buffer.shape)}",
                    where=str(file.place / WEIGHTS),
                    fix="give the base that the adapter was made for",
                )
            buffer.copy_(value)
    return made


def _saved(file: AdapterFile, base: StoredBase | None) -> Any:
    for key in file.in_full():
        value = file.values[key]
        ratio = None
        if base is not None:
            before = _of_base(file, base, key)
            if before.shape == value.shape:
                change = torch.linalg.vector_norm(value.double() - before.double())
                size = torch.linalg.vector_norm(before, dtype=torch.float64)
                ratio = float(change / size) if size else None
        norm = float(torch.linalg.vector_norm(value, dtype=torch.float64))
        yield SavedFacts(name=key, parameters=value.numel(), norm=norm, change_ratio=ratio)


def _of_base(file: AdapterFile, base: StoredBase, key: str) -> Tensor:
    """What the base has in the place of a tensor that is trained in full, or of rows of an embedding."""
    path = key.removesuffix(f".{ROWS}")
    if path == key:
        return base.tensor(key.replace(".base_layer.", "."))
    return base.tensor(f"{path}.weight")[list(file.settings.config.trainable_token_indices)]


def _tensor(name: str, value: Tensor) -> TensorFacts:
    return TensorFacts(
        name=name,
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        bytes=value.numel() * value.element_size(),
        norm=float(torch.linalg.vector_norm(value, dtype=torch.float64)),
        largest=float(value.abs().max()) if value.numel() else 0.0,
    )


def _count(tensor: StoredTensor) -> int:
    return tensor.nbytes // tensor.dtype.itemsize


def _num_blocks(base: StoredBase) -> int | None:
    return getattr(base.model.config.get_text_config(), "num_hidden_layers", None)


def _notes(file: AdapterFile, base: StoredBase | None, checked: bool) -> Any:
    if file.side is None:
        yield Finding(
            level="note",
            text="there is no graft.json: what it was trained on, and on which weights, is not known",
        )
    elif file.side.settings != settings_digest(file.raw):
        yield Finding(
            level="alarm",
            text="adapter_config.json was changed after the adapter was saved: its digest differs",
        )
    if file.side is not None and file.side.forced_base:
        yield Finding(
            level="alarm", text="it was put on another base than its own by force, and saved from there"
        )
    if base is not None and file.side is not None and not checked:
        yield Finding(level="alarm", text=f"{base.name} is not the base that it was trained on")
    if file.side is not None and file.side.base.quantization and base is not None:
        yield Finding(
            level="note",
            text="it was trained on a quantized base; it is measured against the weights at hand",
        )
    for note in file.settings.notes:
        yield Finding(level="note", text=note)
