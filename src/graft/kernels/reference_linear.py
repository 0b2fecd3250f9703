"""The product with a quantized weight in plain torch: decode into a reused scratch, then a dense product."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from graft.kernels.reference_decode import decode_blockwise


class _Scratch(threading.local):
    """One growing buffer per thread, device and dtype: fresh memory would cost more than the decoding."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, num_elements: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < num_elements:
            # Made in inference mode, it could not be written to outside.
            with torch.inference_mode(False):
                buffer = torch.empty(num_elements, device=device, dtype=dtype)
            if type(buffer) is Tensor:  # no stand-in of a tracing mode
                self.buffers[key] = buffer
        return buffer[:num_elements]


_scratch = _Scratch()


def take_scratch(shape: tuple[int, int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a decoded weight, where a tensor is and of its dtype; overwritten by the next one."""
    return _scratch.take(shape[0] * shape[1], like.device, dtype or like.dtype).view(shape)


def release_scratch() -> None:
    """Free the buffers that this thread keeps for decoding: one weight, the largest met, per dtype."""
    _scratch.buffers.clear()


def quantized_linear(  # noqa: PLR0913 - what one weight is made of
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
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
        codes: Packed codes of W (out_features, in_features), in row-major order.
        scales: As in `decode_blockwise`.
        shifts: As in `decode_blockwise`.
        codebook: Entries (2**bits,) float32.
        bias: (out_features,) in x's dtype, or None.
        bits: 2, 3, 4 or 8.
        blocksize: Elements that share one scale.
        out_features: Rows of W.

    Returns:
        (..., out_features), x's dtype.
    """
    shape = (out_features, x.shape[-1])
    weight = take_scratch(shape, x)
    decode_blockwise(codes, scales, shifts, codebook, bits=bits, blocksize=blocksize, out=weight)
    return torch.nn.functional.linear(x, weight, bias)


def quantized_linear_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    codebook: Tensor,
    *,
    bits: int,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """dL/dx = dL/dy W with W decoded from its codes; W has no gradient.

    Args:
        grad: dL/dy (..., out_features).
        codes: Packed codes of W (out_features, in_features), in row-major order.
        scales: As in `decode_blockwise`.
        shifts: As in `decode_blockwise`.
        codebook: Entries (2**bits,) float32.
        bits: 2, 3, 4 or 8.
        blocksize: Elements that share one scale.
        in_features: Columns of W.

    Returns:
        dL/dx (..., in_features), grad's dtype.
    """
    shape = (grad.shape[-1], in_features)
    weight = take_scratch(shape, grad)
    decode_blockwise(codes, scales, shifts, codebook, bits=bits, blocksize=blocksize, out=weight)
    return torch.matmul(grad, weight)
