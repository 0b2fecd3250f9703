"""The DoRA layer: y = (m / n) (W x + scaling * B A x) + bias over any base layer.

Shapes: x (..., in), y (..., out), magnitude m (out,), norms n (out,) of the rows of W + scaling * B A.

Of the norms only n^2 = ||W||^2 + 2 scaling <W A', B> + scaling^2 B (A A') B' is ever made, row by row: a
product of W with the few rows of A and one of rank by rank, but neither B A nor a dense sum. The first
term changes with the base only and is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graft.adapters.conv_layer import LoraConv
from graft.adapters.lora_layer import LoraEmbedding, LoraLinear
from graft.adapters.lora_update import no_autocast
from graft.models.layers import BaseLayer


class DoraLayer(nn.Module):
    """A low-rank update of the directions of a base layer's rows, and a magnitude for each row.

    In training the output is kept for the backward pass, from which the gradient of the magnitudes is made;
    it must not be written into afterwards.

    Args:
        update: The low-rank update; its own dropout is off from now on.
        base: The layer below; the magnitudes start as the norms of its rows.
        dropout: Share of x set to zero in training, for all that differs from W x; embeddings have none.
    """

    additive = False

    squares: Tensor
    """||W||^2 of each row, (out,)."""

    def __init__(
        self, update: LoraLinear | LoraEmbedding | LoraConv, base: BaseLayer, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.update = update
        self.dropout = 0.0 if isinstance(update, LoraEmbedding) else dropout
        update.dropout = 0.0
        squares = row_squares(base, torch.float32)
        self.register_buffer("squares", squares, persistent=False)
        norms = squares.sqrt()
        self.magnitude = nn.Parameter(norms[None, :, None, None] if base.kind == "conv2d" else norms)
        self._of_weight = _place(base)
        self._known: tuple[Any, Tensor] | None = None

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.update.scaling

    @scaling.setter
    def scaling(self, scaling: float) -> None:
        self.update.scaling = scaling

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """lora_A (rank, in) and lora_B (out, rank), those of a convolution as matrices."""
        down, up = self.update.tensors().values()
        return down.flatten(1), up.flatten(1)

    @property
    def lora_A(self) -> Tensor:  # noqa: N802 - the tensor's name
        """The first factor, (rank, in)."""
        return self.factors[0]

    @property
    def num_parameters(self) -> int:
        """Numbers in both factors and the magnitudes."""
        return self.update.num_parameters + self.magnitude.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {**self.update.tensors(), "lora_magnitude_vector": self.magnitude}

    def begin_at(self, lora_A: Tensor, lora_B: Tensor, *, subtract: bool) -> None:  # noqa: N803 - as they are
        """Give the factors their first values, whose product is zero; the magnitudes stay."""
        assert isinstance(self.update, LoraLinear)
        assert not subtract, "DoRA measures its update from zero"
        self.update.begin_at(lora_A, lora_B, subtract=False)

    def train(self, mode: bool = True) -> DoraLayer:
        """As for every module; norms that were kept for evaluation are let go."""
        self._known = None
        super().train(mode)
        return self

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Change directions and magnitudes of the base output.

        Args:
            x: (..., in), the input of the base layer; token ids for an embedding.
            base_output: (..., out); it may be overwritten with the result.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.

        Cost: beside the low-rank update, a product of W with rank rows and two passes over the output; with
        dropout a second base pass.
        """
        if torch.compiler.is_compiling() or (self.training and self.dropout) or base.kind == "conv2d":
            return self._formula(x, base_output, base, self.norms(base))
        norms = self._norms(base)
        updated = self.update(x, base_output, base)
        result: Tensor = Rescale.apply(updated, self.magnitude, norms, base.bias)
        return result

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations, with norms of the dense sum."""
        down, up = (factor.detach() for factor in self.factors)
        dense = base.dense_weight(down.dtype) + self.scaling * (up @ down)
        return self._formula(x, base_output, base, torch.linalg.vector_norm(dense, dim=1))

    def _formula(self, x: Tensor, base_output: Tensor, base: BaseLayer, norms: Tensor) -> Tensor:
        scale = base.spread(_scale(self.magnitude.flatten(), norms))
        bias = None if base.bias is None else base.spread(base.bias)
        if not (self.training and self.dropout):
            updated = self.update.reference_forward(x, base_output, base)
            return _rescaled(updated, scale, bias).to(base_output.dtype)
        dropped = functional.dropout(x, self.dropout)
        below = base.module(dropped)
        updated = self.update.reference_forward(dropped, below, base)
        return (base_output + _rescaled(updated, scale, bias) - below).to(base_output.dtype)

    def norms(self, base: BaseLayer) -> Tensor:
        """Norms of the rows of W + scaling * B A, (out,), without gradient.

        Args:
            base: The layer below.
        """
        # Inference tensors could not be used in a backward pass later.
        with torch.inference_mode(False), torch.no_grad(), no_autocast(base.device.type):
            down, up = (factor.detach() for factor in self.factors)
            if not torch.compiler.is_compiling() and self._of_weight != (place := _place(base)):
                self.squares, self._of_weight = row_squares(base, down.dtype), place
            crossed = base.product(down).t()
            gram = down @ down.t()
            squares = self.squares + (2 * self.scaling) * (up * crossed).sum(1)
            squares += self.scaling**2 * ((up @ gram) * up).sum(1)
            return squares.clamp_(min=0).sqrt_()

    def _norms(self, base: BaseLayer) -> Tensor:
        """The norms; those of the last call where no gradient is asked for and nothing has changed."""
        if torch.is_grad_enabled():
            self._known = None
            return self.norms(base)
        key = (self.scaling, _place(base), *((f.data_ptr(), _version(f)) for f in self.factors))
        if self._known is None or self._known[0] != key:
            self._known = key, self.norms(base)
        return self._known[1]

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """M (W + scaling * B A) / ||W + scaling * B A||.

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        with torch.no_grad():
            dense = self.update.merged_weight(base, weight)
            norms = torch.linalg.vector_norm(dense, dim=1)
            return dense.mul_(_scale(self.magnitude.flatten().to(dense.device), norms)[:, None])

    def idle(self, base: BaseLayer) -> bool:
        """Whether an update of zero meets magnitudes that are the norms of the rows."""
        if all(bool(factor.any()) for factor in self.factors):
            return False
        norms = row_squares(base, self.magnitude.dtype).sqrt()
        return torch.allclose(self.magnitude.detach().flatten(), norms, rtol=1e-5, atol=0)


