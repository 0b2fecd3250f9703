"""Weights of a quantized base as its files hold them, before they were rounded: read again, one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from graft.errors import ModelError
from graft.models.contents import Contents
from graft.models.keys import Fill
from graft.models.locate import resolve
from graft.models.packed import stored_method


def original_weights_of(model: Any, paths: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The dense weights of some linears of a model that `graft.load` quantized.

    Args:
        model: The model; it says where its files are.
        paths: Of the linears.

    Yields:
        Each path with its weight (out_features, in_features), in the dtype of the files and their order.

    Raises:
        ModelError: The files hold no dense weights, or the model does not say where they are.

    Cost: reads these weights once; one at a time is in memory.
    """
    name = getattr(model, "graft_name", None)
    if name is None:
        raise ModelError(
            "the model was not loaded by graft.load: where its weights came from is not known",
            where="model",
            fix="graft.load(name, quantization=...)",
        )
    path = resolve(name, model.graft_revision)
    if method := stored_method(path):
        raise ModelError(
            f"{name} is stored quantized by {method}: what its rounding lost is not in its files",
            where=str(path),
            fix="give the dense model with quantization=",
        )
    contents = Contents.of(path, torch.float32)
    wanted = {f"{path}.weight" for path in paths}
    for fill in contents.fills:
        if not wanted.isdisjoint(fill.targets or wanted):
            yield from _weights(fill, contents.model, wanted)


def _weights(fill: Fill, twin: Any, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    from transformers.pytorch_utils import Conv1D

    for name, tensor in fill.realize(lambda source: source.load(), twin).items():
        if name in wanted:
            path = name.removesuffix(".weight")
            turned = isinstance(twin.get_submodule(path), Conv1D)
            yield path, tensor.t().contiguous() if turned else tensor
