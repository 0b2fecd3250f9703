"""Adapters composed into a new one in delta space: exact sums, truncation, TIES, DARE, pruning, resizing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.adapters import sparsify
from graft.adapters.composed_files import LINEAGE, Composed, common_facts
from graft.adapters.composition import ELECTING, SEEDED, THINNED, ComposeConfig
from graft.adapters.deltas import Delta, Product, dense, norm, weighted_sum
from graft.adapters.initializers import generator_for
from graft.adapters.parents import Family, Parent, open_family
from graft.adapters.patterns import first_match
from graft.adapters.peft_config import directory_of
from graft.adapters.peft_tensors import WEIGHTS
from graft.adapters.settings import pair
from graft.adapters.targets import base_layers
from graft.adapters.truncate import NOISE, Spectrum, joined_error, spectrum
from graft.config import did_you_mean, to_dict
from graft.dialects import explained
from graft.errors import AdapterError, ConfigError, StorageError

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@dataclass(frozen=True, kw_only=True)
class ComposedLayer:
    """What became of one layer."""

    path: str
    ranks_before: tuple[int | None, ...]
    """Of each adapter; None where it does not adapt the layer, or its method has no rank."""
    rank: int
    """Of the result; 0 where nothing is left, and the layer is no target."""
    error: float
    """||delta - written||_F / ||delta||_F, measured, where delta is what the operation asks for."""
    norm: float
    """||delta||_F."""


@dataclass(frozen=True, kw_only=True)
class ComposeReport:
    """What a composition did."""

    directory: Path
    """The new adapter."""
    operation: str
    parents: tuple[dict[str, Any], ...]
    """Of each adapter its name, digests, method, weight and bytes."""
    layers: tuple[ComposedLayer, ...]
    error: float
    """||delta - written||_F / ||delta||_F over all layers together."""
    num_parameters: int
    num_bytes: int
    """Of the tensors' file."""
    bytes_before: int
    """Of those of all adapters together."""
    forced_base: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "directory": str(self.directory), "notes": list(self.notes)}


@explained
def compose(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    config: ComposeConfig | str,
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    force_base: bool = False,
    progress: Progress | None = None,
) -> ComposeReport:
    """Make one adapter of several, or another one of one, and write it as a plain LoRA that PEFT loads.

    All of it happens on the true deltas scaling * B A, layer by layer in float64, so that ranks, alphas,
    rsLoRA, target sets and additive methods may differ between the adapters. An adapter that lacks a layer
    adds nothing there. Weights and scalings are folded into the factors: alpha is the rank.

    Args:
        adapters: Directories, in the order of the weights; one alone may stand without a list.
        config: What to do, or only its operation.
        out: A new directory.
        base: The base; by default the one that the first adapter names. Only its config.json is read.
        force_base: Accept adapters of different bases; recorded.
        progress: Told after each layer.

    Returns:
        Ranks and truncation errors layer by layer, sizes, what else to know.

    Raises:
        ConfigError: The operation does not go with the adapters or its settings.
        AdapterError: An adapter is damaged, does not fit, is of a method that does not add up or trains
            modules in full; or nothing is left of all of them together.
        FingerprintError: They belong to different bases.
        StorageError: `out` exists or cannot be written.

    Cost: of each layer the deltas of all adapters at once where the operation works number by number or a
    method has no factors (`spectrum` tells the time); else memory and time as small as the ranks.

    Source: TIES, arXiv:2306.01708; DARE, arXiv:2311.03099; Eckart and Young, 1936.
    """
    config = ComposeConfig(operation=config) if isinstance(config, str) else config  # type: ignore[arg-type]
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Sequence):
        adapters = [adapters]
    config.check_count(len(adapters))
    directory = new_place(out)
    family = open_family(adapters, base, force_base=force_base)
    _check_saved(config, family.parents)
    weights = config.factors(len(adapters))
    parents = list(zip(family.parents, weights, strict=True))
    facts, notes = common_facts(p.told.side.facts for p in family.parents if p.told.side is not None)
    composed = Composed(family.base, family.fingerprint, family.forced_base)
    for parent in family.parents:
        composed.saved |= parent.saved_tensors()
        composed.saved_paths += parent.saved
    layers = []
    paths = _paths(family, config)
    for number, path in enumerate(paths, 1):
        layers.append(_composed(path, config, parents, composed))
        if progress is not None:
            progress(number, len(paths))
    empty = [layer.path for layer in layers if not layer.rank]
    if len(empty) == len(layers):
        raise AdapterError(
            f"nothing is left: the deltas of all {len(layers)} layers cancel out",
            where=", ".join(str(parent.directory) for parent in family.parents),
            fix="the base alone does the same",
        )
    if empty:
        notes.append(f"{len(empty)} of {len(layers)} layers cancel out and are left out: {_some(empty)}")
    told = tuple(_told(parent, weight) for parent, weight in parents)
    error = joined_error([layer.error for layer in layers], [layer.norm for layer in layers])
    settings = {key: value for key, value in to_dict(config).items() if value not in (None, [], ())}
    lineage = {**settings, "weights": list(weights), "error": error, "parents": list(told)}
    composed.write(directory, {**facts, LINEAGE: lineage})
    return ComposeReport(
        directory=directory,
        operation=config.operation,
        parents=told,
        layers=tuple(layers),
        error=error,
        num_parameters=composed.num_parameters,
        num_bytes=(directory / WEIGHTS).stat().st_size,
        bytes_before=sum(parent.num_bytes for parent in family.parents),
        forced_base=family.forced_base,
        notes=(*family.notes, *notes),
    )


