"""The update scaling * B A x as autograd functions that keep no more than they must.

Shapes: x (..., in), y (..., out), lora_A (rank, in), lora_B (out, rank); N is the number of rows of x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from graft.kernels.wide import is_wide
from graft.models.layers import BaseLayer


class LoraUpdate(Function):
    """base_output + scaling * (x A') B' with its own backward.

    Kept for backward: x, which the three layers that share an input share too, and x A' (N, rank). Neither
    B A nor a gradient for the base weight is ever made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_output: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        """One dtype in x (..., in) and base_output (..., out); in_place writes into base_output."""
        with no_autocast(x.device.type):
            down = _down(x, lora_A)
            result = _with_update(base_output, down, lora_B, scaling, in_place)
        if in_place:
            ctx.mark_dirty(base_output)
        ctx.scaling, ctx.x_shape = scaling, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, down, lora_A, lora_B)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, base_output, lora_A and lora_B."""
        needs_x, needs_base, needs_A, needs_B = ctx.needs_input_grad[:4]
        grad_x, grad_A, grad_B = _gradients(ctx, grad, needs_x, needs_A, needs_B)
        return grad_x, grad if needs_base else None, grad_A, grad_B, None, None


class StartedUpdate(Function):
    """base_output + scaling * (B A - B0 A0) x, where the second product does not train.

    Both are made as one product of twice the rank, so that they cancel before anything is rounded to the
    dtype of the output. Kept for backward: x, and both A x (N, 2 rank); the joined factors are made again.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - two factors, and two they start at
        ctx: Any,
        x: Tensor,
        base_output: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        start_A: Tensor,
        start_B: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        """As `LoraUpdate`, with A0 (rank, in) and B0 (out, rank)."""
        with no_autocast(x.device.type):
            both_A, both_B = joined(lora_A, lora_B, start_A, start_B)
            down = _down(x, both_A)
            result = _with_update(base_output, down, both_B, scaling, in_place)
        if in_place:
            ctx.mark_dirty(base_output)
        ctx.scaling, ctx.x_shape = scaling, x.shape
        kept = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, down, lora_A, lora_B, start_A, start_B)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, base_output, lora_A and lora_B."""
        x, down, lora_A, lora_B, start_A, start_B = ctx.saved_tensors
        needs_x, needs_base, needs_A, needs_B = ctx.needs_input_grad[:4]
        rank, grad_x, grad_A, grad_B = len(lora_A), None, None, None
        with no_autocast(grad.device.type):
            flat = grad.reshape(-1, len(lora_B)).to(down.dtype)
            if needs_x:
                both_A, both_B = joined(lora_A, lora_B, start_A, start_B)
                wide = (flat @ both_B.to(down.dtype)).mul_(ctx.scaling) @ both_A.to(down.dtype)
                grad_x = wide.to(grad.dtype).view(ctx.x_shape)
            if needs_A:
                grad_down = (flat @ lora_B.to(down.dtype)).mul_(ctx.scaling)
                given = x.reshape(-1, lora_A.shape[1]).to(down.dtype)
                grad_A = (grad_down.t() @ given).to(lora_A.dtype)
            if needs_B:
                grad_B = (flat.t() @ down[:, :rank]).to(lora_B.dtype).mul_(ctx.scaling)
        return grad_x, grad if needs_base else None, grad_A, grad_B, None, None, None, None


class _LoraDown(Function):
    """The half of LoraUpdate that keeps everything: x A', and a tensor that stands for (x A') B'.

    The stand-in has the shape of the update and no memory; the gradient that comes back through it is that
    of the update.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        down = _down(x, lora_A)
        ctx.scaling, ctx.x_shape = scaling, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, down, lora_A, lora_B)
        place = x.new_empty(1).expand(*x.shape[:-1], len(lora_B))
        ctx.mark_non_differentiable(down)
        return place, down

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad, *ctx.needs_input_grad[:3]), None


