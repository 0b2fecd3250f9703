"""A base model's layers and their shapes without its weights: enough to read adapters by."""

from __future__ import annotations

import os
from typing import Any

import torch

from graft.models.architecture import build_empty, read_config
from graft.models.experts import split_experts
from graft.models.locate import resolve, rooted_name


def outline(name: str | os.PathLike[str], revision: str | None = None) -> Any:
    """A base model whose parameters are on the meta device: paths, kinds and shapes of its layers.

    Args:
        name: A directory, a hub id, or "builtin".
        revision: Branch, tag or commit of a hub id.

    Returns:
        transformers' model in eval mode, experts taken apart as `load` does; it cannot compute.

    Raises:
        ModelError: The model is not there, not a causal language model, or needs its own code.

    Cost: reads config.json; no weights.
    """
    path = resolve(name, revision)
    model = build_empty(read_config(path), torch.float32, path)
    split_experts(model)
    model.graft_name, model.graft_revision = rooted_name(name), revision
    return model
