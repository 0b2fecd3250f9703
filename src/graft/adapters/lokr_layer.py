"""The LoKr layer: y = W x + scaling * kron(W1, W2) x.

Shapes: x (..., in), y (..., out), W1 (l, m), W2 (k, n), with out = l k and in = m n. Of an x seen as (m, n)
the update is W1 x W2', so that the (out, in) product is made for a merge only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graft.models.layers import BaseLayer


class LokrLayer(nn.Module):
    """The Kronecker product of two matrices, each dense or a product of two factors.

    Args:
        shapes: Of the tensors by name: lokr_w1 or lokr_w1_a and lokr_w1_b, the same for lokr_w2.
        scaling: Factor on the update.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))

    def fill(self, generator: torch.Generator) -> None:
        """Give first values: the last of W2's tensors is zero, the others uniform within 1/sqrt(columns).

        Args:
            generator: Where they come from.
        """
        with torch.no_grad():
            for name in self._names[:-1]:
                tensor = self.tensors()[name]
                bound = 1 / math.sqrt(tensor[0].numel())
                tensor.uniform_(-bound, bound, generator=generator)
            self.tensors()[self._names[-1]].zero_()

    @property
    def num_parameters(self) -> int:
        """Numbers in all of them."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {name: getattr(self, name) for name in self._names}

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """W1 (l, m) and W2 (k, n), where n is times the kernel for a convolution."""
        found = self.tensors()
        made = [
            found[name].flatten(1) if name in found else found[f"{name}_a"] @ found[f"{name}_b"]
            for name in ("lokr_w1", "lokr_w2")
        ]
        return made[0], made[1]

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: (..., in), the input of the base layer.
            base_output: (..., out).
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.

        Cost: for each row of x m n k + m k l, beside in out of the base; over a convolution a base pass.
        """
        dtype = base_output.dtype
        if base.kind == "conv2d":
            dense = torch.kron(*self._matrices()).to(dtype)
            return torch.add(base_output, base.apply(x.to(dtype), dense), alpha=self.scaling)
        small, large = (matrix.to(dtype) for matrix in self._matrices())
        # Two products of plain matrices: those of more dimensions are divided up otherwise, and so rounded
        # otherwise, where the matrices train than where they do not.
        inner = (x.to(dtype).reshape(-1, large.shape[1]) @ large.t()).view(-1, small.shape[1], len(large))
        update = (inner.mT.reshape(-1, small.shape[1]) @ small.t()).view(-1, len(large), len(small)).mT
        return torch.add(base_output, update.reshape(base_output.shape), alpha=self.scaling)

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * kron(W1, W2).

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        with torch.no_grad():
            return weight + self.scaling * torch.kron(*self._matrices()).to(weight.device)

    def update_values(self) -> Tensor:
        """Singular values of the update, falling, float64: the products of those of W1 with those of W2."""
        with torch.no_grad():
            first, second = (torch.linalg.svdvals(matrix.double()) for matrix in self._matrices())
            return torch.outer(first, second).flatten().sort(descending=True).values * abs(self.scaling)

    def idle(self, base: BaseLayer) -> bool:
        """Whether one of the tensors is zero."""
        return not all(bool(tensor.any()) for tensor in self.tensors().values())
