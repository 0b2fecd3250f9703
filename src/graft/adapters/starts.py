"""Starts that need more than a layer: batches of data, or the weights before they were rounded.

What a start is made from never changes: a start that is not zero is subtracted from the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.data_starts import Pass, input_moments, pass_of, weight_gradients
from graft.adapters.factorize import gradient_factors
from graft.adapters.rounding_starts import Start, loftq_starts
from graft.adapters.settings import DATA, MAX_RANK, RANDOM
from graft.errors import AdapterError, ConfigError, TargetError
from graft.models.layers import BaseLayer

SUBTRACTED = ("pissa", "olora", "lora_ga")
"""Starts that are not zero, and from which the update is measured."""

WIDTHS = {"pissa": 1, "olora": 1, "loftq": 1, "lora_ga": 2}
"""How many times the rank the smaller side of a weight must have."""


@dataclasses.dataclass(frozen=True)
class Starts:
    """Where the layers of an adapter start, and what its settings became by that."""

    config: Any
    layers: Mapping[str, Start]
    """By path; layers without one start as the settings say."""
    targets: tuple[str, ...]
    """The layers that get an adapter: with eva some may not."""
    notes: tuple[str, ...] = ()


def is_made_elsewhere(config: Any) -> bool:
    """Whether a layer alone cannot make the start that its settings ask for."""
    return getattr(config, "init", "") in (*DATA, "loftq")


def check_targets(config: Any, targets: Mapping[str, BaseLayer]) -> None:
    """Refuse layers that a start cannot be made for.

    Raises:
        TargetError: An embedding.
        ConfigError: A rank that the start does not have for a layer.
    """
    init = getattr(config, "init", "kaiming")
    if init in ("kaiming", "gaussian"):
        return
    for path, base in targets.items():
        if base.kind == "embedding":
            raise TargetError(
                f"{path} is an embedding, which cannot start with init {init!r}",
                where="adapter.target_modules",
                fix="take it out of the targets, or leave init out",
            )
        rank = config.at(path).rank
        side, largest = min(base.in_features, base.out_features), MAX_RANK // 2
        wanted = ""
        if init == "orthogonal" and rank % 2:
            wanted = "an even one"
        elif init in WIDTHS and rank * WIDTHS[init] > side:
            wanted = f"at most {side // WIDTHS[init]} for its {base.out_features} x {base.in_features}"
        elif init in SUBTRACTED and rank > largest:
            wanted = f"at most {largest}: it is saved with twice its rank"
        if wanted:
            raise ConfigError(
                f"init {init!r} has no start of rank {rank} for {path}",
                where="adapter.rank",
                fix=f"give {wanted}, with adapter.rank_pattern for this layer alone",
            )


def make_starts(
    model: nn.Module,
    config: Any,
    targets: Mapping[str, BaseLayer],
    batches: Iterable[Mapping[str, Any] | Pass] | None,
) -> Starts:
    """Make the starts that a layer alone cannot make.

    Args:
        model: Holds the targets; it may carry other adapters, which have no part in it.
        config: The method's settings.
        targets: Layers by path.
        batches: Data for eva and lora_ga; as many are taken as init_batches says.

    Raises:
        ConfigError: Data is missing, or given for a start that has no use for it.
        AdapterError: A layer tells nothing: no input, no gradient, or other weights than its files hold.
        ModelError: The weights before rounding are not to be had.

    Cost: for eva and lora_ga a pass over the batches for each 2 GiB of matrices, (in, in) or (out, in) in
    float32 for a layer, and a randomized SVD of each; for loftq the weights are read again instead.
    """
    if config.init not in DATA:
        return Starts(config, loftq_starts(model, config, targets), tuple(targets))
    if batches is None:
        raise ConfigError(
            f"init {config.init!r} looks at data, and there is none",
            where="adapter.init",
            fix="graft.attach(model, config, batches=[...]) with what the model takes, labels among it; "
            "graft train gives its training data",
        )
    passes = [pass_of(batch) for batch in islice(batches, config.init_batches)]
    if not passes:
        raise ConfigError(f"init {config.init!r} got no batch", where="batches", fix="give some")
    if config.init == "lora_ga":
        layers = dict(_gradient_starts(model, config, targets, passes))
        return Starts(config, layers, tuple(targets))
    return _variance_starts(model, config, targets, passes)


def stored_starts(config: Any, targets: Sequence[str], stored: Mapping[str, Tensor]) -> Starts | None:
    """The starts of an adapter whose tensors are kept: ranks and what is subtracted are read from them.

    Args:
        config: The settings as they were before the start was made.
        targets: The layers that they select.
        stored: The adapter's tensors, by the keys of `attached.all_tensors`.

    Returns:
        The starts; None for settings whose start is drawn.
    """
    if getattr(config, "init", "kaiming") in RANDOM:
        return None
    layers = {}
    for path in targets:
        subtract = f"{path}.start_A" in stored
        keys = ("start_A", "start_B") if subtract else ("lora_A.weight", "lora_B.weight")
        if all(f"{path}.{key}" in stored for key in keys):
            down, up = (stored[f"{path}.{key}"] for key in keys)
            layers[path] = Start(down, up, subtract)
    kept = tuple(layers) if config.init == "eva" else tuple(targets)
    ranks = {path: len(start.lora_A) for path, start in layers.items()}
    return Starts(with_ranks(config, ranks) if config.init == "eva" else config, layers, kept)


def with_ranks(config: Any, ranks: Mapping[str, int]) -> Any:
    """The settings with other ranks: exactly these layers, each with the scaling that it had.

    Args:
        config: Settings with rank and alpha.
        ranks: By path.
    """
    alphas = {}
    for path, rank in ranks.items():
        here = config.at(path)
        alphas[path] = here.scaling * (rank**0.5 if here.use_rslora else rank)
    return dataclasses.replace(
        config,
        target_modules=tuple(ranks),
        exclude_modules=(),
        layers=None,
        rank_pattern=tuple(f"{path}={rank}" for path, rank in ranks.items() if rank != config.rank),
        alpha_pattern=tuple(f"{path}={alpha!r}" for path, alpha in alphas.items() if alpha != config.alpha),
    )


def shared_out(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """How many directions each layer gets of a budget: those with the largest shares, over all layers.

    Args:
        shares: For each layer the shares of variance of its directions, falling.
        budget: Directions in all.

    Source: EVA, arXiv:2410.07170, sec. 3.
    """
    ranked = sorted(
        ((-share, place, path) for place, path in enumerate(shares) for share in shares[path]),
        key=lambda item: item[:2],
    )
    counts = dict.fromkeys(shares, 0)
    for _, _, path in ranked[:budget]:
        counts[path] += 1
    return counts


def _variance_starts(
    model: nn.Module, config: Any, targets: Mapping[str, BaseLayer], passes: Sequence[Pass]
) -> Starts:
    asked = {path: config.at(path).rank for path in targets}
    rows: dict[str, Tensor] = {}
    shares: dict[str, list[float]] = {}
    for path, moments in input_moments(model, targets, passes):
        if not bool(moments.products.isfinite().all()):
            _refuse_silent(path, "inputs that are not finite", "look at the data and at the base")
        number = min(round(asked[path] * config.eva_rho), targets[path].in_features)
        rows[path], found = moments.directions(number)
        shares[path] = found.tolist()
        # Experts may see no token; with ranks to be shared out they get none.
        if config.eva_rho == 1 and len(rows[path]) < asked[path]:
            _refuse_silent(
                path, f"{moments.count} inputs, too few for rank {asked[path]}", "give more batches"
            )
    if not any(share > 0 for found in shares.values() for share in found):
        _refuse_silent(
            next(iter(targets)), "no inputs that differ, nor any other layer", "give other batches"
        )
    fixed = config.eva_rho == 1
    counts = asked if fixed else shared_out(shares, sum(asked.values()))
    kept = {path: rank for path, rank in counts.items() if rank}
    layers = {
        path: Start(rows[path][:rank], torch.zeros(targets[path].out_features, rank), subtract=False)
        for path, rank in kept.items()
    }
    notes = [f"eva: ranks from {min(kept.values())} to {max(kept.values())}, {sum(kept.values())} in all"]
    if len(kept) < len(counts):
        left = [path for path in counts if path not in kept]
        some = ", ".join([*left[:5], *(["..."] if len(left) > 5 else [])])
        notes.append(f"eva leaves {len(left)} of {len(counts)} layers without an adapter: {some}")
    return Starts(config if fixed else with_ranks(config, kept), layers, tuple(kept), tuple(notes))


def _gradient_starts(
    model: nn.Module, config: Any, targets: Mapping[str, BaseLayer], passes: Sequence[Pass]
) -> Iterator[tuple[str, Start]]:
    for path, gradient in weight_gradients(model, targets, passes):
        size = float(gradient.abs().max())
        if not 0 < size < float("inf"):
            _refuse_silent(
                path,
                "no gradient" if size == 0 else "a gradient that is not finite",
                "give batches whose labels reach it, or take it out of the targets",
            )
        yield path, Start(*gradient_factors(gradient / size, config.at(path).rank), subtract=True)


def _refuse_silent(path: str, what: str, fix: str) -> None:
    raise AdapterError(f"{path} has {what}", where=path, fix=fix)
