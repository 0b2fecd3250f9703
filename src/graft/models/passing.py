"""A model that runs with one decoder block in memory: each block's weights are read when it is its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graft.models.contents import Contents
from graft.models.families import layer_index
from graft.models.filler import Filler
from graft.models.keys import Fill
from graft.models.stream import Progress

Values = Callable[[Fill], Iterable[tuple[str, Any]]]
"""What is placed for a fill: tensors, or weights that are quantized, by their names in the model."""


@contextmanager
def passing(
    contents: Contents,
    values: Values,
    dress: Callable[[Any], None] | None = None,
    progress: Progress | None = None,
) -> Iterator[Any]:
    """Within the block, a model whose decoder blocks have weights only while they run.

    Args:
        contents: Of the model directory; its model is used up.
        values: Reads a fill and says what the model gets for it.
        dress: Called with the model whenever new weights are in it, before they are used.
        progress: Called with (bytes read, bytes in all) after each tensor of a pass.

    Yields:
        The model, for inference on the CPU.

    Raises:
        ModelError: A file is damaged; file and tensor are named.

    Cost: the memory of embeddings, head and norms, and of one block; each pass reads the blocks anew. Of a
    family whose blocks are not known, everything stays in memory.
    """
    units: dict[int | None, list[Fill]] = {}
    for fill in contents.fills:
        units.setdefault(layer_index(fill.target), []).append(fill)
    reader = _Reader(contents, values, dress, progress)
    reader.fill(units.pop(None, []))
    _tie(contents.model)
    reader.dress()
    hooks = [
        hook
        for number, fills in units.items()
        if number is not None
        for hook in _turns(reader, _block_of(contents.model, fills[0], number), fills)
    ]
    try:
        with torch.inference_mode():
            yield contents.model
    finally:
        for hook in hooks:
            hook.remove()


class _Reader:
    def __init__(
        self,
        contents: Contents,
        values: Values,
        dress: Callable[[Any], None] | None,
        progress: Progress | None,
    ) -> None:
        self._contents = contents
        self._filler = Filler(contents.model, None, contents.model.dtype, torch.device("cpu"))
        self._values = values
        self._dress = dress
        self._progress = progress
        self._total = sum(source.nbytes for source in contents.stored)
        self._done = 0

    def fill(self, fills: list[Fill]) -> None:
        for fill in fills:
            for name, value in self._values(fill):
                self._filler.put(name, value, fill)
            self._done += sum(source.nbytes for source in fill.sources)
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)

    def dress(self) -> None:
        if self._dress is not None:
            self._dress(self._contents.model)


def _turns(reader: _Reader, block: nn.Module, fills: list[Fill]) -> Iterator[Any]:
    """Hooks that fill a block before it runs and empty it afterwards."""
    before = dict(block.named_modules())

    def enter(module: nn.Module, _: Any) -> None:
        reader.fill(fills)
        reader.dress()

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        for path, old in before.items():
            if path and block.get_submodule(path) is not old:
                block.set_submodule(path, old)
            for leaf, parameter in old.named_parameters(recurse=False):
                setattr(old, leaf, nn.Parameter(torch.empty_like(parameter, device="meta"), False))

    yield block.register_forward_pre_hook(enter)
    yield block.register_forward_hook(leave)


def _block_of(model: Any, fill: Fill, number: int) -> nn.Module:
    head, _, _ = fill.target.partition(f".{number}.")
    return model.get_submodule(f"{head}.{number}")


def _tie(model: Any) -> None:
    """Give what shares a weight with another, and has none of its own, the other's."""
    for target, source in model.all_tied_weights_keys.items():
        one, other = model.get_parameter(target), model.get_parameter(source)
        if one.is_meta != other.is_meta:
            name, filled = (target, other) if one.is_meta else (source, one)
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, filled)
