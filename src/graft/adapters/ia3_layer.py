"""The (IA)^3 layer: y = l (W x + bias), or y = W (l x) + bias in feed-forward modules.

Shapes: x (..., in), y (..., out), l (out, 1) or (1, in), as PEFT's files have it; over a convolution x and y
have channels in the third place from the end, and l is (1, channels, 1, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graft.models.layers import BaseLayer


class Ia3Layer(nn.Module):
    """A vector over the output or the input of a base layer.

    Args:
        shape: Of l in files; it has as many numbers as y, or x in feed-forward modules, has features.
        feedforward: Whether it multiplies the input.
    """

    additive = False

    def __init__(self, shape: tuple[int, ...], *, feedforward: bool) -> None:
        super().__init__()
        self.feedforward = feedforward
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=torch.float32))
        self._over_images = len(shape) == 4

    @property
    def num_parameters(self) -> int:
        """Numbers in l."""
        return self.ia3_l.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensor by the name that PEFT files give it."""
        return {"ia3_l": self.ia3_l}

    def adapt_input(self, x: Tensor) -> Tensor:
        """L x in feed-forward modules, else x itself.

        The product is made in the wider dtype and rounded once: in 16 bits alone l would lose its last
        digits.
        """
        return (x * self._spread()).to(x.dtype) if self.feedforward else x

    def _spread(self) -> Tensor:
        return self.ia3_l.view(-1, 1, 1) if self._over_images else self.ia3_l.view(-1)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Multiply the base output, but in feed-forward modules.

        Args:
            x: Not used.
            base_output: (..., out), of what `adapt_input` gave.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.
        """
        if self.feedforward:
            return base_output
        return (base_output * self._spread()).to(base_output.dtype)

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """The weight with its rows, or its columns in feed-forward modules, multiplied.

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        with torch.no_grad():
            numbers = self.ia3_l.to(weight.device)
            if not self._over_images:
                return weight * numbers
            if not self.feedforward:
                return weight * numbers.view(-1, 1)
            # Each group of outputs sees channels of its own.
            channels = numbers.view(base.groups, 1, -1, 1)
            parts = weight.view(base.groups, -1, channels.shape[2], math.prod(base.kernel))
            return (parts * channels).view_as(weight)

    def merged_bias(self, base: BaseLayer, bias: Tensor | None) -> Tensor | None:
        """The bias, which is multiplied with the output.

        Args:
            base: The layer below.
            bias: Its bias (out,), or None; not changed.
        """
        with torch.no_grad():
            return bias if self.feedforward or bias is None else bias * self.ia3_l.view(-1)

    def idle(self, base: BaseLayer) -> bool:
        """Whether all of l is one."""
        return bool((self.ia3_l == 1).all())
