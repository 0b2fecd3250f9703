"""What the updates of an adapter look like: singular values, effective rank, relative size, balance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer
from graft.adapters.attached import Adapter, adapter_modules
from graft.adapters.effect import factors
from graft.adapters.spectrum import effective_rank, singular_values, triangles
from graft.models.layers import BaseLayer

CHUNK_NUMBERS = 1 << 24
"""Numbers of factors that are decomposed together, in float64: 128 MiB."""

DIGITS = 6
"""Significant digits that are kept."""


@dataclass(frozen=True)
class Update:
    """The update s B A of one layer.

    Attributes:
        down: A (rank, in).
        up: B (out, rank).
        scaling: s.
    """

    down: Tensor
    up: Tensor
    scaling: float


def updates(model: nn.Module, name: str) -> dict[str, Update]:
    """The updates of one adapter by the path of their layer; those that are no plain product are left out.

    Args:
        model: The model that carries it.
        name: The adapter.
    """
    found = {}
    for path, module in adapter_modules(model).items():
        if isinstance(module, AdaptedLayer) and name in module.adapters:
            layer: Any = module.adapters[name]
            pair = factors(layer)
            if pair is not None and min(pair[0].shape) > 0:
                found[path] = Update(*pair, float(getattr(layer, "scaling", 1.0)))
    return found


def weight_norms(model: nn.Module, paths: Sequence[str]) -> dict[str, float]:
    """||W||_F of the base layers under an adapter.

    Cost: one read of each weight; a quantized one is decoded, one layer at a time.
    """
    norms = {}
    for path in paths:
        module: Any = model.get_submodule(path)
        base: BaseLayer = module.base
        norms[path] = float(torch.linalg.vector_norm(base.dense_weight(None), dtype=torch.float32))
    return norms


def measure(found: Mapping[str, Update], norms: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The figures of every update, with six significant digits.

    Args:
        found: Updates by path.
        norms: ||W||_F by path.

    Returns:
        For each path `singular_values` of s B A, their `effective_rank`, `update_ratio` = ||s B A||_F /
        ||W||_F and `balance` = ||A||_F / ||B||_F; None for what has no value: a rank or a balance while B is
        zero, anything of factors that are not finite.
    """
    measured: dict[str, dict[str, Any]] = {}
    for paths in _alike(found):
        both = triangles(
            torch.stack([found[path].down for path in paths]), torch.stack([found[path].up for path in paths])
        )
        down, up = (torch.linalg.vector_norm(triangle, dim=(1, 2)) for triangle in both)
        finite = torch.isfinite(down) & torch.isfinite(up)
        values = singular_values(*(torch.where(finite[:, None, None], part, 0.0) for part in both)).tolist()
        sizes = torch.stack([down, up, finite.to(down.dtype)], 1).tolist()
        for path, spectrum, (size_down, size_up, is_finite) in zip(paths, values, sizes, strict=True):
            scaled = [abs(found[path].scaling) * value for value in spectrum]
            measured[path] = (
                _figures(scaled, (size_down, size_up), norms[path]) if is_finite else dict(_NOTHING)
            )
    return {path: measured[path] for path in found}


_NOTHING: dict[str, Any] = {
    "singular_values": None,
    "effective_rank": None,
    "update_ratio": None,
    "balance": None,
}


def _figures(values: list[float], sizes: tuple[float, float], norm: float) -> dict[str, Any]:
    down, up = sizes
    return {
        "singular_values": [_rounded(value) for value in values],
        "effective_rank": _rounded(effective_rank(values)),
        "update_ratio": _rounded(math.sqrt(math.fsum(v * v for v in values)) / norm) if norm else None,
        "balance": _rounded(down / up) if up else None,
    }


def _alike(found: Mapping[str, Update]) -> Iterator[list[str]]:
    """Paths whose factors have the same shapes, so many together as `CHUNK_NUMBERS` allows."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, update in found.items():
        groups.setdefault((update.down.shape, update.up.shape, update.down.device), []).append(path)
    for (down, up, _), paths in groups.items():
        size = max(1, CHUNK_NUMBERS // (down.numel() + up.numel()))
        for start in range(0, len(paths), size):
            yield paths[start : start + size]


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def trained_updates(model: nn.Module, adapter: Adapter | None) -> dict[str, Update]:
    """The updates of the adapter that trains; none where the model itself does."""
    return {} if adapter is None else updates(model, adapter.name)