def new_place(out: str | os.PathLike[str]) -> Path:
    """Where a composed adapter is to go.

    Raises:
        AdapterError: It is no path.
        StorageError: Something is there already.
    """
    directory = directory_of(out, "out")
    if directory.exists():
        raise StorageError("already exists", where=str(directory), fix="choose another name or remove it")
    return directory


def _check_saved(config: ComposeConfig, parents: Sequence[Parent]) -> None:
    for parent in parents:
        if parent.saved and config.operation != "resize":
            raise AdapterError(
                f"it trains {_some(parent.saved)} in full; {config.operation} is not defined on modules",
                where=str(parent.directory),
                fix="resize keeps them as they are; else compose adapters without modules_to_save",
            )


def _paths(family: Family, config: ComposeConfig) -> list[str]:
    """The layers that any of the adapters adapts, in the order of the model.

    Raises:
        ConfigError: An item of rank_pattern matches none of them.
    """
    found = {path for parent in family.parents for path in parent.opened.targets}
    for item in config.rank_pattern:
        if not any(list(first_match((item,), path)) for path in found):
            raise ConfigError(
                f"{item!r} matches none of the {len(found)} layers",
                where="compose.rank_pattern",
                fix=did_you_mean(item.rpartition("=")[0], {path.rpartition(".")[2] for path in found}),
            )
    return [path for path in base_layers(family.base) if path in found]


def _composed(
    path: str, config: ComposeConfig, parents: Sequence[tuple[Parent, float]], composed: Composed
) -> ComposedLayer:
    ranks = tuple(p.rank(path) if path in p.opened.targets else None for p, _ in parents)
    taking = [(number, *one) for number, one in enumerate(parents) if path in one[0].opened.targets]
    deltas = [parent.delta(path) for _, parent, _ in taking]
    weights = [weight for _, _, weight in taking]
    scale = sum(abs(weight) * norm(delta) for weight, delta in zip(weights, deltas, strict=True))
    numbers = [number for number, _, _ in taking]
    delta = _combined(config, deltas, weights, _generators(config, path, numbers))
    size = norm(delta)
    product = _factored(path, config, delta, scale) if size > NOISE * scale else None
    if product is None or not product.rank:
        return ComposedLayer(path=path, ranks_before=ranks, rank=0, error=0.0, norm=0.0)
    written = composed.add(path, product)
    error = norm(weighted_sum([delta, written], [1.0, -1.0])) / size
    return ComposedLayer(path=path, ranks_before=ranks, rank=written.rank, error=error, norm=size)


def _generators(config: ComposeConfig, path: str, numbers: Sequence[int]) -> Iterator[Any]:
    for number in numbers if config.operation in SEEDED else ():
        yield generator_for(config.seed or 0, f"{path} of adapter {number}")


def _combined(
    config: ComposeConfig, deltas: Sequence[Delta], weights: Sequence[float], generators: Iterator[Any]
) -> Delta:
    if config.operation not in THINNED:
        return weighted_sum(deltas, weights)
    density = config.density or 1.0
    if config.operation in SEEDED:
        thin = [
            sparsify.drop(dense(one), density, drawn) for one, drawn in zip(deltas, generators, strict=True)
        ]
    else:
        thin = [sparsify.trim(dense(one), density) for one in deltas]
    if config.operation in ELECTING:
        return sparsify.elect(thin, weights, config.majority or "total")
    return weighted_sum(thin, weights)


def _factored(path: str, config: ComposeConfig, delta: Delta, scale: float) -> Product:
    """The factors to write; those that are there already where no rank is cut and none is beyond need."""
    if not config.truncates and isinstance(delta, Product) and not delta.is_wide:
        return delta
    found = spectrum(delta, scale)
    return found.truncated(_rank(path, config, found))


def _rank(path: str, config: ComposeConfig, found: Spectrum) -> int:
    for item in first_match(config.rank_pattern, path):
        return min(int(pair(item, "compose.rank_pattern")[1]), len(found.values))
    if config.rank is not None:
        return min(config.rank, len(found.values))
    return found.rank_for(1.0 if config.energy is None else config.energy)


def _told(parent: Parent, weight: float) -> dict[str, Any]:
    side = parent.told.side
    return {
        "name": _name(parent.directory.resolve()),
        "method": parent.method,
        "weight": weight,
        "tensors": parent.digest,
        "settings": side.settings if side is not None else None,
        "bytes": parent.num_bytes,
        "facts": side.facts if side is not None else {},
    }


def _name(directory: Path) -> str:
    """Of a run's adapter the run is what tells."""
    return f"{directory.parent.name}/{directory.name}" if directory.name == "adapter" else directory.name


def _some(paths: Sequence[str]) -> str:
    return ", ".join([*paths[:5], *(["..."] if len(paths) > 5 else [])])
