"""The LoRA layer of a convolution: y = W * x + scaling * B * (A * x), with * a convolution.

A (rank, in, height, width) has the kernel of the layer, with its stride, padding and dilation; B (out, rank,
1, 1) mixes channels alone. Seen as matrices (out, in height width) the update is scaling * B A, as for a
linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.models.layers import BaseLayer


class LoraConv(nn.Module):
    """The update of a 2-d convolution without groups.

    Args:
        in_channels: Of x.
        kernel: Height and width of the layer's kernel.
        out_channels: Of y.
        rank: Channels between A and B.
        scaling: Factor on the update.
        dropout: Share of x set to zero in training, for the update only.
    """

    trains_A = True  # noqa: N815 - the tensor's name
    """Whether lora_A trains; LoRA-FA leaves it as it was drawn."""

    def __init__(
        self,
        in_channels: int,
        kernel: tuple[int, ...],
        out_channels: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, in_channels, *kernel, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_channels, rank, 1, 1, dtype=torch.float32))

    @property
    def num_parameters(self) -> int:
        """Numbers that train: in lora_B and, where it does, lora_A."""
        return self.lora_B.numel() + (self.lora_A.numel() if self.trains_A else 0)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: (batch, in, height, width), or one image without batch.
            base_output: (batch, out, height', width').
            base: The layer below.

        Returns:
            A new tensor of the shape and dtype of base_output.
        """
        x = x.to(base_output.dtype)
        if self.training and self.dropout:
            x = functional.dropout(x, self.dropout)
        down = base.apply(x, self.lora_A.flatten(1).to(x.dtype))
        return base_output + functional.conv2d(down, self.lora_B.to(x.dtype)) * self.scaling

    reference_forward = forward

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * B A.

        Args:
            base: The layer below.
            weight: Its weight as a matrix (out, in height width), fp32; not changed.
        """
        with torch.no_grad():
            down, up = (factor.flatten(1).to(weight.device) for factor in (self.lora_A, self.lora_B))
            return torch.addmm(weight, up, down, alpha=self.scaling)
