"""The OFT layer: y = W R' x with R block-diagonal, each block (I - Q)(I + Q)^-1 or a series in Q.

Shapes: x (..., in), y (..., out), Q and R (blocks, size, size); of Q the numbers above the diagonal are
stored, row by row. As x is a row here, it becomes x R.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.models.layers import BaseLayer


class OftLayer(nn.Module):
    """A rotation of what goes into a base layer.

    Args:
        num_blocks: Blocks of R.
        num_numbers: Numbers above the diagonal of one block.
        in_features: Length of x.
        order: Highest power in (I + Q)(I + Q + ... + Q^order), which R is then.
    """

    additive = False

    def __init__(self, num_blocks: int, num_numbers: int, in_features: int, order: int | None = None) -> None:
        super().__init__()
        self.order = order
        self.size = in_features // num_blocks
        self.oft_R = nn.Parameter(torch.zeros(num_blocks, num_numbers, dtype=torch.float32))

    @property
    def num_parameters(self) -> int:
        """Numbers above the diagonals of all blocks."""
        return self.oft_R.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensor by the name that PEFT files give it."""
        return {"oft_R.weight": self.oft_R}

    def _turn(self) -> Tensor:
        """R - I = -2 Q (I + Q)^-1, or 2 Q + ... + 2 Q^n + Q^(n + 1): small, so that 16 bits keep its digits.

        Returns:
            (blocks, size, size).
        """
        numbers = self.oft_R
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=numbers.device)
        upper = numbers.new_zeros(len(numbers), self.size, self.size).index_put(
            (torch.arange(len(numbers), device=numbers.device)[:, None], rows, columns), numbers
        )
        skew = upper - upper.mT
        if self.order is not None:
            power, total = skew, 2 * skew
            for _ in range(2, self.order + 1):
                power = power @ skew
                total = total + 2 * power
            return total + power @ skew
        # Q and (I + Q)^-1 commute, so the order in which they are multiplied does not matter.
        return torch.linalg.solve(
            torch.eye(self.size, device=skew.device, dtype=skew.dtype) + skew, -2 * skew
        )

    def adapt_input(self, x: Tensor) -> Tensor:
        """X R, (..., in)."""
        blocks = x.unflatten(-1, (-1, self.size))
        with torch.autocast(x.device.type, enabled=False):
            turned = torch.einsum("...bi,bij->...bj", blocks, self._turn().to(x.dtype))
        return (blocks + turned).flatten(-2)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The base output of what `adapt_input` gave, as it is.

        Args:
            x: Not used.
            base_output: (..., out).
            base: The layer below.
        """
        return base_output

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W R'.

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        with torch.no_grad():
            blocks = weight.unflatten(-1, (-1, self.size))
            turned = torch.einsum("obj,bij->obi", blocks, self._turn().to(weight.device))
            return (blocks + turned).flatten(-2)

    def idle(self, base: BaseLayer) -> bool:
        """Whether all of Q is zero."""
        return not bool(self.oft_R.any())
