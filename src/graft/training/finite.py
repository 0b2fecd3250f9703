"""Nothing with a NaN or an infinity in it is saved to go on from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graft.errors import TrainingError


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are not finite.

    Args:
        tensors: By name; those that are no floating numbers are passed over.
        where: What the error says about the place.

    Raises:
        TrainingError: One is not; it is named.

    Cost: one pass over the tensors.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"{name} holds NaN or infinite values: the run diverged, and nothing of it was saved",
                where=where,
                fix="go on from an earlier checkpoint with a lower rate: graft train --resume RUN "
                "--allow-change training.learning_rate --set training.learning_rate=...",
            )
