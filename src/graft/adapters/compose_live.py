"""What acts in a model, several adapters with their weights, written as one adapter."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from torch import nn

from graft.adapters.adapted import AdaptedLayer, SavedModule
from graft.adapters.attached import (
    Adapter,
    active_weights,
    adapter_modules,
    adapter_tensors,
    adapters_of,
    refuse_merged,
)
from graft.adapters.base import is_additive
from graft.adapters.composed_files import LINEAGE, Composed, common_facts
from graft.adapters.deltas import Product, delta_of, norm, weighted_sum
from graft.adapters.peft_config import directory_of
from graft.adapters.peft_tensors import full_name
from graft.adapters.settings import beside_deltas
from graft.adapters.side_file import base_fingerprint, tensors_digest
from graft.adapters.truncate import NOISE, spectrum
from graft.dialects import explained
from graft.errors import AdapterError


@explained
def save_active(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the adapters that act, weights folded in, as one plain LoRA that does the same alone.

    Nothing is cut off: the ranks add up. An existing directory of that name is replaced as a whole.

    Args:
        model: A model with active adapters (`set_active`).
        directory: Where to write.

    Returns:
        The directory.

    Raises:
        AdapterError: None acts, one is merged into the weights, one of them has no update that adds up or
            trains modules in full, or nothing is left of them together.
        StorageError: The place cannot be written; what was there is untouched.
    """
    place = directory_of(directory, "directory")
    refuse_merged(model)
    active = active_weights(model)
    if not active:
        raise AdapterError("no adapter acts", where="model", fix="graft.set_active(model, names) first")
    known = [adapters_of(model)[name] for name in active]
    for one in known:
        _refuse_more_than_deltas(one)
    forced = any(one.forced_base for one in known)
    composed = Composed(model, base_fingerprint(model), forced)
    for path, module in adapter_modules(model).items():
        names = [name for name in module.active if name in active]
        if isinstance(module, SavedModule) and names:
            raise AdapterError(
                f"{names[0]!r} trains {path} in full, which does not add up",
                where=path,
                fix="graft.save_adapter writes it on its own",
            )
        if isinstance(module, AdaptedLayer) and names:
            _add(composed, path, module, {name: active[name] for name in names})
    if not composed.factors:
        raise AdapterError(
            "nothing is left: the updates cancel out", where="model", fix="the base does the same"
        )
    facts, _ = common_facts(one.facts for one in known)
    parents = [_told(model, one, active[one.name]) for one in known]
    lineage = {"operation": "cat", "weights": list(active.values()), "parents": parents}
    composed.write(place, {**facts, LINEAGE: lineage}, replace=True)
    return place


def _refuse_more_than_deltas(known: Adapter) -> None:
    more = beside_deltas(known.config)
    if more or known.makes_up:
        why = f"trains more than deltas of weights ({', '.join(more)})" if more else "makes up for rounding"
        raise AdapterError(
            f"{known.name!r} {why}: a plain LoRA that does the same cannot be written",
            where="model",
            fix="graft.save_adapter writes it on its own",
        )


def _add(composed: Composed, path: str, module: AdaptedLayer, weights: dict[str, float]) -> None:
    deltas = []
    for name in weights:
        layer: Any = module.adapters[name]
        if not is_additive(layer):
            raise AdapterError(
                f"what {name!r} changes depends on the base's own weight: it has no delta that adds up",
                where=path,
                fix="graft.save_adapter writes it on its own",
            )
        deltas.append(delta_of(copy.deepcopy(layer).cpu().double(), module.base))
    factors = list(weights.values())
    scale = sum(abs(weight) * norm(delta) for weight, delta in zip(factors, deltas, strict=True))
    delta = weighted_sum(deltas, factors)
    if norm(delta) <= NOISE * scale:
        return
    if not isinstance(delta, Product) or delta.is_wide:
        found = spectrum(delta, scale)
        delta = found.truncated(len(found.values))
    if delta.rank:
        composed.add(path, delta)


def _told(model: nn.Module, known: Any, weight: float) -> dict[str, Any]:
    tensors = adapter_tensors(model, known.name)
    digest = tensors_digest((full_name(key), t.detach().float().cpu()) for key, t in tensors.items())
    method = known.config.method
    return {"name": known.name, "method": method, "weight": weight, "tensors": digest, "facts": known.facts}
