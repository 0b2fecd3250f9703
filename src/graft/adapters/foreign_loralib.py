"""State dicts of Microsoft's loralib: lora_A and lora_B on the modules themselves.

Linear and Embedding have the shapes of PEFT. A MergedLinear of g parts, n of them enabled, has lora_A
(n rank, in), the enabled parts one after the other, and lora_B (n out / g, rank): part by part its own B A,
and nothing in the rows of the parts that are not enabled. Rank, alpha and which parts are enabled stand in
the code that built the model, not in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graft.adapters.foreign_layers import ForeignLayer, paired, rescaled
from graft.errors import AdapterError

LEAVES = ("lora_A", "lora_B", "")

Enabled = Mapping[str, tuple[bool, ...]]
"""Which parts of a fused linear carry an update, by the end of its path: {"c_attn": (True, False, True)}."""


def read(
    tensors: Mapping[str, Tensor], alpha: float, sides: Mapping[str, int], enabled: Enabled, where: str
) -> list[ForeignLayer]:
    """The layers of an adapter.

    Args:
        tensors: Of the file, by their names.
        alpha: lora_alpha of the model; the update is scaled by alpha / rank.
        sides: out_features of the model's layers by path.
        enabled: The fused linears.
        where: The file, for errors.

    Returns:
        The layers; of a fused one A as it is and B with the parts' factors along its diagonal, at the same
        scaling.

    Raises:
        AdapterError: A layer is not there, or its factors do not fit it or what is enabled.
    """
    layers = []
    for path, (down, up, _) in paired(tensors, LEAVES, where).items():
        if path not in sides:
            raise AdapterError(
                f"the model has no layer {path!r} that could carry an adapter",
                where=where,
                fix="load the base that it was made for",
            )
        rank, side = up.shape[1], sides[path]
        layer = ForeignLayer(path, down, up, alpha / rank)
        if len(down) == rank and len(up) == side:
            layers.append(layer)
            continue
        parts, end = _parts(path, enabled), path.rpartition(".")[2]
        if parts is None or len(down) != rank * sum(parts) or len(up) * len(parts) != side * sum(parts):
            raise AdapterError(
                f"{path} has lora_A {list(down.shape)} and lora_B {list(up.shape)} for {side} outputs"
                + (f", which {parts} does not make" if parts else ": a MergedLinear"),
                where=where,
                fix=f'say which parts are enabled: enabled={{"{end}": (True, False, True)}}',
            )
        layers.append(replace(layer, up=_spread(up, parts, side)))
    return layers


def write(layers: Sequence[ForeignLayer], enabled: Enabled) -> tuple[dict[str, Tensor], float]:
    """Tensors of an adapter, and the scaling that alpha / rank must have in the code that builds the model.

    Args:
        layers: LoRA's.
        enabled: The fused linears that are a MergedLinear there.

    Raises:
        AdapterError: A layer is DoRA's, or a fused one does more than its enabled parts can.
    """
    scaling = layers[0].scaling
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        if layer.magnitude is not None:
            raise AdapterError("loralib has no DoRA", where=layer.path, fix="merge the adapter instead")
        alike = rescaled(layer, scaling)
        parts = _parts(layer.path, enabled)
        tensors[f"{layer.path}.lora_A"] = alike.down
        tensors[f"{layer.path}.lora_B"] = alike.up if parts is None else _gathered(alike, parts)
    return tensors, scaling


def _parts(path: str, enabled: Enabled) -> tuple[bool, ...] | None:
    return next((parts for end, parts in enabled.items() if f".{path}".endswith(f".{end}")), None)


def _blocks(shape: tuple[int, int], parts: tuple[bool, ...]) -> list[tuple[slice, slice]]:
    """Rows and columns of each enabled part in B (out, n rank)."""
    height, width = shape[0] // len(parts), shape[1] // sum(parts)
    places = [place for place, on in enumerate(parts) if on]
    return [
        (slice(place * height, (place + 1) * height), slice(number * width, (number + 1) * width))
        for number, place in enumerate(places)
    ]


def _spread(up: Tensor, parts: tuple[bool, ...], side: int) -> Tensor:
    spread = up.new_zeros(side, up.shape[1] * sum(parts))
    pieces = up.chunk(sum(parts))
    for (rows, columns), piece in zip(_blocks((side, spread.shape[1]), parts), pieces, strict=True):
        spread[rows, columns] = piece
    return spread


def _gathered(layer: ForeignLayer, parts: tuple[bool, ...]) -> Tensor:
    side, width = layer.up.shape
    fits = bool(sum(parts)) and not side % len(parts) and not width % sum(parts)
    if fits:
        pieces = [layer.up[rows, columns] for rows, columns in _blocks((side, width), parts)]
        gathered = torch.cat(pieces)
        if torch.equal(_spread(gathered, parts, side), layer.up):
            return gathered
    raise AdapterError(
        f"the update of {layer.path} is not made of single parts {parts} of its outputs",
        where=layer.path,
        fix="leave it out of enabled: a plain loralib.Linear holds it",
    )
