"""What a model does between its products, in plain torch: norm, gate and loss, with their derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Weight * x / sqrt(mean(x^2) + eps), the fraction rounded to x's dtype first (arXiv:1910.07467).

    Args:
        x: (..., width).
        weight: (width,), x's dtype.
        eps: Added to the mean of the squares.

    Returns:
        (..., width) in x's dtype.
    """
    return weight * (x.float() * _factor(x, eps)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """dL/dx of `rms_norm` under a frozen weight.

    Args:
        grad: dL/dy (..., width).
        x: As it was given.
        weight: As it was given.
        eps: As it was given.
    """
    factor = _factor(x, eps)
    normal, upper = x.float() * factor, (grad * weight).float()
    return (factor * (upper - normal * (upper * normal).mean(-1, keepdim=True))).to(x.dtype)


def _factor(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each rounded to their dtype; one shape (arXiv:2002.05202)."""
    return functional.silu(gate) * up


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, from that of `silu_product`."""
    share = torch.sigmoid(gate.float())
    slope = share * (1 + gate.float() * (1 - share))
    return ((grad * up).float() * slope).to(gate.dtype), grad * functional.silu(gate)


def cross_entropy(logits: Tensor, targets: Tensor, slope: Tensor | None = None) -> Tensor:
    """-log softmax(logits)[target] of each row, in float32.

    Args:
        logits: (rows, vocabulary).
        targets: (rows,) int64, each in [0, vocabulary).
        slope: (rows, vocabulary) of the logits' dtype; gets softmax - one-hot, the derivative. May be None.

    Returns:
        Losses in nats, (rows,) float32.
    """
    wide = logits.to(torch.float32, copy=True)
    top = wide.amax(-1, keepdim=True)
    chosen = wide.gather(-1, targets[:, None]) - top
    total = wide.sub_(top).exp_().sum(-1, keepdim=True)
    if slope is not None:
        wide.div_(total).scatter_add_(-1, targets[:, None], wide.new_full((len(targets), 1), -1.0))
        slope.copy_(wide)
    return (total.log_() - chosen)[:, 0]
