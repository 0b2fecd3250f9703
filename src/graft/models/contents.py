"""What the files of a model directory hold, by the names that the model has for it; nothing is read yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.models.architecture import build_empty, read_config
from graft.models.expert_files import split_fills
from graft.models.experts import split_experts
from graft.models.keys import Fill, check_complete, check_finite, check_sources, named_fills, plan_fills
from graft.models.packed import PackedTensor, open_packed, stored_method
from graft.models.shards import StoredTensor


@dataclass
class Contents:
    """A model without weights and the tensors that its files have for it."""

    path: Path
    model: Any
    """transformers' model, parameters on the meta device, experts split."""
    stored: list[StoredTensor]
    fills: list[Fill]
    """Which stored tensors make which tensors of the model, in the order of the files."""
    expected: dict[str, Tensor]
    """The model's tensors by name, without values."""
    has_experts: bool
    """Whether it has experts, each of which has matrices of its own here."""

    @classmethod
    def of(cls, path: Path, dtype: torch.dtype, stored: list[StoredTensor] | None = None) -> Contents:
        """Look into a model directory that graft reads by itself.

        Args:
            path: The directory.
            dtype: In which the model computes.
            stored: What `open_packed` said of it, where that is known.

        Raises:
            ModelError: Not a causal language model, a tensor is missing, too many or of another shape, or the
                files are damaged.

        Cost: config and headers are read.
        """
        stored = open_packed(path) if stored is None else stored
        model = build_empty(read_config(path), dtype, path)
        own = stored_method(path) == "graft"
        fills = [] if own else plan_fills(model, stored)
        layouts = split_experts(model)
        fills = named_fills(model, stored) if own else split_fills(fills, layouts, stored)
        made = cls(path, model, stored, fills, dict(model.state_dict()), bool(layouts))
        check_sources(fills, made.expected)
        names = [fill.targets for fill in fills]
        if None not in names:  # else only what was converted tells them
            known = [name for targets in names if targets is not None for name in targets]
            check_complete(model, made.expected, known, stored, path)
        return made

    @property
    def is_packed(self) -> bool:
        """Whether linears are stored quantized."""
        return any(isinstance(tensor, PackedTensor) for tensor in self.stored)

    def sources(self) -> Iterator[StoredTensor]:
        """What is read for the fills, in their order."""
        for fill in self.fills:
            for source in fill.in_order():
                yield from source.parts if isinstance(source, PackedTensor) else (source,)

    def read(self, fill: Fill, load: Callable[[StoredTensor], Tensor]) -> dict[str, Any]:
        """The tensors of the model that a fill makes, by name; weights stored quantized as they are.

        Args:
            fill: One of the fills.
            load: Reads a stored tensor.

        Raises:
            ModelError: A value is not finite, or a file cannot be read; file and tensor are named.
        """

        def read(source: StoredTensor) -> Any:
            if isinstance(source, PackedTensor):
                return source.assemble(read)
            tensor = load(source)
            check_finite(tensor, source)
            return tensor

        return fill.realize(read, self.model)
