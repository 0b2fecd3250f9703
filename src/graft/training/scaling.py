"""Loss scaling for float16: gradients are made larger by a power of two, so that small ones do not vanish.

After Micikevicius et al., "Mixed Precision Training" (arXiv:1710.03740), section 3.2: the factor is halved
when a gradient overflows, and doubled again after many steps without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

START, FLOOR, CEILING = 2.0**16, 1.0, 2.0**24
"""float16 ends at 65504 and its smallest number is 2**-24."""

PATIENCE = 2000
"""Applied steps in a row after which a larger factor is tried."""


@dataclass
class LossScale:
    """The factor, and how long it has held; part of a run's position.

    Attributes:
        factor: On the loss, and so on every gradient until it is divided out.
        num_good: Steps applied since it last changed.
    """

    factor: float = START
    num_good: int = 0

    def after(self, loss: float, *, applied: bool) -> str | None:
        """Move the factor after a step.

        Args:
            loss: Of the step. One that is not finite overflowed in the forward pass: no factor mends that.
            applied: Whether its gradients were finite.

        Returns:
            What to log where a gradient overflowed and the factor is lower now, else None.
        """
        if applied:
            self.num_good += 1
            if self.num_good >= PATIENCE and self.factor < CEILING:
                self.factor, self.num_good = self.factor * 2, 0
            return None
        if not math.isfinite(loss) or self.factor <= FLOOR:
            return None
        self.factor, self.num_good = self.factor / 2, 0
        return f"a gradient overflowed at a loss scale of {self.factor * 2:g}"

    def divide_out(self, gradients: Iterable[Tensor | None]) -> None:
        """Bring gradients back to their own size; exact, the factor being a power of two."""
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], 1.0 / self.factor)
