"""The figures of one layer of an adapter, from its tensors and, where it is at hand, the weight below."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import is_additive, replaces_base
from graft.adapters.effect import PAIRS, factors
from graft.adapters.inspect_records import SHARES, SHOWN_RANKS, LayerFacts
from graft.adapters.spectrum import effective_rank, energy, product_values, rank_for, stable_rank
from graft.adapters.targets import block_number
from graft.errors import AdapterError
from graft.models.layers import BaseLayer
from graft.models.shards import StoredTensor

_NEUTRAL = {"ia3_l": 1.0, "oft_R.weight": 0.0}
"""The value at which a tensor leaves the layer as it is, where that is so whatever the base."""

_STILL = 1e-6
"""A relative change of the weight below which a layer changes nothing: the last digit of float32."""


@dataclass(frozen=True, eq=False)
class Part:
    """One layer of an adapter file.

    Attributes:
        path: Of the layer in the model.
        stored: Its tensors by their names in the layer, such as lora_A.weight.
        config: The settings of this layer.
    """

    path: str
    stored: Mapping[str, StoredTensor]
    config: Any


_PAIRS = (*PAIRS, ("lora_A", "lora_B"), ("hada_w1_b", "hada_w1_a"))
"""Tensors of a product, whose outer sides are those of the layer."""


def stand_in(part: Part) -> BaseLayer | None:
    """A layer without memory of the sizes that the tensors tell; None where they tell only one, or none.

    Raises:
        AdapterError: One factor of a product is there and the other is not.
    """
    for pair in _PAIRS:
        there = [leaf for leaf in pair if leaf in part.stored]
        if len(there) == 1:
            (lost,) = set(pair) - set(there)
            raise AdapterError(
                f"{part.path} has {there[0]} and no {lost}",
                where=part.stored[there[0]].where,
                fix="copy the adapter again",
            )
    rows, columns = sizes({leaf: tensor.shape for leaf, tensor in part.stored.items()})
    if rows is None or columns is None:
        return None
    with torch.device("meta"):
        if "lora_embedding_A" in part.stored:
            return BaseLayer.of(nn.Embedding(columns, rows))
        return BaseLayer.of(nn.Linear(columns, rows, bias=False))


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """(out_features, in_features) of a layer as far as the shapes of its tensors tell them.

    Args:
        shapes: By the names in the layer.
    """
    sides: tuple[int | None, int | None] = None, None
    for down, up in _PAIRS:
        if down in shapes and up in shapes:
            sides = shapes[up][0], shapes[down][1]
    if "vera_lambda_b" in shapes:
        sides = shapes["vera_lambda_b"][0], None
    if "oft_R.weight" in shapes:
        blocks, numbers = shapes["oft_R.weight"]
        sides = None, blocks * (1 + math.isqrt(1 + 8 * numbers)) // 2
    halves = [_kronecker(shapes, f"lokr_w{number}") for number in (1, 2)]
    if halves[0] is not None and halves[1] is not None:
        sides = halves[0][0] * halves[1][0], halves[0][1] * halves[1][1]
    return sides


def _kronecker(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int] | None:
    if name in shapes:
        return shapes[name][0], shapes[name][1]
    pair = shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    return None if pair[0] is None or pair[1] is None else (pair[0][0], pair[1][1])


def build(
    part: Part, values: Mapping[str, Tensor], method: Any, view: BaseLayer, shared: nn.Module | None
) -> Any:
    """The layer's module with its tensors in it.

    Args:
        part: The layer.
        values: Its tensors by their names in the layer.
        method: The adapter method.
        view: The layer below, or a stand-in of its sizes.
        shared: What the method's layers share.

    Raises:
        AdapterError: The tensors are not those that the settings call for; one is named.
    """
    config = part.config
    if getattr(config, "bias", "none") != "none" and "base_layer.bias" not in values:
        config = replace(config, bias="none")  # files hold it as a module trained in full
    layer = method.build_layer(view, config, None)
    if shared is not None:
        layer.share(shared)
    wanted = layer.tensors()
    where = f"{next(iter(part.stored.values())).file}, layer {part.path!r}"
    if wanted.keys() == values.keys() and hasattr(method, "restored"):
        values = {leaf: method.restored(view, config, leaf, v, where) for leaf, v in values.items()}
    if wanted.keys() != values.keys():
        raise AdapterError(
            f"the layer has {', '.join(sorted(values))}; the settings call for {', '.join(sorted(wanted))}",
            where=where,
            fix="use the adapter_config.json that the tensors were saved with",
        )
    with torch.no_grad():
        for leaf, tensor in wanted.items():
            if tensor.shape != values[leaf].shape:
                raise AdapterError(
                    f"the shape of {leaf} is {list(values[leaf].shape)}, the settings make it "
                    f"{list(tensor.shape)}",
                    where=where,
                    fix="use the adapter_config.json that the tensors were saved with, and the right base",
                )
            tensor.copy_(values[leaf])
    layer.eval()
    return layer.update if replaces_base(layer) else layer  # the update itself, without what is rounded


def facts_without_layer(part: Part, values: Mapping[str, Tensor], why: str) -> LayerFacts:
    """What can be said of a layer whose update is not known.

    Args:
        part: The layer.
        values: Its tensors by their names in the layer.
        why: Why it is not known.
    """
    neutral = [leaf in _NEUTRAL and bool((value == _NEUTRAL[leaf]).all()) for leaf, value in values.items()]
    rows, columns = sizes({leaf: tensor.shape for leaf, tensor in part.stored.items()})
    return replace(_head(part), shape=(rows, columns), idle=True if all(neutral) else None, note=why)


def _head(part: Part) -> LayerFacts:
    return LayerFacts(
        path=part.path,
        block=block_number(part.path),
        kind=part.path.rpartition(".")[2],
        parameters=sum(math.prod(tensor.shape) for tensor in part.stored.values()),
        rank=getattr(part.config, "rank", None),
        scaling=getattr(part.config, "scaling", None),
    )


def facts(part: Part, layer: Any, view: BaseLayer, weight: Tensor | None, leading: int) -> LayerFacts:
    """The figures of one layer.

    Args:
        part: The layer.
        layer: Its module, of `build`.
        view: The layer below, or a stand-in.
        weight: Its weight (out, in); None where the base is not at hand.
        leading: How many leading directions of W + update are looked for among those of W.

    Cost: QR and SVD of the factors where the update is a product of two, else the singular values of an
    (out, in) matrix; for the directions see `new_directions`.
    """
    delta = None if weight is None else _delta(layer, view, weight)
    values, of = _values(layer, view, delta)
    told = _with_spectrum(replace(_head(part), shape=(view.out_features, view.in_features)), values, of)
    told = replace(told, balance=_balance(layer))
    if weight is None or delta is None:
        needs = "" if of == "update" else "its change depends on the base: give --base"
        still = told.norm == 0 and not _moves_bias(part, layer)
        return replace(told, note=needs, idle=still if of == "update" else None)
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    ratio = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) / size if size else None
    idle = ratio == 0 if is_additive(layer) or ratio is None else ratio < _STILL
    told = replace(told, update_ratio=ratio, idle=idle and not _moves_bias(part, layer))
    if not leading:
        return told
    if view.kind == "embedding":
        return replace(told, note="directions of embeddings are not compared")
    return replace(told, cosines=tuple(new_directions(weight, delta, leading)))


def _moves_bias(part: Part, layer: Any) -> bool:
    if getattr(part.config, "bias", "none") != "none":  # whether it moved is told where modules are
        return True
    return any(leaf.endswith("bias") and bool(tensor.any()) for leaf, tensor in layer.tensors().items())


def _delta(layer: Any, view: BaseLayer, weight: Tensor) -> Tensor:
    """W' - W in float64: in fp32 the rounding of W would stand beside a small update."""
    exact = layer.double()
    merged: Tensor = exact.merged_weight(view, weight.double())
    return merged - weight.double()


