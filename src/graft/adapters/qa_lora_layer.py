"""The QA-LoRA layer: y = W x + scaling * B A (sums of groups of x).

Shapes: x (..., in), y (..., out), lora_A (rank, groups), lora_B (out, rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.lora_update import LoraUpdate, begun_update, is_fresh
from graft.models.layers import BaseLayer

if TYPE_CHECKING:
    from graft.adapters.qa_lora import QaLoraConfig


class QaLoraLayer(nn.Module):
    """The update of a linear layer, dense or quantized, in either layout.

    What is kept for the backward pass are the sums, in / group_size numbers of a token in place of x.

    Args:
        in_features: Length of x.
        out_features: Length of y.
        groups: How many groups x is cut into.
        config: The settings of the layer.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, config: QaLoraConfig) -> None:
        super().__init__()
        self.scaling, self.dropout = config.scaling, config.dropout
        self.in_features, self.groups = in_features, groups
        self.lora_A = nn.Parameter(torch.zeros(config.rank, groups, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, dtype=torch.float32))

    def fill(self, init: str, generator: torch.Generator) -> None:
        """Give lora_A the first values that LoRA's has; lora_B stays zero."""
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            if init == "gaussian":
                self.lora_A.normal_(std=1 / len(self.lora_A), generator=generator)
            else:
                self.lora_A.uniform_(-bound, bound, generator=generator)

    @property
    def num_parameters(self) -> int:
        """Numbers in lora_A and lora_B."""
        return self.lora_A.numel() + self.lora_B.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names of LoRA's."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """A with a column for every input (rank, in), and B (out, rank)."""
        wide = self.lora_A.detach().repeat_interleave(self.in_features // self.groups, dim=1)
        return wide, self.lora_B.detach()

    def block_update(self, block: int) -> Tensor | None:
        """What is added to all weights of each block, (out, in / block), fp32; None where they differ within.

        Args:
            block: Inputs in a block.
        """
        size = self.in_features // self.groups
        if size % block:
            return None
        with torch.no_grad():
            update = (self.lora_B @ self.lora_A) * self.scaling
            return update.repeat_interleave(size // block, dim=1)

    def _sums(self, x: Tensor) -> Tensor:
        dropped = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        return dropped.unflatten(-1, (self.groups, -1)).sum(-1)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: (..., in), the input of the base layer.
            base_output: (..., out); it may be overwritten with the result.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.
        """
        if torch.compiler.is_compiling():
            return self.reference_forward(x, base_output, base)
        sums, fresh = self._sums(x.to(base_output.dtype)), is_fresh(base_output, base)
        update: Tensor = LoraUpdate.apply(sums, base_output, self.lora_A, self.lora_B, self.scaling, fresh)
        return update

    def begin(self, x: Tensor) -> Callable[[Tensor, BaseLayer], Tensor] | None:
        """Do what needs no base output; see `LoraLinear.begin`."""
        return begun_update(x, lambda: (self.lora_A, self.lora_B), self.scaling, self._sums)

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations."""
        sums = self._sums(x.to(base_output.dtype))
        down = functional.linear(sums, self.lora_A.to(sums.dtype))
        return base_output + functional.linear(down, self.lora_B.to(sums.dtype)) * self.scaling

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * B A, the same within each group.

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        down, up = (factor.to(weight.device) for factor in self.plain_factors())
        return torch.addmm(weight, up, down, alpha=self.scaling)
