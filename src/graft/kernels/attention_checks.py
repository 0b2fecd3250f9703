"""The checks of the arguments of attention."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from graft.errors import ModelError


def check_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> None:
    """Of attention.

    Raises:
        ModelError: An argument does not fit.
    """
    _check_operands(query, key, value, mask, "attention")


def check_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    sums: Tensor,
    *,
    scale: float,
) -> None:
    """Of attention_backward.

    Raises:
        ModelError: An argument does not fit.
    """
    where = "attention_backward"
    _check_operands(query, key, value, mask, where)
    batch, heads, length, size = query.shape
    for name, tensor in (("grad", grad), ("output", output)):
        if tensor.shape != (batch, length, heads, size):
            _refuse(f"{name} {_show(tensor)} is not ({batch}, {length}, {heads}, {size})", where)
    if not output.is_contiguous() or output.dtype != query.dtype:
        _refuse(f"output {_show(output)} is not what attention gave", where)
    if sums.shape != (batch, heads, length) or sums.dtype != torch.float32:
        _refuse(f"sums {_show(sums)} are not float32 ({batch}, {heads}, {length})", where)


def _check_operands(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, where: str) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.dtype != query.dtype or not tensor.is_floating_point():
            _refuse(f"{name} {_show(tensor)} is not (B, heads, T, D) of {query.dtype}", where)
        if tensor.device != query.device:
            _refuse(f"{name} is on {tensor.device}, query on {query.device}", where)
    batch, heads, length, size = query.shape
    key_heads = key.shape[1]
    if key.shape != value.shape or key.shape != (batch, key_heads, length, size):
        _refuse(f"key {_show(key)} and value {_show(value)} do not fit query {_show(query)}", where)
    if not key_heads or heads % key_heads:
        _refuse(f"{heads} heads cannot share {key_heads} key heads", where)
    if mask is None:
        return
    if mask.shape not in ((batch, 1, length, length), (1, 1, length, length)):
        _refuse(f"mask {_show(mask)} is not ({batch} or 1, 1, {length}, {length})", where)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _refuse(f"mask {_show(mask)} is neither truth values nor numbers to add", where)


def _refuse(what: str, where: str) -> NoReturn:
    raise ModelError(what, where=where)


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
