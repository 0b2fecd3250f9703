"""Products of halves where the processor has none: in float32, with the weight made wide part by part.

On a processor without instructions for bfloat16 (on x86 anything before AVX-512) torch multiplies it in a
plain loop: a sixth of the speed of float32, measured on AVX2. Here x and a part of the weight become float32
in memory that is used again, and the product is an ordinary one. The weight is the same, its halves are exact
in float32; the sums are more exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from graft.kernels.reference_linear import take_scratch

PART_ELEMENTS = 1 << 21
"""Elements of a weight that are wide at once: 8 MB."""

FillPart = Callable[[int, int, Tensor], object]
"""Writes rows [start, stop) of the weight into a float32 tensor (stop - start, in_features)."""


def is_wide(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of this dtype are made in float32 on this machine."""
    return device_type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _has_products(dtype)


@cache
def _has_products(dtype: torch.dtype) -> bool:
    # What torch itself asks before it hands a product to oneDNN; else it has a plain loop.
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())


def wide_linear(
    x: Tensor, out_features: int, fill: FillPart, bias: Tensor | None = None, multiple: int = 1
) -> Tensor:
    """Y = x W' + bias with sums in float32.

    Args:
        x: (..., in_features), bfloat16, float16 or float32.
        out_features: Rows of W.
        fill: Gives the rows of W.
        bias: (out_features,) or None.
        multiple: Parts start at multiples of so many rows.

    Returns:
        (..., out_features), x's dtype.
    """
    in_features = x.shape[-1]
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    rows = x.reshape(math.prod(x.shape[:-1]), in_features).float()
    flat = y.view(len(rows), out_features)
    for start, stop, weight in _parts(x, out_features, in_features, fill, multiple):
        if bias is None:
            flat[:, start:stop] = rows @ weight.t()
        else:
            flat[:, start:stop] = torch.addmm(bias[start:stop].float(), rows, weight.t())
    return y


def wide_linear_backward(grad: Tensor, in_features: int, fill: FillPart, multiple: int = 1) -> Tensor:
    """dL/dx = dL/dy W with sums in float32.

    Args:
        grad: dL/dy (..., out_features).
        in_features: Columns of W.
        fill: Gives the rows of W.
        multiple: Parts start at multiples of so many rows.

    Returns:
        (..., in_features), grad's dtype.
    """
    out_features = grad.shape[-1]
    rows = grad.reshape(math.prod(grad.shape[:-1]), out_features)
    total: Tensor | None = None
    for start, stop, weight in _parts(grad, out_features, in_features, fill, multiple):
        part = rows[:, start:stop].float()
        total = part @ weight if total is None else total.addmm_(part, weight)
    if total is None:
        total = torch.zeros((rows.shape[0], in_features), dtype=torch.float32, device=grad.device)
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


def _parts(
    like: Tensor, out_features: int, in_features: int, fill: FillPart, multiple: int
) -> Iterator[tuple[int, int, Tensor]]:
    size = max(1, PART_ELEMENTS // max(1, in_features) // multiple) * multiple
    for start in range(0, out_features, size):
        stop = min(start + size, out_features)
        weight = take_scratch((stop - start, in_features), like, torch.float32)
        fill(start, stop, weight)
        yield start, stop, weight
