"""The LoRA layers: y = W x + scaling * B A x over a frozen linear, and the same over an embedding.

Where both factors start at values of their own, B0 and A0, the update is scaling * (B A - B0 A0): the base
stays what it is, and the first output is its own.

Shapes: x (..., in), y (..., out), lora_A (rank, in), lora_B (out, rank); N is the number of rows of x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graft.kernels.wide import is_wide
from graft.models.layers import BaseLayer


class LoraLinear(nn.Module):
    """The update of a linear layer, dense or quantized, in either layout.

    Args:
        in_features: Length of x.
        out_features: Length of y.
        rank: Rows of lora_A.
        scaling: Factor on B A.
        dropout: Share of x set to zero in training, for the update only.
    """

    trains_A = True  # noqa: N815 - the tensor's name
    """Whether lora_A trains; LoRA-FA leaves it as it was drawn."""

    start_A: Tensor | None  # noqa: N815 - beside lora_A
    """A0 (rank, in), where the update is measured from a start that is not zero."""
    start_B: Tensor | None  # noqa: N815 - beside lora_B
    """B0 (out, rank), with it."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @property
    def num_parameters(self) -> int:
        """Numbers that train: in lora_B and, where it does, lora_A."""
        return self.lora_B.numel() + (self.lora_A.numel() if self.trains_A else 0)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def begin_at(self, lora_A: Tensor, lora_B: Tensor, *, subtract: bool) -> None:
        """Give the factors their first values.

        Args:
            lora_A: (rank, in).
            lora_B: (out, rank).
            subtract: Whether the update is measured from them, so that it starts at zero.
        """
        with torch.no_grad():
            self.lora_A.copy_(lora_A)
            self.lora_B.copy_(lora_B)
            if subtract:
                self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def start(self) -> dict[str, Tensor]:
        """What the update is measured from, by name; empty where that is zero. It never trains."""
        if self.start_A is None or self.start_B is None:
            return {}
        return {"start_A": self.start_A, "start_B": self.start_B}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors whose product is the update but for the scaling: A and B, or [A; A0] and [B, -B0]."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return _joined(self.lora_A, self.lora_B, self.start_A, self.start_B)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: (..., in), the input of the base layer.
            base_output: (..., out); it may be overwritten with the result.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.
        """
        if torch.compiler.is_compiling():  # which decides by itself what is fused and what is kept
            return self.reference_forward(x, base_output, base)
        if x.dtype != base_output.dtype:
            x = x.to(base_output.dtype)
        fresh = is_fresh(base_output, base)
        x = self._dropped(x)
        pair = self.lora_A, self.lora_B
        if self.start_A is not None:
            update: Tensor = StartedUpdate.apply(
                x, base_output, *pair, self.start_A, self.start_B, self.scaling, fresh
            )
        else:
            update = LoraUpdate.apply(x, base_output, *pair, self.scaling, fresh)
        return update

    def begin(self, x: Tensor) -> Callable[[Tensor, BaseLayer], Tensor] | None:
        """Do what needs no base output, so that all that is kept for the backward pass is kept by then.

        A recomputation that stops once it has everything then leaves the base product out.

        Args:
            x: As for `forward`.

        Returns:
            The rest of `forward`, as a function of base_output and base; None where it must be done in one.
        """
        if self.start_A is not None:
            return None
        return begun_update(x, lambda: (self.lora_A, self.lora_B), self.scaling, self._dropped)

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations: what `forward` is tested against."""
        x = self._dropped(x.to(base_output.dtype))
        lora_A, lora_B = self.factors
        down = functional.linear(x, lora_A.to(x.dtype))
        return base_output + functional.linear(down, lora_B.to(x.dtype)) * self.scaling

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * B A, or W + scaling * (B A - B0 A0).

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        return _folded(weight, *self.factors, self.scaling)


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
            both_A, both_B = _joined(lora_A, lora_B, start_A, start_B)
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
                both_A, both_B = _joined(lora_A, lora_B, start_A, start_B)
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


def _joined(lora_A: Tensor, lora_B: Tensor, start_A: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
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


class LoraEmbedding(nn.Module):
    """The update of an embedding: row t changes by scaling * B A[:, t].

    Args:
        in_features: Number of rows (tokens).
        out_features: Dimension of a row.
        rank: Rows of lora_embedding_A.
        scaling: Factor on B A.
        dropout: Not used: there is no input vector to drop from.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32))
        self.lora_embedding_B = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32))

    @property
    def num_parameters(self) -> int:
        """Numbers in lora_embedding_A and lora_embedding_B."""
        return self.lora_embedding_A.numel() + self.lora_embedding_B.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: Token ids, any shape.
            base_output: x.shape + (out,), with the scale that Gemma gives its embeddings already in it.
            base: The layer below.
        """
        padding: int | None = getattr(base.module, "padding_idx", None)
        down = functional.embedding(x, self.lora_embedding_A.t(), padding)
        up = functional.linear(down, self.lora_embedding_B) * (self.scaling * base.output_scale)
        return base_output + up.to(base_output.dtype)

    reference_forward = forward

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * B A, where W is (out, in) = (dimension, tokens), fp32; not changed."""
        return _folded(weight, self.lora_embedding_A, self.lora_embedding_B, self.scaling)


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if is_wide(x.dtype, x.device.type) else x.dtype


def _plus_product(flat: Tensor, down: Tensor, up: Tensor, scaling: float, in_place: bool) -> Tensor:
    """Flat + scaling * down up; down and up may be of a wider dtype."""
    if flat.dtype == down.dtype:
        add = flat.addmm_ if in_place else flat.addmm
        return add(down, up, alpha=scaling)
    into = flat if in_place else flat.clone()
    return into.add_(down @ up, alpha=scaling)  # summed in the wider one, rounded once


def _folded(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    with torch.no_grad():
        return torch.addmm(weight, up.to(weight.device), down.to(weight.device), alpha=scaling)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A block without autocast: the operands have one dtype already, it would split them again."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
