"""The checks of the arguments of norm, gate and loss."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from graft.errors import ModelError


def check_norm(x: Tensor, weight: Tensor, *, eps: float) -> None:
    """Of rms_norm.

    Raises:
        ModelError: An argument does not fit.
    """
    if not x.ndim or weight.shape != x.shape[-1:] or weight.device != x.device:
        _refuse(f"weight {_show(weight)} does not fit x {_show(x)}", "rms_norm")


def check_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> None:
    """Of rms_norm_backward.

    Raises:
        ModelError: An argument does not fit.
    """
    check_norm(x, weight, eps=eps)
    _check_same(grad, x, "grad", "x", "rms_norm_backward")


def check_gate(gate: Tensor, up: Tensor) -> None:
    """Of silu_product.

    Raises:
        ModelError: An argument does not fit.
    """
    _check_same(gate, up, "gate", "up", "silu_product")


def check_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Of silu_product_backward.

    Raises:
        ModelError: An argument does not fit.
    """
    check_gate(gate, up)
    _check_same(grad, gate, "grad", "gate", "silu_product_backward")


def check_cross_entropy(logits: Tensor, targets: Tensor, slope: Tensor | None = None) -> None:
    """Of cross_entropy.

    Raises:
        ModelError: An argument does not fit, or a target is no token.
    """
    where = "cross_entropy"
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        _refuse(f"targets {_show(targets)} do not fit logits {_show(logits)}", where)
    if slope is not None:
        _check_same(slope, logits, "slope", "logits", where)
    # Elsewhere a look at the values would wait for the device, which refuses such a target itself.
    on_cpu = targets.device.type == "cpu" and len(targets)
    if on_cpu and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        _refuse(f"a target is not a token from 0 to {logits.shape[1] - 1}", where)


def _check_same(one: Tensor, other: Tensor, name: str, beside: str, where: str) -> None:
    if one.shape != other.shape or one.device != other.device:
        _refuse(f"{name} {_show(one)} does not fit {beside} {_show(other)}", where)


def _refuse(what: str, where: str) -> NoReturn:
    raise ModelError(what, where=where)


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
