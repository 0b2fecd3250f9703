"""Adapters folded into the weights of a model in memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, SavedModule, unwrapped
from graft.adapters.attach import detach
from graft.adapters.attached import active_weights, adapter, adapter_modules, stays_tied
from graft.adapters.base import is_additive
from graft.adapters.shipped import in_codes
from graft.adapters.targets import base_layers, tied_pair
from graft.errors import AdapterError
from graft.models.layers import BaseLayer
from graft.quant.linear import QuantizedLinear, quantized_modules
from graft.quant.tensor import plain_constants


def merge_into(model: nn.Module, name: str = "default", *, codes: bool = False) -> bool:
    """Fold an adapter into a dense model and take it out: the model stays, its weights change.

    An adapter that acts with a weight (`set_active`) is folded in with it. Sums are made in fp32 and rounded
    once to the dtype of the weight. A tied embedding and head come apart where the adapter touches one of
    them, so that the other stays what it was.

    Args:
        model: A model that carries the adapter.
        name: Which adapter.
        codes: Put the quantized layers in place that the adapter was trained as (`AdapterMethod`'s
            `ships_quantized`), in place of dense ones with the decoded weights.

    Returns:
        Whether embedding and output head were untied.

    Raises:
        AdapterError: No such adapter, a layer under it is quantized, or another adapter there is measured
            against the weight that would change.
    """
    known = adapter(model, name)
    modules = adapter_modules(model)
    _refuse_quantized(modules, name)
    packed = any(block_update(module, name) is not None for module in modules.values())
    _refuse_new_bias(modules, name)
    _refuse_beside(modules, name)
    weight = active_weights(model).get(name, 1.0)
    pair = tied_pair(model)
    touched = {*known.targets, *known.saved_modules}
    untie = pair is not None and not touched.isdisjoint(pair) and not stays_tied(model, name)
    if pair is not None and untie:
        _untie(model, pair[1])
    for module in modules.values():
        if isinstance(module, SavedModule):
            _fold_copy(module, name)
        elif name in module.adapters:
            _fold_layer(module, name, weight, codes=codes)
    detach(model, name)
    if packed:
        _store_alike(model)
    if hasattr(model, "graft_fingerprint"):
        del model.graft_fingerprint  # it was that of the weights before
    return untie


def _refuse_quantized(modules: dict[str, AdaptedLayer | SavedModule], name: str) -> None:
    for path, module in modules.items():
        if not isinstance(module, AdaptedLayer) or name not in module.adapters:
            continue
        if module.base.quantized and block_update(module, name) is None:
            raise AdapterError(
                f"{path} is quantized: an adapter cannot be folded into codes without loss",
                where=path,
                fix="load the base without quantization, or use graft merge",
            )


def block_update(module: nn.Module, name: str) -> Tensor | None:
    """What an adapter adds to all weights of each block of a quantized layer; None where that is not exact.

    Args:
        module: What stands in the place of the layer.
        name: The adapter.
    """
    if not isinstance(module, AdaptedLayer) or name not in module.adapters:
        return None
    layer: Any = module.adapters[name]
    block = module.base.affine_block
    found: Tensor | None = None
    if block is not None and hasattr(layer, "block_update"):
        found = layer.block_update(block)
    return found


def merges_into_codes(model: nn.Module, name: str) -> bool:
    """Whether every layer of an adapter is quantized and takes its update into the shifts of its blocks."""
    own = adapter(model, name)
    modules = adapter_modules(model)
    exact = all(block_update(modules[path], name) is not None for path in own.targets)
    return exact and bool(own.targets)


def _store_alike(model: nn.Module) -> None:
    """Give all quantized layers constants in float32, as those have whose shifts moved."""
    for path, layer in quantized_modules(model).items():
        weight = plain_constants(layer.quantized_weight)
        if weight.config != layer.config:
            made = QuantizedLinear.from_quantized(weight, layer.bias, layer.compute_dtype)
            model.set_submodule(path, made.train(layer.training))


def _refuse_new_bias(modules: dict[str, AdaptedLayer | SavedModule], name: str) -> None:
    for path, module in modules.items():
        if isinstance(module, SavedModule) or name not in module.adapters or module.base.bias is not None:
            continue
        layer: Any = module.adapters[name]
        if hasattr(layer, "merged_bias") and layer.merged_bias(module.base, None) is not None:
            raise AdapterError(
                f"{path} has no bias that the bias of lora_B could be folded into",
                where=path,
                fix="use the adapter as it is, or train it without adapter.lora_bias",
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


def _fold_layer(module: AdaptedLayer, name: str, factor: float, *, codes: bool) -> None:
    base, layer = module.base, cast("Any", module.adapters[name])
    if codes:
        module.base_layer = in_codes(base, layer)
        return
    moved = block_update(module, name)
    if moved is not None:
        module.base_layer = base.shifted(factor * moved)
        return
    if factor != 1:  # additive: its update alone, which knows no base weight and no bias
        weight = base.dense_weight()
        change = layer.merged_weight(base, torch.zeros_like(weight))
        base.replace_weight(torch.add(weight, change, alpha=factor))
        return
    bias = base.bias
    merged = layer.merged_bias(base, bias) if hasattr(layer, "merged_bias") else None
    base.replace_weight(layer.merged_weight(base, base.dense_weight()))
    if bias is not None and merged is not None:
        with torch.no_grad():
            bias.copy_(merged)


def _fold_copy(module: SavedModule, name: str) -> None:
    if name not in module.copies:
        return
    trained = module.tensors(name)
    with torch.no_grad():
        for leaf, old in module.original.named_parameters():
            if leaf in trained:
                old.copy_(trained[leaf])


def _untie(model: Any, head: str) -> None:
    module: Any = unwrapped(model.get_submodule(head))
    weight: Tensor = module.weight
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False


def decode_from(quantized: nn.Module, dense: nn.Module) -> None:
    """Give a dense model the weights that a quantized one computes with.

    Args:
        quantized: Some of its layers are quantized; it may carry adapters.
        dense: The same base, dense and without adapters; changed in place.
    """
    for path, base in base_layers(quantized).items():
        if base.quantized:
            target = BaseLayer.of(dense.get_submodule(path))
            assert target is not None, path
            target.replace_weight(base.dense_weight())