class _LoraUp(Function):
    """The other half: the base output with the update added; keeps nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        base_output: Tensor,
        place: Tensor,
        down: Tensor,
        lora_B: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        if in_place:
            ctx.mark_dirty(base_output)
        return _with_update(base_output, down, lora_B, scaling, in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_base, needs_update = ctx.needs_input_grad[:2]
        return grad if needs_base else None, grad if needs_update else None, None, None, None, None


def begun_update(
    x: Tensor,
    factors: Callable[[], tuple[Tensor, Tensor]],
    scaling: float,
    dropped: Callable[[Tensor], Tensor],
) -> Callable[[Tensor, BaseLayer], Tensor] | None:
    """The first half of an update s B A x; see `LoraLinear.begin`.

    Args:
        x: (..., in).
        factors: Gives A (rank, in) and B (out, rank).
        scaling: s.
        dropped: The dropout of x.
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    lora_A, lora_B = factors()
    place, down = _LoraDown.apply(dropped(x), lora_A, lora_B, scaling)

    def finish(base_output: Tensor, base: BaseLayer) -> Tensor:
        return _LoraUp.apply(base_output, place, down, lora_B.detach(), scaling, is_fresh(base_output, base))

    return finish


def is_fresh(base_output: Tensor, base: BaseLayer) -> bool:
    """Whether a base output may be written into: a view, or what a hook may have kept, must not change."""
    return base.kind == "linear" and not base_output._is_view() and not base.module._forward_hooks


def joined(lora_A: Tensor, lora_B: Tensor, start_A: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
    """[A; A0] (2 rank, in) and [B, -B0] (out, 2 rank), whose product is B A - B0 A0."""
    return torch.cat([lora_A, start_A]), torch.cat([lora_B, -start_B], 1)


def _down(x: Tensor, lora_A: Tensor) -> Tensor:
    """X A', (N, rank), in the dtype of products."""
    dtype = _product_dtype(x)
    return x.reshape(-1, lora_A.shape[1]).to(dtype) @ lora_A.to(dtype).t()


def _with_update(base_output: Tensor, down: Tensor, lora_B: Tensor, scaling: float, in_place: bool) -> Tensor:
    width = len(lora_B)
    flat = base_output.view(-1, width) if in_place else base_output.reshape(-1, width)
    result = _plus_product(flat, down, lora_B.to(down.dtype).t(), scaling, in_place)
    return base_output if in_place else result.view(base_output.shape)


def _gradients(
    ctx: Any, grad: Tensor, needs_x: bool, needs_A: bool, needs_B: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, lora_A and lora_B, from what a context keeps and the gradient of the update."""
    x, down, lora_A, lora_B = ctx.saved_tensors
    grad_x = grad_A = grad_B = None
    with no_autocast(grad.device.type):
        flat = grad.reshape(-1, lora_B.shape[0]).to(down.dtype)
        if needs_x or needs_A:
            grad_down = (flat @ lora_B.to(down.dtype)).mul_(ctx.scaling)
            if needs_x:
                grad_x = (grad_down @ lora_A.to(down.dtype)).to(grad.dtype).view(ctx.x_shape)
            if needs_A:
                wide = x.reshape(-1, lora_A.shape[1]).to(down.dtype)
                grad_A = (grad_down.t() @ wide).to(lora_A.dtype)
        if needs_B:
            grad_B = (flat.t() @ down).to(lora_B.dtype).mul_(ctx.scaling)
    return grad_x, grad_A, grad_B


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if is_wide(x.dtype, x.device.type) else x.dtype


def _plus_product(flat: Tensor, down: Tensor, up: Tensor, scaling: float, in_place: bool) -> Tensor:
    """Flat + scaling * down up; down and up may be of a wider dtype."""
    if flat.dtype == down.dtype:
        add = flat.addmm_ if in_place else flat.addmm
        return add(down, up, alpha=scaling)
    into = flat if in_place else flat.clone()
    return into.add_(down @ up, alpha=scaling)  # summed in the wider one, rounded once


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A block without autocast: the operands have one dtype already, it would split them again."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
