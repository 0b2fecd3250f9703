"""An adapter without a model under it, folded into weights that come one at a time."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer
from graft.adapters.attach import replace_module, shared_of
from graft.adapters.base import method_of, ships_quantized
from graft.adapters.fold import refuse_new_bias
from graft.adapters.peft_open import StoredAdapter
from graft.adapters.peft_tensors import WEIGHTS, check_base_copy
from graft.adapters.selected import selected
from graft.adapters.targets import base_layers, tied_pair
from graft.models.layers import BaseLayer
from graft.quant.layout import FLOATS
from graft.quant.tensor import QuantizedTensor

NAME = "default"
"""What the adapter is called in a model that it is put on."""


class Folder:
    """The layers of a stored adapter, over a model whose weights are elsewhere.

    Args:
        model: The base; its parameters may be on the meta device.
        stored: The adapter, as it was read for this model.

    Raises:
        TargetError: A layer is of a kind that the method does not adapt.
        AdapterError: A bias has no place in the model.

    Cost: the memory of the adapter in fp32.
    """

    def __init__(self, model: Any, stored: StoredAdapter) -> None:
        settings = stored.settings
        config, targets, saved, biases = selected(model, settings.config, settings.selection, strict=False)
        self.stored = stored
        self.config: Any = config
        """The adapter's settings."""
        self.places = (*targets, *saved, *biases)
        """Paths of the layers and modules that it trains something of."""
        leaves = {path: [leaf for leaf, _ in module.named_parameters()] for path, module in saved.items()}
        leaves |= dict.fromkeys(biases, ["bias"])
        names = [f"{path}.{leaf}" for path, own in leaves.items() for leaf in own]
        self.saved = {name: stored.values[name].float() for name in names}
        """Tensors that were trained in full, fp32, by their names in the model."""
        self.bases = dict(targets)
        """The layers below, by path."""
        self.shipped = cast("Any", config).quantization if ships_quantized(method_of(config)) else None
        """The format that the layers were trained to be stored in; None where it was none."""
        side = stored.side
        known = FLOATS.get(side.weight_dtype) if side is not None else None
        self._trained_dtype = known if self.shipped is not None else None
        self.layers: dict[str, Any] = {}
        """The adapter's layers by path."""
        shared = shared_of(config, targets)
        if shared is not None:
            _fill({f".{name}": buffer for name, buffer in shared.named_buffers()}, stored.values)
        for path, base in targets.items():
            layer: Any = method_of(config).build_layer(base, config.at(path), None)
            if shared is not None:
                layer.share(shared)
            _fill({f"{path}.{leaf}": tensor for leaf, tensor in layer.tensors().items()}, stored.values)
            refuse_new_bias(path, base, layer)
            self.layers[path] = layer.eval().requires_grad_(False)
        pair = tied_pair(model)
        halves = {*targets, *saved}.intersection(pair or ())
        together = pair is not None and self._adapt_tied(model, *pair)
        self.pair = pair if halves and not together else None
        """Embedding and head, where they share one weight and the adapter makes two of it."""

    def _adapt_tied(self, model: Any, embedding: str, head: str) -> bool:
        """Let a layer over the embedding act in the head too, where it does the same there."""
        layer: Any = self.layers.get(embedding)
        if not hasattr(layer, "tied_layer"):
            return False
        self.layers[head] = layer.tied_layer().eval()
        self.bases[head] = base_layers(model)[head]
        return True

    def touches(self, name: str) -> bool:
        """Whether a tensor of the model changes."""
        path, _, leaf = name.rpartition(".")
        if name in self.saved:
            return True
        bias = leaf == "bias" and hasattr(self.layers.get(path), "merged_bias")
        return path in self.layers and (leaf == "weight" or bias)

    def owners(self, name: str, known: frozenset[str]) -> list[str]:
        """The tensors of the model that a stored one becomes: two where a tied pair comes apart.

        Args:
            name: Of the stored one in the model.
            known: The names of all that are stored.
        """
        names = [f"{path}.weight" for path in self.pair or ()]
        if name not in names:
            return [name]
        return [half for half in names if half == name or half not in known]

    def merged(self, name: str, value: Tensor) -> Tensor:
        """The tensor with the adapter folded in.

        Args:
            name: Of a tensor that it touches.
            value: Its value, fp32, as the module has it; not changed.

        Returns:
            fp32, as the module has it.
        """
        if name in self.saved:
            return self.saved[name]
        path, _, leaf = name.rpartition(".")
        layer, base = self.layers[path], self.bases[path]
        below = _standing_on(base, leaf, value)
        if leaf == "bias":
            changed: Tensor | None = layer.merged_bias(below, value)
            return value if changed is None else changed.float()
        return base.laid_out(layer.merged_weight(below, below.dense_weight()))

    def block_update(self, path: str, block: int) -> Tensor | None:
        """What is added to all weights of each block of a row (`AdapterLayer.block_update`), fp32.

        Args:
            path: Of a layer that it touches.
            block: Inputs in a block.
        """
        layer = self.layers[path]
        whole = self.bases[path].in_features % block == 0 and hasattr(layer, "block_update")
        found: Tensor | None = layer.block_update(block) if whole else None
        return found

    def in_codes(self, name: str, value: Tensor) -> QuantizedTensor | None:
        """The weight with the adapter folded in as the adapter was trained to be stored; None for any other.

        Args:
            name: Of a tensor that it touches.
            value: As for `merged`.
        """
        path, _, leaf = name.rpartition(".")
        if self.shipped is None or leaf != "weight" or path not in self.layers:
            return None
        below = _standing_on(self.bases[path], leaf, value)
        made: QuantizedTensor = self.layers[path].quantized_weight(
            below, below.dense_weight(self._trained_dtype)
        )
        return made

    def as_trained(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the base rounded to what it was in training, where the codes depend on it."""
        if self._trained_dtype is None or name.rpartition(".")[0] not in self.layers:
            return value
        return value.to(self._trained_dtype).to(value.dtype)

    def check_copies(self, name: str, value: Tensor) -> None:
        """Check that what the adapter's file repeats of the base is this base's.

        Raises:
            AdapterError: It differs.
        """
        for key in (name, ".base_layer.".join(name.rsplit(".", 1))):
            if key in self.stored.copies:
                check_base_copy(value, key, self.stored.copies[key], self.stored.directory / WEIGHTS)

    def put_on(self, model: nn.Module) -> None:
        """Let the adapter's layers act on those layers of a model that have weights now."""
        for path, layer in self.layers.items():
            module = model.get_submodule(path)
            base = None if isinstance(module, AdaptedLayer) else BaseLayer.of(module)
            if base is not None and base.device.type != "meta":
                adapted = AdaptedLayer(base)
                adapted.adapters[NAME] = layer
                adapted.activate((NAME,))
                replace_module(model, path, adapted)


def _fill(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in values:  # shared ones may be left out of a file
                tensor.copy_(values[key])


def _standing_on(base: BaseLayer, leaf: str, value: Tensor) -> BaseLayer:
    """The same layer with its weight, or its bias, in memory: a method may look at it."""
    module: Any = copy.copy(base.module)
    module._parameters = {**module._parameters, leaf: nn.Parameter(value, requires_grad=False)}
    made = BaseLayer.of(module)
    assert made is not None
    return made
