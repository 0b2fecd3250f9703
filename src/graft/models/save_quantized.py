"""Quantized models out of memory, as they are: directories of codes, without a rounding."""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import nn

from graft.errors import ModelError
from graft.models import bitsandbytes_files, graft_files
from graft.models.experts import Experts
from graft.models.fingerprint import Fingerprint
from graft.models.save import checkpoint_tensors, layout_of, save_tensors
from graft.quant.config import QuantizationConfig
from graft.quant.linear import quantized_modules


def save_quantized(
    model: Any, tokenizer: Any, directory: str | os.PathLike[str], config: QuantizationConfig
) -> Fingerprint:
    """Write a model with quantized linears as a directory that `graft.load` reads without quantizing again.

    Args:
        model: A transformers model without adapters, all of whose quantized linears are stored alike.
        tokenizer: Written beside it; None for none.
        directory: A new directory; it appears whole or not at all.
        config: How they are stored; its skip_modules are written as they are.

    Returns:
        The fingerprint that the directory has when it is loaded.

    Raises:
        ModelError: The model is a mixture of experts, carries adapters, or has no quantized linear.
        StorageError: The directory exists, or cannot be written.

    Cost: the memory of one tensor besides the model.
    """
    if not quantized_modules(model):
        raise ModelError("the model has no quantized linear", fix="graft.models.save.save_model writes it")
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ModelError(
            "a quantized mixture of experts cannot be written from memory",
            fix="write it dense: --from-quantized, or from_quantized=True",
        )
    described = copy.deepcopy(model.config)
    described.quantization_config = _described(model, config)
    return save_tensors(
        checkpoint_tensors(model, packed=True),
        directory,
        described,
        tokenizer,
        architecture=type(model).__name__,
        generation_config=getattr(model, "generation_config", None),
    )


def _described(model: Any, config: QuantizationConfig) -> dict[str, Any]:
    from transformers.pytorch_utils import Conv1D

    if layout_of(config) is graft_files:
        return graft_files.config_of(config)
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return bitsandbytes_files.config_of(config, model.dtype, dense)
