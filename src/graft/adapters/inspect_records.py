"""What an inspection of an adapter finds: plain values, for tables, pages and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SHARES = (0.9, 0.95, 0.99)
"""Shares of the energy ||update||_F^2 for which the number of directions is told."""

SHOWN_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of directions for which the share of the energy is told."""

DIGITS = 6
"""Significant digits that JSON and pages have."""


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One tensor of the file."""

    name: str
    """As in the file."""
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    norm: float
    """Frobenius."""
    largest: float
    """The largest absolute value."""


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What the adapter makes of one layer. None stands for what cannot be told without the base."""

    path: str
    block: int | None
    """The number of the block that it lies in."""
    kind: str
    """The last part of the path: q_proj, down_proj."""
    parameters: int
    """Numbers that the file has for it."""
    rank: int | None = None
    scaling: float | None = None
    shape: tuple[int | None, int | None] = (None, None)
    """(out_features, in_features) of the layer."""
    of: Literal["update", "direction", ""] = ""
    """What the values are of: the whole update; of DoRA without the base s B A, before the magnitudes."""
    values: tuple[float, ...] | None = None
    """Singular values, falling."""
    norm: float | None = None
    """||update||_F."""
    effective_rank: float | None = None
    stable_rank: float | None = None
    energy: Mapping[int, float] = field(default_factory=dict)
    """The share of the energy that so many directions hold."""
    rank_for: Mapping[float, int] = field(default_factory=dict)
    """Directions that hold a share of the energy."""
    balance: float | None = None
    """||A||_F / ||B||_F."""
    update_ratio: float | None = None
    """||update||_F / ||W||_F."""
    cosines: tuple[float, ...] | None = None
    """Of each leading left singular vector of W + update the largest |cosine| with those of W."""
    idle: bool | None = None
    """Whether it changes nothing."""
    note: str = ""
    """What could not be told, and why."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers taken together: a band of blocks, or all layers of one kind."""

    name: str
    layers: int
    parameters: int
    norm: float | None
    """Root of the sum of the squares of the norms of the updates."""
    share: float | None
    """Of the energy of all updates."""
    effective_rank: float | None
    """Mean over the layers."""
    stable_rank: float | None
    """Mean over the layers."""
    rank_for: Mapping[float, int]
    """The most directions that one of its layers needs for a share of its energy."""
    update_ratio: float | None
    """Norms of all updates together over those of all weights."""
    intruders: int | None
    """Leading directions of W + update that are not among those of W, over all its layers."""


@dataclass(frozen=True, kw_only=True)
class SavedFacts:
    """A tensor of a module that was trained in full."""

    name: str
    parameters: int
    norm: float
    change_ratio: float | None
    """||trained - base||_F / ||base||_F, with the base at hand."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that the user should know, or may want to do."""

    level: Literal["alarm", "advice", "note"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that was found."""

    directory: str
    method: str
    peft_type: str
    base_name: str | None
    """The base that adapter_config.json names."""
    base_digest: str | None
    """The first 12 digits of the base's fingerprint; None without a side file."""
    base_quantization: str | None
    """What the base was quantized as in training; "" for a dense one, None without a side file."""
    base_checked: bool
    """Whether the base at hand was found to be the one that it was trained on."""
    measured_on: str | None
    """The base at hand."""
    settings: Mapping[str, Any]
    """The method's settings, but for what is left at its default."""
    trained: Mapping[str, Any]
    """What it was trained on, as far as the files say."""
    bytes: int
    """Of all its tensors."""
    parameters: int
    dead: bool
    """Whether no layer of it changes anything."""
    threshold: float
    """The |cosine| under which a direction counts as an intruder."""
    tensors: tuple[TensorFacts, ...]
    layers: tuple[LayerFacts, ...]
    saved: tuple[SavedFacts, ...]
    bands: tuple[Group, ...]
    kinds: tuple[Group, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, floats with six significant digits."""
        told: dict[str, Any] = _rounded(asdict(self))
        return told


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, tuple | list) else value
