"""Adapters folded into the weights of a model in memory."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, SavedModule, unwrapped
from graft.adapters.attach import detach
from graft.adapters.attached import active_weights, adapter, adapter_modules, refuse_merged, stays_tied
from graft.adapters.base import is_additive
from graft.adapters.targets import tied_pair
from graft.errors import AdapterError
from graft.models.layers import BaseLayer
from graft.quant.linear import QuantizedLinear, quantized_modules
from graft.quant.tensor import plain_constants


def merge_into(model: nn.Module, name: str = "default") -> bool:
    """Fold an adapter into a dense model and take it out: the model stays, its weights change.

    An adapter that acts with a weight (`set_active`) is folded in with it. Sums are made in fp32 and rounded
    once to the dtype of the weight. A tied embedding and head come apart where the adapter touches one of
    them, so that the other stays what it was.

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
    refuse_unfoldable(modules, name, into_codes=True)
    packed = any(block_update(module, name) is not None for module in modules.values())
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
            _fold_layer(module, name, weight)
    detach(model, name)
    if packed:
        _store_alike(model)
    if hasattr(model, "graft_fingerprint"):
        del model.graft_fingerprint  # it was that of the weights before
    return untie


def refuse_unfoldable(
    modules: dict[str, AdaptedLayer | SavedModule], name: str, *, into_codes: bool = False
) -> None:
    """Refuse a fold that would not do what the adapter does.

    Args:
        modules: Those of the model that carry adapters.
        name: The adapter.
        into_codes: Whether quantized layers take an update that only moves the shifts of their blocks.

    Raises:
        AdapterError: A layer is quantized, or has no place for a bias, or carries another adapter that is
            measured against the weight.
    """
    for path, module in modules.items():
        if isinstance(module, AdaptedLayer) and name in module.adapters:
            if module.base.quantized and not (into_codes and block_update(module, name) is not None):
                _refuse_quantized(path)
            refuse_new_bias(path, module.base, module.adapters[name])
    _refuse_beside(modules, name)


def _refuse_quantized(path: str) -> NoReturn:
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


def _store_alike(model: nn.Module) -> None:
    """Give all quantized layers constants in float32, as those have whose shifts moved."""
    for path, layer in quantized_modules(model).items():
        weight = plain_constants(layer.quantized_weight)
        if weight.config != layer.config:
            made = QuantizedLinear.from_quantized(weight, layer.bias, layer.compute_dtype)
            model.set_submodule(path, made.train(layer.training))


def refuse_new_bias(path: str, base: BaseLayer, layer: Any) -> None:
    """Refuse a bias that the layer below has no place for.

    Args:
        path: Of the layer.
        base: The layer below.
        layer: Of the adapter.

    Raises:
        AdapterError: That is so.
    """
    if base.bias is None and hasattr(layer, "merged_bias") and layer.merged_bias(base, None) is not None:
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


def _fold_layer(module: AdaptedLayer, name: str, factor: float) -> None:
    base, layer = module.base, cast("Any", module.adapters[name])
    moved = block_update(module, name)
    if moved is not None:
        module.base_layer = base.shifted(factor * moved)
        return
    weight, bias = folded(base, layer, factor)
    base.replace_weight(weight)
    if bias is not None and base.bias is not None:
        with torch.no_grad():
            base.bias.copy_(bias)


def folded(base: BaseLayer, layer: Any, factor: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias with a layer of an adapter folded in, fp32; no bias where it stays.

    Args:
        base: The layer below.
        layer: Of the adapter; additive where the factor is not one.
        factor: On its update.
    """
    weight, old = base.dense_weight(), base.bias
    bias = layer.merged_bias(base, old) if hasattr(layer, "merged_bias") else None
    if factor == 1:
        return layer.merged_weight(base, weight), bias
    change = layer.merged_weight(base, torch.zeros_like(weight))
    if bias is not None:
        start = torch.zeros_like(bias) if old is None else old.detach().float()
        bias = start + factor * (bias - start)
    return torch.add(weight, change, alpha=factor), bias


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
