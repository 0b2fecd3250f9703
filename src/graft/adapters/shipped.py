"""Adapters that are trained to be stored quantized: what they cannot go over."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graft.adapters.base import AdapterConfig, method_of, ships_quantized
from graft.adapters.targets import output_head
from graft.errors import TargetError
from graft.models.layers import BaseLayer


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
