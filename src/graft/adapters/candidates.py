"""The ways of writing a merged model, made tensor by tensor, and how much of the update each one keeps.

W is the base as its files have it, Q(W) what a quantized base computes with, d the update of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from graft.adapters.folder import Folder
from graft.models.contents import Contents
from graft.models.keys import Fill, check_finite
from graft.models.quantize import QuantizedPlan
from graft.models.shards import StoredTensor
from graft.quant.config import QuantizationConfig
from graft.quant.tensor import QuantizedTensor, plain_constants, shifted

Origin = Literal["dense", "dequantized"]
Load = Callable[[StoredTensor], Tensor]

_ROWS = 256
"""Rows that are compared at a time."""


@dataclass(frozen=True)
class Form:
    """One way of writing the merged model."""

    name: str
    """dense: W + d; dequantized: Q(W) + d; quantized: the same in the codes of Q(W), d in the shifts of its
    blocks; requantized: Q(Q(W) + d); requantized_dense: Q(W + d)."""
    origin: Origin
    """What the update is added to."""
    plan: QuantizedPlan | None
    """Which linears are written as codes; None for none."""

    @property
    def exact(self) -> bool:
        """Whether the codes are the live model's own and nothing is rounded."""
        return self.name == "quantized"


@dataclass
class LayerFigures:
    """What became of the update of one tensor; sums over its elements."""

    update_squares: float = 0.0
    """Of d."""
    kept: float = 0.0
    """Of d times what the written tensor differs from the written base."""
    error_squares: float = 0.0
    """Of what the written tensor differs from the live one."""

    @property
    def survival(self) -> float:
        """The share of the update that is in the written weights: kept / update_squares; 1 without update."""
        return self.kept / self.update_squares if self.update_squares else 1.0

    @property
    def error(self) -> float:
        """The distance from the live weights over the size of the update."""
        return math.sqrt(self.error_squares / self.update_squares) if self.update_squares else 0.0

    def to_dict(self) -> dict[str, float]:
        """As JSON values."""
        return {
            "update_norm": math.sqrt(self.update_squares),
            "survival": self.survival,
            "error": self.error,
        }


@dataclass
class Tally:
    """What became of the updates of all layers."""

    layers: dict[str, LayerFigures] = field(default_factory=dict)

    @property
    def whole(self) -> LayerFigures:
        """Of all layers together."""
        figures = self.layers.values()
        return LayerFigures(
            sum(f.update_squares for f in figures),
            sum(f.kept for f in figures),
            sum(f.error_squares for f in figures),
        )


