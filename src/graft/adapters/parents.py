"""The adapters that a composition is made of: opened over one base, checked together, read by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import is_additive, method_of
from graft.adapters.deltas import Delta, delta_of
from graft.adapters.peft_config import directory_of
from graft.adapters.peft_open import CONFIG, Description, Opened, check_task, describe, open_adapter
from graft.adapters.peft_tensors import WEIGHTS, check_finite, full_name
from graft.adapters.settings import beside_deltas
from graft.adapters.side_file import FILE, SideFile, tensors_digest
from graft.errors import AdapterError, FingerprintError
from graft.models.fingerprint import Fingerprint
from graft.models.outline import outline


@dataclass(frozen=True)
class Parent:
    """An adapter directory whose files fit the base."""

    told: Description
    opened: Opened
    digest: str
    """Of its tensors, as graft.json has it."""
    shared: nn.Module | None
    """What its layers share."""

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.told.directory

    @property
    def method(self) -> str:
        """Key of METHODS."""
        method: str = self.opened.settings.config.method
        return method

    @property
    def saved(self) -> tuple[str, ...]:
        """Paths of the modules that it trains in full."""
        return self.opened.settings.selection.modules_to_save

    @property
    def num_bytes(self) -> int:
        """Of its tensors' file."""
        return (self.directory / WEIGHTS).stat().st_size

    def delta(self, path: str) -> Delta:
        """Its change of the weight at a path, float64.

        Raises:
            AdapterError: A tensor has values that are not finite.
        """
        layer = self.layer(path)
        return delta_of(layer, self.opened.targets[path])

    def layer(self, path: str) -> Any:
        """Its layer at a path, filled, in float64 on the CPU."""
        whole = self.opened.settings.config
        base, config, method = self.opened.targets[path], whole.at(path), method_of(whole)
        layer: Any = method.build_layer(base, config, None)
        restore = getattr(method, "restored", None)
        for leaf, tensor in layer.tensors().items():
            value = self._read(f"{path}.{leaf}")
            if restore is not None:
                value = restore(base, config, leaf, value, str(self.directory / WEIGHTS))
            tensor.data.copy_(value)
        if self.shared is not None:
            layer.share(self.shared)
        return layer.double()

    def rank(self, path: str) -> int | None:
        """The rank that its settings give the layer at a path; None where the method has none."""
        return getattr(self.opened.settings.config.at(path), "rank", None)

    def saved_tensors(self) -> dict[str, Tensor]:
        """The modules that it trains in full, by the names in the file."""
        prefixes = tuple(f"{path}." for path in self.saved)
        keys = [key for key in self.opened.stored if key.startswith(prefixes)] if prefixes else []
        return {full_name(key): self._read(key).float() for key in keys}

    def _read(self, key: str) -> Tensor:
        tensor = self.opened.stored[key].load()
        check_finite(tensor, full_name(key), str(self.directory / WEIGHTS))
        return tensor


@dataclass(frozen=True)
class Family:
    """Adapters over one base."""

    base: Any
    """The base without its weights; see `outline`."""
    parents: tuple[Parent, ...]
    fingerprint: Fingerprint
    """Of the base; its parts are empty where no parent knows them."""
    forced_base: bool
    """Whether one of them belongs to another base than the others, or was forced on its own."""
    notes: tuple[str, ...]


def open_family(
    adapters: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None, *, force_base: bool
) -> Family:
    """Open adapter directories over the base that they belong to; its weights are not read.

    Args:
        adapters: The directories.
        base: The base; by default what the first one names.
        force_base: Accept adapters of different bases.

    Raises:
        AdapterError: One of them is damaged, does not fit the base, or is of a method whose changes do not
            add up; the base is not named.
        FingerprintError: They belong to different bases.
        ModelError: The base is not there.

    Cost: every tensor of the adapters is read once, one at a time.
    """
    told = [describe(directory_of(adapter, "adapters")) for adapter in adapters]
    fingerprint, forced, notes = _common_base([one.side for one in told], told, force_base)
    first = told[0].settings
    name = base if base is not None else first.base_name
    if not name:
        raise AdapterError(
            "the adapter does not say which base it belongs to",
            where=str(told[0].directory / CONFIG),
            fix="give the base (--base)",
        )
    model = outline(name, first.revision if base is None else None)
    parents = tuple(_open(model, one) for one in told)
    return Family(model, parents, fingerprint, forced, (*notes, *_copies(parents)))


