"""The LoHa layer: y = W x + scaling * ((A1 B1) o (A2 B2)) x.

Shapes: x (..., in), y (..., out), A1 and A2 (out, rank), B1 and B2 (rank, in); N is the number of rows of x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.adapters.lora_update import LoraUpdate, is_fresh
from graft.adapters.spectrum import product_values
from graft.models.layers import BaseLayer


class LohaLayer(nn.Module):
    """The product of two low-rank matrices, number by number, as the update of a linear layer.

    That product is one of low rank itself: its factors are the products of each column of A1 with each of A2,
    and of each row of B1 with each of B2, rank^2 of them. Where these are fewer than what a dense update
    would cost, the update goes through them and is never made.

    Args:
        in_features: Length of x.
        out_features: Length of y.
        rank: Of each matrix.
        scaling: Factor on the update.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.hada_w1_a = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.hada_w2_a = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.hada_w2_b = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))

    def fill(self, generator: torch.Generator) -> None:
        """Give first values, as LyCORIS: B1, B2 standard normal, A1 normal with deviation 0.1, A2 zero.

        Args:
            generator: Where they come from.
        """
        with torch.no_grad():
            self.hada_w1_b.normal_(std=1.0, generator=generator)
            self.hada_w1_a.normal_(std=0.1, generator=generator)
            self.hada_w2_b.normal_(std=1.0, generator=generator)
            self.hada_w2_a.zero_()

    @property
    def num_parameters(self) -> int:
        """Numbers in all four."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {
            "hada_w1_a": self.hada_w1_a,
            "hada_w1_b": self.hada_w1_b,
            "hada_w2_a": self.hada_w2_a,
            "hada_w2_b": self.hada_w2_b,
        }

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(rank^2, in) and (out, rank^2), whose product is the update but for the scaling."""
        down = (self.hada_w1_b[:, None] * self.hada_w2_b).flatten(0, 1)
        return down, (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """(rank^2, in) and (out, rank^2), whose product is the update."""
        down, up = self._factors()
        return down, up * self.scaling

    def _dense(self) -> Tensor:
        """The update (out, in)."""
        return (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b) * self.scaling

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: (..., in), the input of the base layer.
            base_output: (..., out); it may be overwritten with the result.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.

        Cost: N (in + out) rank^2, or N in out where that is less or the base a convolution: a base pass.
        """
        sides = base.in_features + base.out_features
        few = self.hada_w1_b.shape[0] ** 2 * sides < base.in_features * base.out_features
        if base.kind == "conv2d" or not few or torch.compiler.is_compiling():
            return self.reference_forward(x, base_output, base)
        down, up = self._factors()
        fresh = is_fresh(base_output, base)
        update: Tensor = LoraUpdate.apply(x.to(base_output.dtype), base_output, down, up, self.scaling, fresh)
        return update

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same through the dense update."""
        dtype = base_output.dtype
        return base_output + base.apply(x.to(dtype), self._dense().to(dtype))

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * (A1 B1) o (A2 B2).

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        with torch.no_grad():
            return weight + self._dense().to(weight.device)

    def update_values(self) -> Tensor:
        """Singular values of the update, falling, float64; through its factors where that is less work."""
        with torch.no_grad():
            down, up = self._factors()
            if len(down) < min(down.shape[1], len(up)):
                return product_values(down, up) * abs(self.scaling)
            return torch.linalg.svdvals(self._dense().double())

    def idle(self, base: BaseLayer) -> bool:
        """Whether one of the four is zero."""
        return not all(bool(tensor.any()) for tensor in self.tensors().values())
