"""Gradient checkpointing: blocks of which only the input is kept, and which run again in the backward pass.

The second run ends as soon as the last thing that the backward pass needs is there
(`torch.utils.checkpoint`, non-reentrant, with early stop): the last product of a block, whose result is in no
gradient, is not made twice. Random numbers of the second run are those of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graft.errors import ModelError
from graft.models.families import family_of
from graft.models.recipes import Kept

Choice = bool | str | int
"""What `training.gradient_checkpointing` may be."""


def every(choice: Choice) -> int:
    """Each how manyth block is recomputed; 0 for none.

    Args:
        choice: False or "none", True or "full", or a number from 1.
    """
    if choice in ("none", "full"):
        return int(choice == "full")
    return int(choice)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a model, in order.

    Raises:
        ModelError: The family is not known.
    """
    found: Any = model.get_submodule(family_of(model).layers)
    return list(found)


@contextlib.contextmanager
def recomputed(model: nn.Module, choice: Choice, store: Kept) -> Iterator[int]:
    """Within the block, every so manyth decoder block is run again in the backward pass.

    Args:
        model: A transformers model.
        choice: See `every`.
        store: Where the inputs of these blocks are kept.

    Yields:
        How many blocks are recomputed.

    Raises:
        ModelError: Its blocks cannot be checkpointed.
    """
    number = every(choice)
    chosen = blocks_of(model)[number - 1 :: number] if number else []
    for block in chosen:
        if not hasattr(block, "gradient_checkpointing"):
            raise ModelError(
                f"{type(block).__name__} cannot be recomputed",
                where="training.gradient_checkpointing",
                fix="none",
            )
    # transformers' own switch, thrown on these instances only.
    switches = {"gradient_checkpointing": True, "_gradient_checkpointing_func": _Recompute(store)}
    before = [{name: vars(block).get(name) for name in switches} for block in chosen]
    try:
        for block in chosen:
            vars(block).update(switches)
        yield len(chosen)
    finally:
        for block, held in zip(chosen, before, strict=True):
            for name, value in held.items():
                if value is None:
                    vars(block).pop(name)
                else:
                    setattr(block, name, value)


class _Recompute:
    """Called by a block in training with its own forward and its input."""

    def __init__(self, store: Kept) -> None:
        self._store = store

    def __call__(self, function: Callable[..., Any], hidden: Tensor, *more: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(hidden, *more)
        source = _Input(hidden, self._store)
        # An empty tensor tells where random numbers are drawn; the input itself is in the store.
        return checkpoint(
            lambda _: function(source.take(), *more),
            hidden.new_empty(0),
            use_reentrant=False,
            early_stop=True,
        )


class _Input:
    """The input of a block: itself in the first run, from the store in the second."""

    def __init__(self, hidden: Tensor, store: Kept) -> None:
        self._first: Tensor | None = hidden
        self._needs_gradient = hidden.requires_grad
        self._store = store
        self._handle = store.put(hidden.detach())

    def take(self) -> Tensor:
        hidden, self._first = self._first, None
        if hidden is not None:
            return hidden
        return self._store.get(self._handle).detach().requires_grad_(self._needs_gradient)
