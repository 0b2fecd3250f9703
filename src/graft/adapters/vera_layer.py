"""The VeRA layer: y = W x + diag(b) B diag(d) A x, and the pair A, B that all layers share.

Shapes: x (..., in), y (..., out), b (out,), d (rank,), A (rank, at least in), B (at least out, rank).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.lora_update import LoraUpdate, is_fresh
from graft.models.layers import BaseLayer


class Projection(nn.Module):
    """The pair A, B: Kaiming-uniform, within sqrt(6 / columns), from a generator of their own on the CPU.

    Kept as buffers that no state_dict has: they follow from the seed, and adapter files hold them.

    Args:
        shape_A: (rank, widest).
        shape_B: (highest, rank).
        seed: Of the generator; A is drawn first, which is PEFT's order.
    """

    vera_A: Tensor  # noqa: N815 - the tensor's name
    vera_B: Tensor  # noqa: N815

    def __init__(self, shape_A: tuple[int, ...], shape_B: tuple[int, ...], *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("vera_A", shape_A), ("vera_B", shape_B)):
            # In this order of roundings the bound has the bits that torch's own initializer has.
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            drawn = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=False)


class VeraLayer(nn.Module):
    """The two vectors of a layer; `share` gives it the pair.

    Args:
        in_features: Length of x.
        out_features: Length of y.
        rank: Rows of A.
        dropout: Share of x set to zero in training, for the update only.
        d_initial: First value of all of d.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, dropout: float, d_initial: float
    ) -> None:
        super().__init__()
        self.in_features, self.dropout = in_features, dropout
        self.vera_lambda_b = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), d_initial, dtype=torch.float32))

    def share(self, shared: Projection) -> None:
        """Take the pair that all layers of the adapter use."""
        self.shared = shared

    @property
    def num_parameters(self) -> int:
        """Numbers in b and d."""
        return self.vera_lambda_b.numel() + self.vera_lambda_d.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in), and diag(b) B diag(d) (out, rank)."""
        b = self.vera_lambda_b[:, None]
        return self.shared.vera_A[:, : self.in_features], b * self.shared.vera_B[
            : len(b)
        ] * self.vera_lambda_d

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """(rank, in) and (out, rank), whose product is the update."""
        return self._factors()

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        A x, rank numbers of a token, is kept for the backward pass, x is not.

        Args:
            x: (..., in), the input of the base layer.
            base_output: (..., out); it may be overwritten with the result.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.
        """
        if torch.compiler.is_compiling():
            return self.reference_forward(x, base_output, base)
        x = x.to(base_output.dtype)
        if self.training and self.dropout:
            x = functional.dropout(x, self.dropout)
        down, up = self._factors()
        update: Tensor = LoraUpdate.apply(x, base_output, down, up, 1.0, is_fresh(base_output, base))
        return update

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations, as the equation is written."""
        dtype = base_output.dtype
        x = x.to(dtype)
        if self.training and self.dropout:
            x = functional.dropout(x, self.dropout)
        shared, width = self.shared, len(self.vera_lambda_b)
        down = functional.linear(x, shared.vera_A[:, : self.in_features].to(dtype)) * self.vera_lambda_d
        up = functional.linear(down, shared.vera_B[:width].to(down.dtype)) * self.vera_lambda_b
        return base_output + up.to(dtype)

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + diag(b) B diag(d) A.

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        with torch.no_grad():
            down, up = (factor.to(weight.device) for factor in self._factors())
            return torch.addmm(weight, up, down)

    def idle(self, base: BaseLayer) -> bool:
        """Whether b or d is zero."""
        return not (bool(self.vera_lambda_b.any()) and bool(self.vera_lambda_d.any()))