@dataclass
class Weights:
    """The weights of a base, of the live model over it and of each merged form, one fill at a time."""

    contents: Contents
    folder: Folder
    live: QuantizedPlan | None
    """How the live model quantizes dense files as it loads; None where it does not."""
    dtype: torch.dtype | None
    """Of what is written dense; None for the dtype of each tensor as stored."""
    known: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.known = frozenset(name for fill in self.contents.fills for name in fill.targets or ())

    @property
    def origin(self) -> Origin:
        """What the live model computes with."""
        return "dequantized" if self.live is not None or self.contents.is_packed else "dense"

    def running(self, contents: Contents, fill: Fill, *, with_adapter: bool) -> Iterator[tuple[str, Any]]:
        """What the live model, or the base under it, has in memory for a fill; layers of the adapter apart.

        Args:
            contents: Of the same directory; gets the tensors.
            fill: One of its fills.
            with_adapter: Whether modules that were trained in full have their trained values.
        """
        for name, value in contents.read(fill, _load).items():
            for owner in self.folder.owners(name, self.known):
                if with_adapter and owner in self.folder.saved:
                    yield owner, self.folder.saved[owner]
                else:
                    if isinstance(value, Tensor):
                        value = self.folder.as_trained(owner, value)
                    yield owner, self._quantized(self.live, owner, value, fill.sources[0])

    def written(
        self, form: Form, fill: Fill, load: Load | None = None, tally: Tally | None = None
    ) -> Iterator[tuple[str, Any]]:
        """What a form writes for a fill: tensors as the modules have them, or quantized weights.

        Args:
            form: The form.
            fill: One of the fills of `contents`.
            load: Reads a stored tensor; by default at once.
            tally: Gets what became of the updates.

        Raises:
            ModelError: A tensor cannot be read, is not finite, or too large for float16.
            AdapterError: The adapter's file repeats a base weight that is another one.
        """
        for name, value in self.contents.read(fill, load or _load).items():
            for owner in self.folder.owners(name, self.known):
                yield owner, self._written(form, owner, value, fill.sources[0], tally)

    def _written(self, form: Form, name: str, value: Any, source: StoredTensor, tally: Tally | None) -> Any:
        if isinstance(value, Tensor):
            self.folder.check_copies(name, value)
        target = form.plan is not None and name.removesuffix(".weight") in form.plan.targets
        if form.exact and target:
            return self._moved(name, value, source, tally)
        if not self.folder.touches(name):
            same = form.plan is not None and isinstance(value, QuantizedTensor)
            if same and target and form.plan is not None and _alike(value.config, form.plan.settings):
                return value
            return self._rounded(form, name, self._from(form.origin, name, value, source), value, source)
        start = self.folder.as_trained(name, self._from(form.origin, name, value, source)).float()
        merged = self.folder.merged(name, start)
        codes = None if form.plan is None else self.folder.in_codes(name, start)
        made = self._rounded(form, name, merged, value, source) if codes is None else codes
        if tally is not None:
            base = self._rounded(form, name, start, value, source)
            live = merged
            if form.origin != self.origin:
                live = self.folder.merged(name, self._from(self.origin, name, value, source).float())
            if codes is not None:  # what the update changes is the rounded base
                start = self._decoded(name, base)
            parts = (start, merged, self._decoded(name, base), self._decoded(name, made), live)
            tally.layers[name] = _figures(*parts)
        return made

    def _moved(self, name: str, value: Any, source: StoredTensor, tally: Tally | None) -> QuantizedTensor:
        """The live model's codes, with the update in the shifts of the blocks; constants in float32."""
        stored: QuantizedTensor = plain_constants(self._quantized(self.live, name, value, source))
        if not self.folder.touches(name):
            return stored
        added = self.folder.block_update(name.removesuffix(".weight"), stored.config.blocksize)
        assert added is not None, name
        made = shifted(stored, added.reshape(-1))
        if tally is not None:
            start = self._decoded(name, stored)
            merged = self.folder.merged(name, start)
            tally.layers[name] = _figures(start, merged, start, self._decoded(name, made), merged)
        return made

    def _from(self, origin: Origin, name: str, value: Any, source: StoredTensor) -> Tensor:
        """The weight before the update, as the module has it; fp32 where it was decoded."""
        if origin == "dequantized":
            value = self._quantized(self.live, name, value, source)
        return self._decoded(name, value)

    def _quantized(self, plan: QuantizedPlan | None, name: str, value: Any, source: StoredTensor) -> Any:
        path = name.removesuffix(".weight")
        if plan is None or isinstance(value, QuantizedTensor) or path == name or path not in plan.targets:
            return value
        return plan.quantized(path, value, source)

    def _rounded(self, form: Form, name: str, value: Tensor, stored: Any, source: StoredTensor) -> Any:
        """A weight as the form stores it."""
        if form.plan is not None and name.removesuffix(".weight") in form.plan.targets:
            return self._quantized(form.plan, name, value, source)
        if not value.is_floating_point():
            return value
        dtype: torch.dtype = stored.dtype
        if self.dtype is not None:
            dtype = self.contents.expected[name].dtype
        rounded = value.to(dtype)
        if dtype == torch.float16 != value.dtype:
            check_finite(rounded, source, "too large for float16")
        return rounded

    def _decoded(self, name: str, value: Any) -> Tensor:
        """A weight as the module has it."""
        from transformers.pytorch_utils import Conv1D

        if isinstance(value, Tensor):
            return value
        decoded: Tensor = value.dequantize(torch.float32)
        module = self.contents.model.get_submodule(name.removesuffix(".weight"))
        return decoded.t() if isinstance(module, Conv1D) else decoded


def _load(source: StoredTensor) -> Tensor:
    return source.load()


def _figures(start: Tensor, merged: Tensor, base: Tensor, made: Tensor, live: Tensor) -> LayerFigures:
    """Sums over rows, some at a time: none of the differences is ever whole in memory."""
    figures = LayerFigures()
    for rows in zip(*(part.split(_ROWS) for part in (start, merged, base, made, live)), strict=True):
        first, folded, plain, written, wanted = (part.double() for part in rows)
        update = folded - first
        figures.update_squares += float(update.square().sum())
        figures.kept += float((update * (written - plain)).sum())
        figures.error_squares += float((written - wanted).square().sum())
    return figures


def _alike(one: QuantizationConfig, other: QuantizationConfig) -> bool:
    return replace(one, skip_modules=()) == replace(other, skip_modules=())
