"""Adapters in the formats of mlx-lm, torchtune and loralib: put into a model, and written from one."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.adapters import foreign_loralib, foreign_mlx, foreign_torchtune
from graft.adapters.adapted import AdaptedLayer
from graft.adapters.attach import check_name, install
from graft.adapters.attached import (
    Adapter,
    active_weights,
    adapter,
    adapter_modules,
    adapter_tensors,
    trained_tensors,
)
from graft.adapters.dora import DoraConfig
from graft.adapters.foreign_files import (
    DIALECTS,
    Dialect,
    check_enabled,
    dialect_of,
    model_config,
    num_blocks,
    open_tensors,
    read_layers,
    weights_in,
)
from graft.adapters.foreign_layers import ForeignLayer
from graft.adapters.foreign_loralib import Enabled
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_config import directory_of
from graft.adapters.peft_fields import plain
from graft.adapters.peft_format import check_effect, free_name
from graft.adapters.peft_tensors import check_finite
from graft.adapters.settings import beside_deltas
from graft.adapters.targets import Selection, base_layers
from graft.config import did_you_mean
from graft.dialects import explained
from graft.errors import AdapterError
from graft.files import new_directory, write_bytes, write_json, write_tensors
from graft.models.layers import BaseLayer


@explained
def load_foreign_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    alpha: float | None = None,
    enabled: Enabled | None = None,
    trainable: bool = False,
) -> Adapter:
    """Put an adapter of mlx-lm, torchtune or loralib into a model and make it the active one.

    What the file is follows from the names of its tensors. Pickles are opened by the unpickler that runs no
    code. Nothing is changed in the model until all of the file is known to fit.

    Args:
        model: The base model.
        path: A directory with adapters.safetensors (mlx-lm) or adapter_model.pt (torchtune), or a file of
            tensors (.safetensors, or .pt and .bin of tensors alone), as loralib's are.
        name: What to call it; "default", or the directory's name where "default" is taken.
        alpha: The update is scaled by alpha / rank. Only where no file says it: loralib, and torchtune
            without its adapter_config.json.
        enabled: Of loralib, the fused linears and which of their parts carry an update, by the end of their
            path: `{"c_attn": (True, False, True)}`.
        trainable: Whether its tensors get gradients, to train it further.

    Returns:
        The adapter; its notes say that nobody knows whether this is the base it was trained on.

    Raises:
        AdapterError: The files are missing, damaged, in none of these formats, hold NaN, do not fit the
            model or change nothing; file and tensor are named.
    """
    place = directory_of(path, "path")
    name = name or free_name(model, place)
    check_name(model, name)
    file = weights_in(place)
    tensors = open_tensors(file)
    dialect = dialect_of(tensors, file)
    if enabled and dialect != "loralib":
        raise AdapterError(
            f"enabled = {dict(enabled)!r} cannot act: the file is {dialect}'s",
            where="enabled",
            fix="leave it out",
        )
    views = base_layers(model)
    layers = read_layers(dialect, tensors, file, model, views, alpha, enabled or {})
    _check_fit(layers, views, file)
    before = active_weights(model)
    config = _config(layers)
    selection = Selection(config.target_modules)
    made = install(model, config, selection, name, seed=None, strict=False)
    _fill(model, name, layers)
    made.trainable = trainable
    for tensor in trained_tensors(model, name).values():
        tensor.requires_grad_(trainable)
    made.facts = {"read_from": dialect}
    made.notes.append(
        f"read from {dialect}'s format: whether this is the base it was trained on is not known"
    )
    if not trainable:
        check_effect(model, made, before, file)
    return made


@explained
def save_foreign_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    dialect: Dialect,
    enabled: Enabled | None = None,
) -> Path:
    """Write an adapter as mlx-lm, torchtune or loralib read it.

    These formats have one rank and one scaling for all layers. Smaller ranks are filled up with zeros, and
    where scalings differ B takes the difference; an adapter with one of each comes back bit for bit.

    Args:
        model: The model that carries it.
        directory: Where to write; one of that name is replaced as a whole.
        name: Which adapter: of LoRA, LoRA-FA or DoRA.
        dialect: "mlx" (adapters.safetensors), "torchtune" (adapter_model.pt) or "loralib" (lora.pt, beside it
            lora.json with the lora_alpha of each rank).
        enabled: Of loralib, the fused linears that are a MergedLinear there; see `load_foreign_adapter`.

    Returns:
        The directory.

    Raises:
        AdapterError: The format has no place for something in the adapter, or a tensor is not finite.
        StorageError: The place cannot be written; what was there is untouched.
    """
    directory = directory_of(directory, "directory")
    if dialect not in DIALECTS:
        raise AdapterError(
            f"the format {dialect!r} is not known", where="dialect", fix=did_you_mean(str(dialect), DIALECTS)
        )
    layers = _layers(model, name, dialect)
    base, config = getattr(model, "graft_name", None), adapter(model, name).config
    if enabled and dialect != "loralib":
        raise AdapterError(
            f"enabled = {dict(enabled)!r} cannot act on {dialect}", where="enabled", fix="leave it out"
        )
    if dialect == "mlx":
        tensors, settings = foreign_mlx.write(layers, num_blocks(model), config.dropout, base)
        weights, facts = foreign_mlx.WEIGHTS, foreign_mlx.CONFIG
    elif dialect == "torchtune":
        tensors, settings = foreign_torchtune.write(layers, model_config(model), base)
        weights, facts = foreign_torchtune.WEIGHTS, foreign_torchtune.CONFIG
    else:
        check_enabled(enabled or {}, [layer.path for layer in layers])
        tensors, scaling = foreign_loralib.write(layers, enabled or {})
        ranks = sorted({tensor.shape[1] for key, tensor in tensors.items() if key.endswith(".lora_B")})
        settings = {"lora_alpha_by_r": {str(rank): plain(scaling * rank) for rank in ranks}}
        weights, facts = "lora.pt", "lora.json"
    size = sum(tensor.nbytes for tensor in tensors.values())
    with new_directory(directory, replace=True, needed_bytes=size) as partial:
        if weights.endswith(".safetensors"):
            write_tensors(tensors, partial / weights, metadata={"format": "mlx"})
            (partial / weights).chmod(0o644)
        else:
            held = io.BytesIO()
            torch.save(tensors, held)
            write_bytes(partial / weights, held.getvalue())
        write_json(partial / facts, settings)
    return directory


def _check_fit(layers: Sequence[ForeignLayer], views: Mapping[str, BaseLayer], file: Path) -> None:
    for layer in layers:
        view = views.get(layer.path)
        if view is None:
            raise AdapterError(
                f"the model has no layer {layer.path!r} that could carry an adapter",
                where=str(file),
                fix=did_you_mean(layer.path, list(views)),
            )
        wanted = ((layer.rank, view.in_features), (view.out_features, layer.rank))
        magnitude = layer.magnitude
        if (tuple(layer.down.shape), tuple(layer.up.shape)) != wanted or (
            magnitude is not None and tuple(magnitude.shape) != (view.out_features,)
        ):
            raise AdapterError(
                f"the factors of {layer.path} make an update ({len(layer.up)}, {layer.down.shape[1]}), the "
                f"layer is ({view.out_features}, {view.in_features})",
                where=str(file),
                fix="load the base that the adapter was made for",
            )


def _config(layers: Sequence[ForeignLayer]) -> Any:
    rank, scaling = layers[0].rank, layers[0].scaling
    kind = LoraConfig if layers[0].magnitude is None else DoraConfig
    return kind(
        rank=rank,
        alpha=scaling * rank,
        target_modules=tuple(layer.path for layer in layers),
        rank_pattern=tuple(f"{layer.path}={layer.rank}" for layer in layers if layer.rank != rank),
        alpha_pattern=tuple(
            f"{layer.path}={layer.scaling * layer.rank!r}"
            for layer in layers
            if layer.scaling * layer.rank != scaling * rank
        ),
    )


def _fill(model: nn.Module, name: str, layers: Sequence[ForeignLayer]) -> None:
    wanted = adapter_tensors(model, name)
    with torch.no_grad():
        for layer in layers:
            own = {
                key.removeprefix(f"{layer.path}."): t
                for key, t in wanted.items()
                if key.startswith(f"{layer.path}.")
            }
            values = (layer.down, layer.up, layer.magnitude)
            for tensor, value in zip(own.values(), values, strict=False):
                assert value is not None
                tensor.copy_(value)


def _layers(model: nn.Module, name: str, dialect: str) -> list[ForeignLayer]:
    known = adapter(model, name)
    if known.config.method not in ("lora", "lora_fa", "dora"):
        raise AdapterError(
            f"{dialect} has no {known.config.method}",
            where=f"adapter {name!r}",
            fix="merge the adapter instead",
        )
    if known.saved_modules:
        raise AdapterError(
            f"{dialect} has no place for {', '.join(known.saved_modules)}, trained in full",
            where=f"adapter {name!r}",
            fix="train without modules_to_save, or merge the adapter",
        )
    if (more := beside_deltas(known.config)) or known.makes_up:
        told = f"{' and '.join(more)}" if more else "what makes up for the rounding of a base (init loftq)"
        raise AdapterError(
            f"{dialect} has no place for {told}",
            where=f"adapter {name!r}",
            fix="merge the adapter instead",
        )
    found = []
    for path, module in adapter_modules(model).items():
        if not isinstance(module, AdaptedLayer) or name not in module.adapters:
            continue
        layer: Any = module.adapters[name]
        tensors = layer.factors if getattr(layer, "start_A", None) is not None else layer.tensors().values()
        values = [tensor.detach().float().cpu().contiguous() for tensor in tensors]
        for key, value in zip(layer.tensors(), values, strict=False):
            check_finite(value, f"{path}.{key}", f"adapter {name!r}")
        found.append(ForeignLayer(path, values[0], values[1], float(layer.scaling), *values[2:]))
    return found
