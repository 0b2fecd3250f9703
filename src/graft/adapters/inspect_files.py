"""The files of an adapter, read without a model: its layers, what else it holds, how it was trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft import files
from graft.adapters.base import METHODS
from graft.adapters.inspect_groups import place_of_kind
from graft.adapters.inspect_layers import Part
from graft.adapters.peft_config import PeftSettings, read_settings
from graft.adapters.peft_open import CONFIG
from graft.adapters.peft_stacks import current_names, split_stacks
from graft.adapters.peft_tensors import WEIGHTS, open_weights, read_tensors
from graft.adapters.side_file import SideFile, read_side_file
from graft.adapters.targets import block_number
from graft.models.layers import BaseLayer
from graft.models.shards import StoredTensor
from graft.models.weights import StoredBase

BASE_COPY = ".base_layer.weight"
"""How the name of a base weight ends that PEFT repeats in an adapter file."""

_WHOLE_SETTINGS = ("method", "target_modules", "exclude_modules", "layers", "modules_to_save")


class AdapterFile:
    """The files of an adapter directory, read and checked.

    Args:
        place: The directory.

    Raises:
        AdapterError: A file is missing, damaged or holds what it must not; see `load_adapter`.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.side = read_side_file(place)
        self.settings, self.raw = read_settings(place / CONFIG, "" if self.side is None else self.side.method)
        self.stored = open_weights(place)
        self.values = read_tensors(self.stored, self.side, place / WEIGHTS)

    @property
    def method(self) -> Any:
        """The adapter method."""
        return METHODS[self.settings.config.method]

    def resolve_stacks(self, base: StoredBase) -> None:
        """Give tensors the paths that this base has, experts one by one."""
        version = self.raw.get("peft_version")
        named = current_names(base.model, self.stored)
        self.settings, self.stored = split_stacks(
            base.model, self.settings, named, version, self.place / WEIGHTS, ours=self.side is not None
        )
        if self.stored.keys() != self.values.keys():
            self.values = {key: tensor.load() for key, tensor in self.stored.items()}

    def parts(self) -> list[Part]:
        """The layers, block by block."""
        found: dict[str, dict[str, StoredTensor]] = {}
        leaves = None if self.settings.leaf else self._own_leaves()
        for key, tensor in self.stored.items():
            path, leaf = self._split(key, leaves)
            if leaf:
                found.setdefault(path, {})[leaf] = tensor
        ordered = sorted(found, key=_in_the_model)
        return [Part(path, found[path], self.settings.config.at(path)) for path in ordered]

    def in_full(self) -> dict[str, StoredTensor]:
        """Tensors of modules that were trained in full."""
        leaves = None if self.settings.leaf else self._own_leaves()
        return {
            key: tensor
            for key, tensor in self.stored.items()
            if not key.startswith(".") and not key.endswith(BASE_COPY) and not self._split(key, leaves)[1]
        }

    def _split(self, key: str, leaves: tuple[str, ...] | None) -> tuple[str, str]:
        if leaves is not None:
            ends = [leaf for leaf in leaves if key.endswith(f".{leaf}")]
            leaf = max(ends, key=len, default="")
            return key.removesuffix(f".{leaf}"), leaf
        path, mark, rest = key.rpartition(f".{self.settings.leaf}")
        return (path, f"{self.settings.leaf}{rest}") if mark and path else (key, "")

    def _own_leaves(self) -> tuple[str, ...]:
        """Names that a method which PEFT does not have gives its tensors."""
        with torch.device("meta"):
            view = BaseLayer.of(nn.Linear(8, 8))
        return tuple(self.method.tensor_shapes(view, self.settings.config.at("layer")))


def _in_the_model(path: str) -> tuple[int, int, list[tuple[int, str]]]:
    """Block, place in the block, and the path with its numbers as numbers."""
    block = block_number(path)
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
    return -1 if block is None else block, place_of_kind(path.rpartition(".")[2]), parts


def adapter_in(directory: Path) -> Path:
    """An adapter directory; a run directory stands for the adapter in it."""
    inside = directory / "adapter"
    alone = not (directory / CONFIG).exists() and (inside / CONFIG).exists()
    return inside if alone else directory


def told_settings(settings: PeftSettings) -> dict[str, Any]:
    """The settings of a method, but for what is left at its default."""
    config = settings.config
    told: dict[str, Any] = {"target_modules": settings.selection.target_modules or "as the tensors say"}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in ("rank", "alpha") or (item.name not in _WHOLE_SETTINGS and value != item.default):
            told[item.name] = value
    for name in _WHOLE_SETTINGS[2:]:
        if getattr(config, name, None):
            told[name] = getattr(config, name)
    return told


def told_training(place: Path, side: SideFile | None) -> dict[str, Any]:
    """What the side file says of the training and, beside it in a run directory, run.json."""
    told = {} if side is None else {name: value for name, value in side.facts.items() if value is not None}
    record = place.parent / "run.json"
    if place.name != "adapter" or not record.is_file():
        return told
    raw = files.read_json(record)
    config, results = raw.get("config", {}), raw.get("results", {})
    training = config.get("training", {})
    for name in ("learning_rate", "batch_size", "gradient_accumulation_steps", "seed"):
        if training.get(name) is not None:
            told[name] = training[name]
    for name in ("num_tokens", "best_eval_loss", "best_eval_step"):
        if results.get(name) is not None:
            told[name] = results[name]
    return told