class Rescale(Function):
    """(m / n) (v - bias) + bias for v (..., out), written over v where that may be, with n as a constant.

    Kept for backward: the result y. The gradient of m is the sum of (y - bias) / m times that of y, over all
    rows; a row whose m is exactly zero, as that of a zero row of W, has none.
    """

    @staticmethod
    def forward(ctx: Any, updated: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
        """One dtype in updated (..., out); magnitude and norms (out,) in float32."""
        in_place = not updated._is_view()
        if in_place:
            ctx.mark_dirty(updated)
        change = _scale(magnitude, norms) - 1
        result = _scaled(updated, change, out=updated if in_place else torch.empty_like(updated))
        if bias is not None:
            result.sub_((change * bias).to(result.dtype))
        ctx.save_for_backward(result, magnitude, norms, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to updated, magnitude and, should it train, bias."""
        result, magnitude, norms, bias = ctx.saved_tensors
        grad_updated = grad_magnitude = None
        if ctx.needs_input_grad[0]:
            grad_updated = _scaled(grad, _scale(magnitude, norms) - 1, out=torch.empty_like(grad))
        if ctx.needs_input_grad[1]:
            width, dtype = len(magnitude), magnitude.dtype
            flat = grad.reshape(-1, width)
            sums = (flat * result.reshape(-1, width)).sum(0, dtype=dtype)
            if bias is not None:
                sums -= flat.sum(0, dtype=dtype) * bias
            grad_magnitude = torch.where(magnitude == 0, 0, sums / magnitude)
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[3]:  # the base layer's own share of it comes on top
            grad_bias = (grad * (1 - _scale(magnitude, norms))).reshape(-1, len(bias)).sum(0).to(bias.dtype)
        return grad_updated, grad_magnitude, None, grad_bias


def row_squares(base: BaseLayer, dtype: torch.dtype) -> Tensor:
    """Sums of the squares of each row of the weight that a base layer computes with, (out,).

    Args:
        base: The layer.
        dtype: Of the result.

    Cost: one read of the weight; a quantized one is decoded once.
    """
    if base.device.type == "meta":  # only shapes are asked for
        return torch.zeros(base.out_features, dtype=dtype)
    with torch.inference_mode(False), torch.no_grad():
        norms = torch.linalg.vector_norm(base.dense_weight(None), dim=1, dtype=dtype)
        return norms.square_()


def _rescaled(updated: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return scale * updated if bias is None else scale * updated + (1 - scale) * bias


def _scale(magnitude: Tensor, norms: Tensor) -> Tensor:
    # A row of zeros without an update has neither norm nor magnitude and stays a row of zeros.
    return magnitude / torch.where(norms > 0, norms, torch.inf)


def _scaled(x: Tensor, change: Tensor, *, out: Tensor) -> Tensor:
    """X times 1 + change, all in the dtype of x, which is fast; 16 bits keep the digits of a small change."""
    return torch.addcmul(x, x, change.to(x.dtype), out=out)


def _place(base: BaseLayer) -> tuple[Any, ...]:
    """Where the stored weight lies and how often it was written: another value, another weight."""
    held: Any = base.module
    stored = getattr(held, "codes", None)
    weight: Tensor = stored if isinstance(stored, Tensor) else next(held.parameters())
    return (weight.data_ptr(), _version(weight), str(weight.device), weight.dtype)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
