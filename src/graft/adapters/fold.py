"""Adapters folded into the weights of a model in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, SavedModule, unwrapped
from graft.adapters.attach import detach
from graft.adapters.attached import adapter, adapter_modules, refuse_merged
from graft.adapters.base import is_additive
from graft.adapters.targets import tied_pair
from graft.errors import AdapterError
from graft.models.layers import BaseLayer


def merge_into(model: nn.Module, name: str = "default") -> bool:
    """Fold an adapter into a dense model and take it out: the model stays, its weights change.

    Sums are made in fp32 and rounded once to the dtype of the weight. A tied embedding and head come apart
    where the adapter touches one of them, so that the other stays what it was.

    Args:
        model: A model that carries the adapter.
        name: Which adapter.

    Returns:
        Whether embedding and output head were untied.

    Raises:
        AdapterError: No such adapter, one is merged in place, a layer under it is quantized, or another
            adapter there is measured against the weight that would change.
    """
    known = adapter(model, name)
    refuse_merged(model)
    modules = adapter_modules(model)
    refuse_unfoldable(modules, name)
    pair = tied_pair(model)
    touched = {*known.targets, *known.saved_modules}
    untie = pair is not None and not touched.isdisjoint(pair)
    if pair is not None and untie:
        _untie(model, pair[1])
    for module in modules.values():
        if isinstance(module, SavedModule):
            _fold_copy(module, name)
        elif name in module.adapters:
            _fold_layer(module.base, module.adapters[name])
    detach(model, name)
    if hasattr(model, "graft_fingerprint"):
        del model.graft_fingerprint  # it was that of the weights before
    return untie


def refuse_unfoldable(modules: dict[str, AdaptedLayer | SavedModule], name: str) -> None:
    """Refuse a fold into codes, or under another adapter that is measured against the weight.

    Raises:
        AdapterError: In these cases.
    """
    _refuse_quantized(modules, name)
    _refuse_beside(modules, name)


def _refuse_quantized(modules: dict[str, AdaptedLayer | SavedModule], name: str) -> None:
    for path, module in modules.items():
        if isinstance(module, AdaptedLayer) and name in module.adapters and module.base.quantized:
            raise AdapterError(
                f"{path} is quantized: an adapter cannot be folded into codes without loss",
                where=path,
                fix="load the base without quantization, or use graft merge",
            )


def _refuse_beside(modules: dict[str, AdaptedLayer | SavedModule], name: str) -> None:
    # Of several adapters each is a change of the base as it is; where that change depends on the weight,
    # folding one of them in would make another change of the rest.
    for path, module in modules.items():
        if isinstance(module, SavedModule) or name not in module.adapters:
            continue
        others = [other for other in module.adapters if other != name]
        if others and not all(is_additive(layer) for layer in module.adapters.values()):
            raise AdapterError(
                f"{path} also carries {', '.join(others)}: after the merge it would no longer be the same",
                where=path,
                fix="detach the other adapter first, or merge each into a base of its own",
            )


def _fold_layer(base: BaseLayer, layer: Any) -> None:
    weight, bias = folded(base, layer)
    base.replace_weight(weight)
    if bias is not None and base.bias is not None:
        with torch.no_grad():
            base.bias.copy_(bias)


def folded(base: BaseLayer, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias with a layer of an adapter folded in, fp32; no bias where it stays."""
    bias = base.bias
    changes = bias is not None and hasattr(layer, "merged_bias")
    return layer.merged_weight(base, base.dense_weight()), layer.merged_bias(base, bias) if changes else None


def _fold_copy(module: SavedModule, name: str) -> None:
    if name not in module.copies:
        return
    trained = module.tensors(name)
    with torch.no_grad():
        for leaf, old in module.original.named_parameters():
            old.copy_(trained[leaf])


def _untie(model: Any, head: str) -> None:
    module: Any = unwrapped(model.get_submodule(head))
    weight: Tensor = module.weight
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False
