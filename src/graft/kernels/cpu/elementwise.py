"""Norm, gate and loss of bfloat16 in one pass each, in C++; other dtypes as in the reference."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graft.kernels import reference_elementwise as reference
from graft.kernels.cpu import library
from graft.kernels.cpu.address import address_of

LANES = 16
"""Numbers that are worked on together: a norm's width is a multiple."""


def is_compiled(tensor: Tensor) -> bool:
    """Whether C++ works on a tensor like this here."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and not library.problem()
        and library.has_elementwise()
    )


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See the reference."""
    if not _norm_fits(x, weight):
        return reference.rms_norm(x, weight, eps=eps)
    return _norm(x, weight, None, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See the reference."""
    if not _norm_fits(x, weight) or grad.dtype != x.dtype:
        return reference.rms_norm_backward(grad, x, weight, eps=eps)
    return _norm(x, weight, grad.contiguous(), eps)


def _norm_fits(x: Tensor, weight: Tensor) -> bool:
    return is_compiled(x) and weight.dtype == x.dtype and x.shape[-1] % LANES == 0 and x.numel() > 0


def _norm(x: Tensor, weight: Tensor, grad: Tensor | None, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    call = library.Norm(
        address_of(x),
        address_of(weight),
        None if grad is None else address_of(grad),
        address_of(out),
        x.numel() // width,
        width,
        eps,
    )
    library.library().graft_rms_norm(ctypes.byref(call), torch.get_num_threads())
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """See the reference."""
    if not is_compiled(gate) or up.dtype != gate.dtype:
        return reference.silu_product(gate, up)
    out, _ = _gate(gate, up, None)
    return out


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference."""
    if not is_compiled(gate) or not grad.dtype == gate.dtype == up.dtype:
        return reference.silu_product_backward(grad, gate, up)
    grad_gate, grad_up = _gate(gate, up, grad.contiguous())
    assert grad_up is not None
    return grad_gate, grad_up


def _gate(gate: Tensor, up: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    other = None if grad is None else torch.empty_like(up)
    call = library.Gate(
        address_of(gate),
        address_of(up),
        None if grad is None else address_of(grad),
        address_of(out),
        None if other is None else address_of(other),
        gate.numel(),
    )
    library.library().graft_silu_product(ctypes.byref(call), torch.get_num_threads())
    return out, other


def cross_entropy(logits: Tensor, targets: Tensor, slope: Tensor | None = None) -> Tensor:
    """See the reference."""
    fits = is_compiled(logits) and logits.numel() > 0
    if not fits or (slope is not None and (slope.dtype != logits.dtype or not slope.is_contiguous())):
        return reference.cross_entropy(logits, targets, slope)
    logits, targets = logits.contiguous(), targets.contiguous()
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    call = library.Loss(
        address_of(logits),
        address_of(targets),
        address_of(losses),
        None if slope is None else address_of(slope),
        *logits.shape,
    )
    library.library().graft_cross_entropy(ctypes.byref(call), torch.get_num_threads())
    return losses
