"""The product with a quantized weight in plain torch: decode into a reused scratch, then a dense product."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from graft.kernels.reference import decode_blockwise


class _Scratch(threading.local):
    """One growing buffer per thread, device and dtype: fresh memory would cost more than the decoding."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, num_elements: int, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < num_elements:
            self.buffers[key] = buffer = torch.empty(num_elements, device=like.device, dtype=like.dtype)
        return buffer[:num_elements]


_scratch = _Scratch()


def release_scratch() -> None:
    """Free the buffers that this thread keeps for decoding: one weight, the largest met, per dtype."""
    _scratch.buffers.clear()


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    blocksize: int,
    out_features: int,
) -> Tensor:
    """Y = x W' + bias with W decoded from its codes.

    Args:
        x: Input (..., in_features).
        packed: Codes of W (out_features, in_features), flat in row-major order.
        absmax: Scales float32 (ceil(N / blocksize),).
        codebook: Entries (2**bits,) float32.
        bias: (out_features,) in x's dtype, or None.
        bits: 4 or 8.
        blocksize: Elements that share one absmax.
        out_features: Rows of W.

    Returns:
        (..., out_features), x's dtype.
    """
    shape = (out_features, x.shape[-1])
    weight = _decode(x, packed, absmax, codebook, bits, blocksize, shape)
    return torch.nn.functional.linear(x, weight, bias)


def quantized_linear_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    *,
    bits: int,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """dL/dx = dL/dy W with W decoded from its codes; W has no gradient.

    Args:
        grad: dL/dy (..., out_features).
        packed: Codes of W (out_features, in_features), flat in row-major order.
        absmax: Scales float32 (ceil(N / blocksize),).
        codebook: Entries (2**bits,) float32.
        bits: 4 or 8.
        blocksize: Elements that share one absmax.
        in_features: Columns of W.

    Returns:
        dL/dx (..., in_features), grad's dtype.
    """
    weight = _decode(grad, packed, absmax, codebook, bits, blocksize, (grad.shape[-1], in_features))
    return torch.matmul(grad, weight)


def _decode(
    like: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bits: int,
    blocksize: int,
    shape: tuple[int, int],
) -> Tensor:
    out = _scratch.take(shape[0] * shape[1], like).view(shape)
    return decode_blockwise(packed, absmax, codebook, bits=bits, blocksize=blocksize, out=out)