def _open(model: nn.Module, told: Description) -> Parent:
    check_task(model, told)
    opened = open_adapter(model, told)
    config = opened.settings.config
    if not opened.targets:
        raise AdapterError(
            "it adapts no layer, it only trains modules in full: there is no delta to work on",
            where=str(told.directory),
            fix="give an adapter with target_modules",
        )
    _refuse_more_than_deltas(config, told)
    digest = tensors_digest((full_name(key), tensor.load()) for key, tensor in opened.saved.items())
    if told.side is not None and digest != told.side.tensors:
        raise AdapterError(
            f"the tensors were changed after the adapter was saved: digest {digest[:12]}, "
            f"{told.side.tensors[:12]} in {FILE}",
            where=str(told.directory / WEIGHTS),
            fix="copy the adapter again; the file is damaged",
        )
    parent = Parent(told, opened, digest, _shared(config, opened, told.directory / WEIGHTS))
    if not is_additive(parent.layer(next(iter(opened.targets)))):
        raise AdapterError(
            f"it is {config.method}: its change depends on the base's own weight and does not add up",
            where=str(told.directory),
            fix="fold it into its base with graft merge; LoRA and other additive methods can be composed",
        )
    return parent


def _refuse_more_than_deltas(config: Any, told: Description) -> None:
    if told.side is not None and told.side.makes_up:
        raise AdapterError(
            "it makes up for the rounding of its base (init loftq): its delta is no change of the base",
            where=str(told.directory / FILE),
            fix="fold it into its base with graft merge",
        )
    if more := beside_deltas(config):
        raise AdapterError(
            f"it trains more than deltas of weights: {more[0]} is {getattr(config, more[0])!r}",
            where=str(told.directory / CONFIG),
            fix="fold it into its base with graft merge",
        )


def _shared(config: Any, opened: Opened, file: Path) -> nn.Module | None:
    build = getattr(method_of(config), "build_shared", None)
    if build is None:
        return None
    shared: nn.Module = build(list(opened.targets.values()), config)
    for name, buffer in shared.named_buffers():
        if f".{name}" in opened.stored:  # they may be left out of a file
            tensor = opened.stored[f".{name}"].load()
            check_finite(tensor, full_name(f".{name}"), str(file))
            buffer.copy_(tensor)
    return shared


def _common_base(
    sides: Sequence[SideFile | None], told: Sequence[Description], force: bool
) -> tuple[Fingerprint, bool, list[str]]:
    """The fingerprint that the adapters share, whether that was forced, and what to tell.

    Raises:
        FingerprintError: They share none.
    """
    known = [(side.base, one.directory) for side, one in zip(sides, told, strict=True) if side is not None]
    notes = [
        f"{one.directory.name} has no {FILE}: which base it was trained on is not known"
        for one in told
        if one.side is None
    ]
    forced = any(side is not None and side.forced_base for side in sides)
    if not known:
        return Fingerprint("", "", "", ""), forced, notes
    (first, home), *others = known
    for other, directory in others:
        differ = [part for part in ("weights", "tokenizer") if _differ(first, other, part)]
        if differ and not force:
            raise FingerprintError(
                f"{home.name} belongs to base {first.short}, {directory.name} to {other.short}: "
                f"{' and '.join(differ)} differ",
                where=str(directory),
                fix="compose adapters of one base, or insist with force_base=True (--force-base)",
            )
        forced = forced or bool(differ)
        if differ:
            notes.append(f"composed by force: {' and '.join(differ)} of the base of {directory.name} differ")
        if other.quantization != first.quantization:
            notes.append(
                f"{directory.name} was trained on {other.quantization or 'the dense base'}, "
                f"{home.name} on {first.quantization or 'the dense base'}; the result counts as the latter"
            )
    return first, forced, notes


def _differ(one: Fingerprint, other: Fingerprint, part: str) -> bool:
    here, there = getattr(one, part), getattr(other, part)
    return bool(here and there and here != there)


def _copies(parents: Sequence[Parent]) -> list[str]:
    return [
        f"{parent.directory.name} repeats base weights, left out: {', '.join(parent.opened.copies[:3])}"
        for parent in parents
        if parent.opened.copies
    ]
