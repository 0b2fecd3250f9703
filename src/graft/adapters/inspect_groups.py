"""Layers of an adapter taken together, and what follows from their figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from graft.adapters.inspect_records import SHARES, Finding, Group, LayerFacts, SavedFacts

BANDS = ("early", "middle", "late")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ADVISED_SHARE = 0.95
"""The energy that a smaller rank must keep to be advised."""

NEARLY_UNTOUCHED = 0.01
"""A layer is nearly untouched where its update is less than this share of the median one."""

_SHOWN = 5


def place_of_kind(kind: str) -> int:
    """Where a kind of layer stands in the forward pass of a block; kinds that are not a Llama's come last."""
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def bands(layers: Sequence[LayerFacts], num_blocks: int | None, threshold: float) -> tuple[Group, ...]:
    """The first, second and last third of the blocks; layers outside of blocks come last.

    Args:
        layers: All of the adapter.
        num_blocks: Of the base; None takes the blocks up to the last one that has an adapter.
        threshold: The |cosine| under which a direction is new to the base.
    """
    seen = [layer.block for layer in layers if layer.block is not None]
    whole = num_blocks or (max(seen) + 1 if seen else 0)

    def band(layer: LayerFacts) -> str:
        return "outside" if layer.block is None else BANDS[min(2, 3 * layer.block // max(whole, 1))]

    return _groups(layers, band, (*BANDS, "outside"), threshold)


def kinds(layers: Sequence[LayerFacts], threshold: float) -> tuple[Group, ...]:
    """Layers by the last part of their path, those of a Llama in the order of its forward pass."""
    found = dict.fromkeys(layer.kind for layer in layers)
    names = tuple(sorted(found, key=place_of_kind))
    return _groups(layers, lambda layer: layer.kind, names, threshold)


def _groups(
    layers: Sequence[LayerFacts],
    name_of: Callable[[LayerFacts], str],
    names: tuple[str, ...],
    threshold: float,
) -> tuple[Group, ...]:
    whole = _total(layers)
    found = ((name, [layer for layer in layers if name_of(layer) == name]) for name in names)
    return tuple(_group(name, members, whole, threshold) for name, members in found if members)


def _total(layers: Sequence[LayerFacts]) -> float | None:
    norms = [layer.norm for layer in layers]
    if any(norm is None for norm in norms):
        return None
    return math.sqrt(math.fsum(norm * norm for norm in norms if norm is not None))


def _group(name: str, members: Sequence[LayerFacts], whole: float | None, threshold: float) -> Group:
    norm = _total(members)
    weights = [
        (layer.norm / layer.update_ratio) ** 2 for layer in members if layer.norm and layer.update_ratio
    ]
    known = bool(norm) and len(weights) == len([layer for layer in members if layer.norm])
    seen = any(layer.cosines is not None for layer in members)
    return Group(
        name=name,
        layers=len(members),
        parameters=sum(layer.parameters for layer in members),
        norm=norm,
        share=(norm / whole) ** 2 if norm is not None and whole else None,
        effective_rank=_mean(layer.effective_rank for layer in members),
        stable_rank=_mean(layer.stable_rank for layer in members),
        rank_for={
            share: max(layer.rank_for[share] for layer in members if share in layer.rank_for)
            for share in SHARES
            if any(share in layer.rank_for for layer in members)
        },
        update_ratio=norm / math.sqrt(math.fsum(weights)) if norm and known else None,
        intruders=sum(count_new(layer, threshold) for layer in members) if seen else None,
    )


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def findings(
    layers: Sequence[LayerFacts], saved: Sequence[SavedFacts], *, dead: bool, threshold: float
) -> Iterator[Finding]:
    """What the user should know, or may want to do, where the figures bear it out.

    Args:
        layers: All of the adapter.
        saved: What it trained in full.
        dead: Whether none of them changes anything.
        threshold: The |cosine| under which a direction is new to the base.
    """
    if dead:
        yield Finding(
            level="alarm",
            text=f"THE ADAPTER IS DEAD: none of its {len(layers)} layers changes anything. "
            "It was never trained, or its training did not reach it",
        )
        return
    idle = [layer.path for layer in layers if layer.idle]
    if idle:
        yield Finding(
            level="alarm", text=f"{len(idle)} of {len(layers)} layers change nothing at all: {_some(idle)}"
        )
    still = [item.name for item in saved if item.change_ratio == 0]
    if still:
        yield Finding(
            level="alarm",
            text=f"{len(still)} of {len(saved)} tensors trained in full are still the base's: {_some(still)}",
        )
    yield from _untouched(layers)
    yield from _smaller_rank(layers)
    yield from _loud(layers)
    yield from _intruders(layers, threshold)


def _untouched(layers: Sequence[LayerFacts]) -> Iterator[Finding]:
    by_ratio = all(layer.update_ratio is not None for layer in layers)
    sizes = {layer.path: layer.update_ratio if by_ratio else layer.norm for layer in layers}
    known = {path: size for path, size in sizes.items() if size}
    if len(known) < 3:
        return
    median = statistics.median(known.values())
    small = [path for path, size in known.items() if size < NEARLY_UNTOUCHED * median]
    if small:
        yield Finding(
            level="advice",
            text=f"{len(small)} layers are nearly untouched, their updates under {NEARLY_UNTOUCHED:.0%} of "
            f"the median one ({_some(small)}): leave them out, or see why they do not learn",
        )


def _smaller_rank(layers: Sequence[LayerFacts]) -> Iterator[Finding]:
    needs = [
        (layer.rank_for[ADVISED_SHARE], layer.rank)
        for layer in layers
        if layer.rank and ADVISED_SHARE in layer.rank_for and len(layer.values or ()) <= layer.rank
    ]
    if not needs:
        return
    most, rank = max(need for need, _ in needs), min(rank for _, rank in needs)
    typical = math.ceil(statistics.median(need for need, _ in needs))
    if most <= 3 * rank / 4:
        yield Finding(
            level="advice",
            text=f"rank {most} would hold {ADVISED_SHARE:.0%} of the energy of every layer's update; it is "
            f"{rank} now, and the typical layer needs {typical}",
        )
    elif typical <= rank / 2:
        yield Finding(
            level="advice",
            text=f"half of the layers need rank {typical} or less for {ADVISED_SHARE:.0%} of their energy, "
            f"one needs {most} of {rank}: rank_pattern can give each its own",
        )


def _loud(layers: Sequence[LayerFacts]) -> Iterator[Finding]:
    loud = [layer.path for layer in layers if layer.update_ratio is not None and layer.update_ratio > 1]
    if loud:
        yield Finding(
            level="alarm",
            text=f"{len(loud)} of {len(layers)} updates are larger than the weight below: {_some(loud)}. "
            "Such a model has left its base; the learning rate or alpha was too large",
        )


def _intruders(layers: Sequence[LayerFacts], threshold: float) -> Iterator[Finding]:
    seen = [layer for layer in layers if layer.cosines]
    new = {layer.path: count_new(layer, threshold) for layer in seen}
    having = [path for path, count in new.items() if count]
    if not having:
        return
    looked = sum(len(layer.cosines or ()) for layer in seen)
    yield Finding(
        level="note",
        text=f"{sum(new.values())} of the {looked} leading directions are new to the base (|cosine| under "
        f"{threshold:g}), in {len(having)} of {len(seen)} layers: {_some(having)}. Models with such "
        "directions were found to forget more (arXiv:2410.21228); a larger rank makes fewer",
    )


def count_new(layer: LayerFacts, threshold: float) -> int:
    """Leading directions of a layer that are new to the base."""
    return sum(cosine < threshold for cosine in layer.cosines or ())


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more
