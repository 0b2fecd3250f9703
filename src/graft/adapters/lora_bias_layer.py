"""LoRA over a linear whose bias trains too, or whose lora_B has one: y = W x + b' + scaling * (B A x + b_B).

Shapes: x (..., in), y (..., out), b' and b_B (out,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graft.adapters.lora_layer import LoraLinear
from graft.models.layers import BaseLayer


class LoraBiasLinear(LoraLinear):
    """The update of a linear layer with a bias of lora_B.

    Args:
        in_features: Length of x.
        out_features: Length of y.
        rank: Rows of lora_A.
        scaling: Factor on B A and on the bias of lora_B.
        dropout: Share of x set to zero in training, for the update only.
        lora_bias: Whether lora_B has a bias.
        base_bias: What a bias in the place of the base's starts at; None leaves the base's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        *,
        lora_bias: bool,
        base_bias: Tensor | None,
    ) -> None:
        super().__init__(in_features, out_features, rank, scaling, dropout)
        zeros = torch.zeros(out_features, dtype=torch.float32) if lora_bias else None
        self.lora_B_bias = None if zeros is None else nn.Parameter(zeros)  # noqa: N815 - the tensor's name
        self.bias = None if base_bias is None else nn.Parameter(_started(base_bias))

    @property
    def num_parameters(self) -> int:
        """Numbers in lora_A, lora_B and the biases that train."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        found = super().tensors()
        if self.lora_B_bias is not None:
            found["lora_B.bias"] = self.lora_B_bias
        if self.bias is not None:
            found["base_layer.bias"] = self.bias
        return found

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank)."""
        return self.lora_A.detach(), self.lora_B.detach()

    def _shift(self, base: BaseLayer) -> Tensor:
        """What is added to every output, (out,), fp32: zero at the start."""
        parts = [] if self.lora_B_bias is None else [self.lora_B_bias * self.scaling]
        if self.bias is not None and base.bias is not None:
            parts.append(self.bias - base.bias.detach().to(self.bias.dtype))
        return torch.stack(parts).sum(0)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update and the change of the bias to the base output; as `LoraLinear.forward`."""
        return super().forward(x, base_output, base) + self._shift(base).to(base_output.dtype)

    def begin(self, x: Tensor) -> Callable[[Tensor, BaseLayer], Tensor] | None:
        """Do what needs no base output; see `LoraLinear.begin`."""
        start = super().begin(x)
        if start is None:
            return None

        def finish(base_output: Tensor, base: BaseLayer) -> Tensor:
            return start(base_output, base) + self._shift(base).to(base_output.dtype)

        return finish

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations."""
        return super().reference_forward(x, base_output, base) + self._shift(base).to(base_output.dtype)

    def merged_bias(self, base: BaseLayer, bias: Tensor | None) -> Tensor | None:
        """The bias of a plain layer that does the same; None where there is none on either side.

        Args:
            base: The layer below.
            bias: Its bias (out,), or None; not changed.
        """
        if bias is None and self.lora_B_bias is None:
            return None
        with torch.no_grad():
            shift = self._shift(base)
            return shift if bias is None else bias.float() + shift.to(bias.device)

    def idle(self, base: BaseLayer) -> bool:
        """Whether the update is zero and the bias is the base's."""
        acts = bool(self.lora_A.any()) and bool(self.lora_B.any())
        return not acts and not bool(self._shift(base).any())


def _started(bias: Tensor) -> Tensor:
    if bias.is_meta:  # it is filled from a file
        return torch.zeros(bias.shape)
    return bias.detach().float().cpu().clone()


class LoraBaseBiasLinear(LoraBiasLinear):
    """The same with a bias in the place of the base's: what it changes depends on that one."""

    additive = False
