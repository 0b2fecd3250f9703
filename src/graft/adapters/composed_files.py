"""A composed adapter written down: a plain LoRA of scaling one whose graft.json says what it was made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.attached import Adapter
from graft.adapters.deltas import Product
from graft.adapters.lora import LoraConfig, LoraMethod
from graft.adapters.peft_config import write_settings
from graft.adapters.peft_format import write_files
from graft.adapters.peft_tensors import check_finite, full_name
from graft.adapters.settings import MAX_RANK
from graft.adapters.side_file import SideFile, settings_digest, tensors_digest
from graft.adapters.targets import base_layers
from graft.errors import AdapterError
from graft.files import new_directory
from graft.models.fingerprint import Fingerprint

LINEAGE = "composed"
"""The fact that says what an adapter was made of."""

_OF_THE_BASE = ("format", "chat_template")
"""Facts of the parents that are the result's where they agree: how prompts are written."""


@dataclass
class Composed:
    """What is to be written."""

    model: nn.Module
    """The base, with its weights or without."""
    fingerprint: Fingerprint
    """Of the base."""
    forced_base: bool = False
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(down (rank, in), up (out, rank)) by the path of the layer, float32."""
    saved: dict[str, Tensor] = field(default_factory=dict)
    """Modules trained in full, by the names in the file."""
    saved_paths: tuple[str, ...] = ()

    def add(self, path: str, product: Product) -> Product:
        """Take up the delta of a layer; returns it as it will be written, rounded to float32.

        Raises:
            AdapterError: Its rank is beyond what settings accept.
        """
        if product.rank > MAX_RANK:
            raise AdapterError(
                f"the ranks add up to {product.rank:,}, the largest accepted is {MAX_RANK}",
                where=path,
                fix="use svd with a rank or an energy",
            )
        down, up = product.down.float().contiguous(), product.up.float().contiguous()
        self.factors[path] = (down, up)
        return Product(down.double(), up.double())

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        pairs = (tensor for pair in self.factors.values() for tensor in pair)
        return sum(tensor.numel() for tensor in (*pairs, *self.saved.values()))

    def write(self, directory: Path, facts: Mapping[str, Any], *, replace: bool = False) -> None:
        """Write the adapter directory, whole or not at all.

        Args:
            directory: Its name.
            facts: What graft.json remembers.
            replace: Whether a directory of that name is replaced.

        Raises:
            AdapterError: A value is too large for float32.
            StorageError: The directory exists, or the disk refused.
        """
        views = base_layers(self.model)
        tensors: dict[str, Tensor] = {}
        for path, pair in self.factors.items():
            names = LoraMethod().tensor_shapes(views[path], LoraConfig())
            tensors |= {full_name(f"{path}.{leaf}"): one for leaf, one in zip(names, pair, strict=True)}
        tensors |= {name: tensor.contiguous() for name, tensor in self.saved.items()}
        for name, tensor in tensors.items():
            check_finite(tensor, name, "the composed adapter")
        config = lora_config({path: len(pair[0]) for path, pair in self.factors.items()}, self.saved_paths)
        adapter = Adapter("default", config, tuple(self.factors), self.saved_paths, self.num_parameters)
        settings = write_settings(self.model, adapter)
        side = SideFile(
            self.fingerprint,
            tensors_digest(tensors.items()),
            settings_digest(settings),
            self.forced_base,
            dict(facts),
        )
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with new_directory(directory, replace=replace, needed_bytes=size) as partial:
            write_files(partial, tensors, settings, side)


def lora_config(ranks: Mapping[str, int], saved: tuple[str, ...] = ()) -> LoraConfig:
    """Settings of a LoRA of these ranks in which every scaling is one: alpha is the rank, layer by layer."""
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    pattern = tuple(f"{path}={rank}" for path, rank in others.items())
    return LoraConfig(
        rank=usual,
        alpha=float(usual),
        target_modules=tuple(ranks),
        modules_to_save=saved,
        rank_pattern=pattern,
        alpha_pattern=pattern,
    )


def common_facts(parents: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """How prompts are written, where all parents that say so agree, and notes where they do not."""
    found = [facts for facts in parents if facts]
    common, notes = {}, []
    for name in _OF_THE_BASE:
        values = [facts[name] for facts in found if name in facts]
        if values and all(value == values[0] for value in values):
            common[name] = values[0]
        elif values:
            notes.append(f"the adapters were trained with different {name.replace('_', ' ')}s; none is kept")
    return common, notes
