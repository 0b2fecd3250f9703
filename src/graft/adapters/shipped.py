"""Layers that were trained to be stored quantized, as the quantized layers that they compute as."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from graft.adapters.base import AdapterConfig, method_of, ships_quantized
from graft.adapters.targets import output_head
from graft.errors import TargetError
from graft.models.layers import BaseLayer
from graft.quant.linear import QuantizedLinear


def refuse_unquantizable(model: nn.Module, config: AdapterConfig, targets: Mapping[str, BaseLayer]) -> None:
    """Refuse targets that such an adapter cannot quantize; nothing for other adapters.

    Args:
        model: The model.
        config: The settings of the adapter.
        targets: Its layers by path.

    Raises:
        TargetError: One is quantized already, or is the output head.
    """
    if not ships_quantized(method_of(config)):
        return
    head = output_head(model)
    for path, base in targets.items():
        if base.quantized:
            raise TargetError(
                f"{path} is quantized already: {config.method} rounds the dense weight with its update in it",
                where="adapter.method",
                fix="load the base without quantization, or train LoRA on it (--method qlora)",
            )
        if head is not None and base.module is head:
            raise TargetError(
                f"{path} is the output head, which stays dense in a quantized model",
                where="adapter.target_modules",
                fix="take it out of the targets, or train it in full (modules_to_save)",
            )


def in_codes(base: BaseLayer, layer: Any) -> QuantizedLinear:
    """The quantized layer that an adapter's layer computes as; it shares the bias.

    Args:
        base: The dense layer below.
        layer: That of a method that `ships_quantized`.
    """
    weight = base.dense_weight(None)
    return QuantizedLinear.from_quantized(layer.quantized_weight(base, weight), base.bias, weight.dtype)


def endings(dense: Sequence[str], targets: Collection[str]) -> tuple[str, ...]:
    """The fewest names and paths whose endings are those of all dense linears and of no target."""
    taken = {path.rpartition(".")[2] for path in targets}
    short = {path: path.rpartition(".")[2] for path in dense}
    return tuple(sorted({path if leaf in taken else leaf for path, leaf in short.items()}))