def _values(layer: Any, view: BaseLayer, delta: Tensor | None) -> tuple[list[float] | None, Any]:
    if is_additive(layer):
        pair = factors(layer)
        if pair is not None:
            return (product_values(*pair) * abs(layer.scaling)).tolist(), "update"
        if hasattr(layer, "update_values"):
            return layer.update_values().tolist(), "update"
        if hasattr(layer, "update_factors"):
            return product_values(*layer.update_factors()).tolist(), "update"
        zero = torch.zeros(view.out_features, view.in_features, dtype=torch.float64)
        return torch.linalg.svdvals(layer.double().merged_weight(view, zero)).tolist(), "update"
    if delta is not None:
        return torch.linalg.svdvals(delta).tolist(), "update"
    pair = _pair(layer)
    if pair is None:
        return None, ""
    return (product_values(*pair) * abs(layer.scaling)).tolist(), "direction"


def _pair(layer: Any) -> tuple[Tensor, Tensor] | None:
    tensors = layer.tensors()
    for first, second in PAIRS:
        if first in tensors and second in tensors:
            return tensors[first].detach(), tensors[second].detach()
    return None


def _balance(layer: Any) -> float | None:
    pair = _pair(layer)
    if pair is None or not bool(pair[1].any()):
        return None
    down, up = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in pair)
    return down / up


def _with_spectrum(told: LayerFacts, values: list[float] | None, of: Any) -> LayerFacts:
    if values is None:
        return told
    held = energy(values)
    shares = {share: found for share in SHARES if (found := rank_for(share, values)) is not None}
    return replace(
        told,
        of=of,
        values=tuple(values),
        norm=math.sqrt(math.fsum(value * value for value in values)),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        energy={rank: held[rank - 1] for rank in SHOWN_RANKS if rank <= len(held)},
        rank_for=shares,
    )


def new_directions(weight: Tensor, delta: Tensor, leading: int) -> list[float]:
    """How well the leading directions of a changed weight are known to the weight before (arXiv:2410.21228).

    Args:
        weight: W (out, in).
        delta: The update, of the same shape.
        leading: How many left singular vectors of W + delta to look at.

    Returns:
        For each of these, by falling singular value, the largest |cosine| with a left singular vector of W.
        The paper calls one below a threshold an intruder dimension. Vectors of W whose singular value is
        zero, but for rounding, are no directions of W.

    Cost: two eigenvalue problems of the shorter side in float64: 5 seconds for both at 2048 on two cores, 8
    times that at twice the side.
    """
    before, strengths = _left_vectors(weight.double())
    before = before[:, strengths > strengths.max() * max(weight.shape) * torch.finfo(torch.float32).eps]
    after, _ = _left_vectors(weight.double() + delta.double())
    known = (before.mT @ after[:, :leading]).abs()
    return known.amax(0).tolist() if len(known) else [0.0] * known.shape[1]


def _left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors as columns, and singular values, both by falling value.

    From the Gram matrix of the shorter side, which is several times as fast as an SVD. In float64 its values
    are right down to 1e-8 of the largest, below the last digit of the weights.
    """
    rows, columns = matrix.shape
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix)
    sizes = values.clamp_(min=0).sqrt_().flip(0)
    vectors = vectors.flip(1)
    if rows > columns:
        vectors = matrix @ vectors / torch.where(sizes > 0, sizes, torch.inf)
    return vectors, sizes
