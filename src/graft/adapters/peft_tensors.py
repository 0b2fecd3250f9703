"""The tensors of an adapter file: opened, matched with what the model calls for, read and checked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from graft.adapters.adapted import unwrapped
from graft.adapters.side_file import FILE, SideFile, tensors_digest
from graft.config import closest
from graft.errors import AdapterError, ModelError
from graft.models.shards import StoredTensor, open_safetensors

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Stands before the path of every tensor."""

SHARED = "base_model."
"""Stands before the name of a tensor that belongs to all layers."""


def full_name(key: str) -> str:
    """The name of a tensor in the file by its key: a path in the model, or ".name" for a shared one."""
    return SHARED.removesuffix(".") + key if key.startswith(".") else PREFIX + key


def _key(name: str) -> str:
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    return "." + name.removeprefix(SHARED)


def open_weights(directory: Path) -> dict[str, StoredTensor]:
    """List the tensors of an adapter directory by their keys (`full_name`); only headers are read.

    Raises:
        AdapterError: There is no safetensors file, it is damaged, or it holds something else.
    """
    path = directory / WEIGHTS
    if not path.exists():
        pickled = sorted(file.name for file in directory.glob("*.bin")) if directory.is_dir() else []
        raise AdapterError(
            f"there is no {WEIGHTS}" + (f"; {pickled[0]} is a pickle and is not opened" if pickled else ""),
            where=str(directory),
            fix="save the adapter with safetensors (PEFT: save_pretrained(..., safe_serialization=True))",
        )
    try:
        found = open_safetensors(path)
    except ModelError as error:
        raise AdapterError(error.what, where=error.where, fix="copy the adapter again") from error
    for tensor in found:
        if not tensor.name.startswith(SHARED) or not tensor.dtype.is_floating_point:
            raise AdapterError(
                f"{tensor.name!r} ({tensor.dtype}) is not a tensor of a PEFT adapter",
                where=f"{path}, tensor {tensor.name!r}",
                fix=f"keys start with {SHARED!r} and hold floating point numbers",
            )
    return {_key(tensor.name): tensor for tensor in found}


def match(
    model: nn.Module, expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor], file: Path
) -> list[str]:
    """Check that file and model agree, key by key and shape by shape.

    Returns:
        The keys of the file that only repeat base weights.

    Raises:
        AdapterError: A tensor is missing, has no place, or has the wrong shape.
    """
    fix = "load the base that the adapter was made for"
    missing = [key for key in expected if key not in stored]
    if missing:
        near = closest(missing[0], [key for key in stored if key not in expected])
        raise AdapterError(
            f"{len(missing)} of {len(expected)} tensors are missing; the first is {full_name(missing[0])!r}"
            + (f", the nearest there {full_name(near)!r}" if near else ""),
            where=f"{file}, tensor {full_name(missing[0])!r}",
            fix=fix,
        )
    extra = [key for key in stored if key not in expected]
    unknown = [key for key in extra if base_tensor(model, key) is None]
    if unknown:
        raise AdapterError(
            f"{len(unknown)} tensors have no place in the model; the first is {full_name(unknown[0])!r}",
            where=f"{file}, tensor {full_name(unknown[0])!r}",
            fix=fix,
        )
    for key, shape in expected.items():
        if stored[key].shape != shape:
            raise AdapterError(
                f"the shape is {list(stored[key].shape)}, model and settings make it {list(shape)}",
                where=f"{file}, tensor {full_name(key)!r}",
                fix=fix,
            )
    return extra


def base_tensor(model: nn.Module, key: str) -> Tensor | None:
    """The base's own tensor that a key repeats: PEFT adds those of embeddings and heads that it targets."""
    path, _, leaf = key.rpartition(".")
    try:
        module = unwrapped(model.get_submodule(path.removesuffix(".base_layer")))
    except AttributeError:
        return None
    return dict(module.named_parameters(recurse=False)).get(leaf)


def check_base_copy(own: Tensor, key: str, value: Tensor, file: Path) -> None:
    """Check that a base weight in an adapter file is this base's.

    Args:
        own: The base's.
        key: Of the tensor in the file.
        value: What the file has.
        file: The file, for errors.

    Raises:
        AdapterError: It differs.
    """
    coarse = min(own.dtype, value.dtype, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))
    if own.shape != value.shape or not torch.equal(own.detach().cpu().to(coarse), value.to(coarse)):
        raise AdapterError(
            "the file has a base weight of its own that differs from this base's (a grown vocabulary?)",
            where=f"{file}, tensor {full_name(key)!r}",
            fix="load the base with that weight, or train the module with modules_to_save",
        )


def read_tensors(
    stored: dict[str, StoredTensor],
    side: SideFile | None,
    file: Path,
    saved: dict[str, StoredTensor] | None = None,
) -> dict[str, Tensor]:
    """Read all tensors, as stored.

    Args:
        stored: By their keys; parts of stacks stand in their place.
        side: The adapter's side file.
        file: Of the tensors.
        saved: The tensors as the file has them, which the digest is of; None for the same.

    Raises:
        AdapterError: A value is not finite, or the digest is not the one that was saved.
    """
    try:
        values = {key: tensor.load() for key, tensor in stored.items()}
    except ModelError as error:
        raise AdapterError(error.what, where=error.where, fix="copy the adapter again") from error
    for key, value in values.items():
        check_finite(value, full_name(key), str(file))
    if side is not None:
        whole = {
            key: values[key] if key in values else tensor.load() for key, tensor in (saved or stored).items()
        }
        found = tensors_digest((full_name(key), value) for key, value in whole.items())
        if found != side.tensors:
            raise AdapterError(
                f"the tensors were changed after the adapter was saved: digest {found[:12]}, "
                f"{side.tensors[:12]} in {FILE}",
                where=str(file),
                fix="copy the adapter again; the file is damaged",
            )
    return values


def check_finite(tensor: Tensor, key: str, where: str) -> None:
    """Check that an adapter tensor holds neither NaN nor infinity.

    Raises:
        AdapterError: It does; the tensor is named.
    """
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(
            f"{bad:,} of {tensor.numel():,} values are NaN or infinite",
            where=f"{where}, tensor {key!r}",
            fix="train again from the last good checkpoint, with a lower learning rate",
        )
