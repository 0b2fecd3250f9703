"""An MLP that works on a part of the tokens at a time (tiled MLP, arXiv:2506.13996): for long sequences.

What is wide in an MLP is as long as a tile and not as the sequence, forward and backward: only the input is
kept, and the backward pass runs each tile once more. An MLP treats each token alone, so the output is the
same; gradients of weights are summed tile by tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.models.recipes import Recipes, autocast_now
from graft.models.stand_in import StandIn


class TiledMLP(StandIn):
    """In place of an MLP.

    Args:
        original: The MLP: (..., width) to (..., width), each token alone.
        recipes: Of the model.
        tile: Tokens at a time. On a quantized base each tile decodes the weights once more.

    Cost: the MLP's forward pass once more; none where its block is recomputed anyway.
    """

    def __init__(self, original: nn.Module, recipes: Recipes, tile: int) -> None:
        super().__init__(original, recipes)
        self.__dict__["tile"] = tile

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width), as the original has it."""
        if not torch.is_grad_enabled():
            return _tiles(self.original, x, self.tile)
        trained = [p for p in self.original.parameters() if p.requires_grad]
        # In two halves, the one that keeps first: a recomputed block then ends without the MLP.
        place = _Keep.apply(x, self.original, self.tile, *trained)
        result: Tensor = _Run.apply(place, x.detach(), self.original, self.tile)
        return result


class _Keep(torch.autograd.Function):
    """Keeps the input; its backward pass is the MLP's. The output has its shape and no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, tile: int, *trained: Tensor) -> Tensor:
        ctx.module, ctx.tile = module, tile
        ctx.precision, ctx.random = autocast_now(x.device.type), _random(x.device)
        ctx.save_for_backward(x, *trained)
        return x.new_empty(1).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *trained = ctx.saved_tensors
        rows, upper = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        needs_x = ctx.needs_input_grad[0]
        grad_x = torch.empty_like(rows) if needs_x else None
        sums: list[Tensor | None] = [None] * len(trained)
        with torch.enable_grad(), ctx.precision(), _replayed(ctx.random, x.device):
            for part in _parts(len(rows), ctx.tile):
                leaf = rows[part].detach().requires_grad_(needs_x)
                sources = [leaf, *trained] if needs_x else trained
                output = ctx.module(leaf[None])
                grad = upper[part][None].to(output.dtype)
                found = list(torch.autograd.grad(output, sources, grad, allow_unused=True))
                if grad_x is not None:
                    grad_x[part] = found.pop(0)
                sums = [_plus(total, more) for total, more in zip(sums, found, strict=True)]
        return None if grad_x is None else grad_x.view(x.shape), None, None, *sums


class _Run(torch.autograd.Function):
    """Makes the output and keeps nothing; the gradient goes to `_Keep`."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, x: Tensor, module: nn.Module, tile: int) -> Tensor:
        return _tiles(module, x, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


def _tiles(module: nn.Module, x: Tensor, tile: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    output: Tensor | None = None
    for part in _parts(len(rows), tile):
        found = module(rows[part][None])[0]
        output = found.new_empty(len(rows), found.shape[-1]) if output is None else output
        output[part] = found
    assert output is not None
    return output.view(x.shape)


def _parts(count: int, tile: int) -> Iterator[slice]:
    for start in range(0, count, tile):
        yield slice(start, start + tile)


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


def _random(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where the streams stand that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Within the block the streams go on from a state; afterwards they stand where they stood."""
    now = _random(device)
    try:
        _set_random(state, device)
        yield
    finally:
        _set_random(now, device)


def _set_random(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
