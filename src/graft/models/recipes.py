"""What the backward pass needs but can be made again from what is kept anyway: noted, and not kept.

A norm's output is what three linears keep, though the norm's input is kept too; the product in a gated MLP is
kept, though both factors are. `Recipes` notes how the latest of such tensors were made; its hooks put the
recipe in the place of the tensor wherever autograd saves one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Cheap = Callable[..., Tensor]
"""A function of tensors that costs little beside a matrix product and draws no random numbers."""

AHEAD_BYTES = 64 << 20
"""What a store that keeps tensors elsewhere fetches before it is asked, and holds after it was."""

Handle = Any
"""What stands for a tensor while the backward pass has not come."""


class Kept:
    """How tensors that must be kept are kept: here, as they are. Another store has the same methods."""

    def put(self, tensor: Tensor) -> Handle:
        """Keep a tensor; returns what `get` wants."""
        # Detached, with the same memory and version: a graph that holds tensors that hold the graph
        # would outlive a forward pass whose backward pass never comes.
        return tensor.detach(), tensor._version

    def get(self, handle: Handle) -> Tensor:
        """The tensor again.

        Raises:
            RuntimeError: It was written to after it was put here.
        """
        found: Tensor
        found, version = handle
        if found._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(found.shape)} was written to before its backward pass"
            )
        return found

    def close(self) -> None:
        """After a backward pass: what was put is not asked for any more."""

    def release(self) -> None:
        """Give back all memory."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor is made again."""

    function: Cheap
    inputs: tuple[Handle, ...]
    precision: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class _Noted:
    output: Tensor
    """Held until the next one of its kind comes, so that no other tensor can have its memory meanwhile."""
    versions: tuple[int, ...]
    """Of the output and the inputs: how often they had been written to."""
    function: Cheap
    inputs: tuple[Tensor, ...]
    precision: Callable[[], AbstractContextManager[Any]]


class Recipes:
    """The recipes of one model.

    Args:
        store: Where tensors go that must be kept.

    Cost: `unpack` runs a recipe once for all that ask for its result in a row.
    """

    def __init__(self, store: Kept | None = None) -> None:
        self.store = store or Kept()
        self._latest: dict[str, _Noted] = {}
        self._made: tuple[Recipe, Tensor] | None = None
        self._recipe_of: tuple[_Noted, Recipe] | None = None
        self._open = False

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Within the block, what autograd saves is kept by these recipes and this store."""
        self._open = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self._open = False
            self._latest.clear()
            self._recipe_of = None

    def finish(self) -> None:
        """After the backward pass: drop what was made last."""
        self._made = None
        self.store.close()

    def release(self) -> None:
        """Drop everything that a pass has left, wherever it ended."""
        self._made = None
        self.store.release()

    def note(self, kind: str, output: Tensor, function: Cheap, *inputs: Tensor) -> None:
        """Remember how a tensor was made; it takes the place of the last one of its kind.

        Args:
            kind: Two kinds do not drive each other out.
            output: What `function(*inputs)` gave; nobody may write into it or into the inputs.
            function: Makes it again.
            inputs: Tensors that are kept for other reasons.
        """
        if self._open:
            versions = tuple(tensor._version for tensor in (output, *inputs))
            self._latest[kind] = _Noted(output, versions, function, inputs, autocast_now(output.device.type))

    def pack(self, tensor: Tensor) -> Handle:
        """What autograd keeps in a tensor's place."""
        for noted in self._latest.values():
            if _is_all_of(noted, tensor):
                return self._recipe(noted), tensor.shape
        return None, self.store.put(tensor)

    def unpack(self, handle: Handle) -> Tensor:
        """The tensor again, for the backward pass."""
        recipe, rest = handle
        if recipe is None:
            return self.store.get(rest)
        if self._made is None or self._made[0] is not recipe:
            self._made = None
            inputs = [self.store.get(part) for part in recipe.inputs]
            with torch.no_grad(), recipe.precision():
                self._made = recipe, recipe.function(*inputs)
        return self._made[1].view(rest)

    def _recipe(self, noted: _Noted) -> Recipe:
        if self._recipe_of is None or self._recipe_of[0] is not noted:
            inputs = tuple(self.store.put(part.detach()) for part in noted.inputs)
            self._recipe_of = noted, Recipe(noted.function, inputs, noted.precision)
        return self._recipe_of[1]


def _is_all_of(noted: _Noted, tensor: Tensor) -> bool:
    """Whether a tensor holds exactly the numbers of the noted one, in whatever shape."""
    output = noted.output
    return (
        tensor.dtype == output.dtype
        and tensor.numel() == output.numel()
        and tensor.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
        and tensor.is_contiguous()
        and output.is_contiguous()
        and tensor.storage_offset() == output.storage_offset()
        and tuple(t._version for t in (output, *noted.inputs)) == noted.versions
    )


def autocast_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts in which autocast is as it is now."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)

    def again() -> AbstractContextManager[Any]:
        if enabled == torch.is_autocast_enabled(device_type) and not enabled:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=dtype, enabled=enabled)

    return again
