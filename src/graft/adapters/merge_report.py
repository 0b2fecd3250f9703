"""What a merge measured: each candidate beside the live model, which one was written, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.adapters.likeness import Likeness
from graft.models.fingerprint import Fingerprint

MIN_SURVIVAL = 0.1
"""Share of the update that must be in the written weights; with less the adapter is as good as gone."""

MIN_EFFECT = 1e-6
"""Part of the largest logit that an adapter must move one by: less is rounding of fp32."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way of writing the merged model, measured against the live one. All is computed in fp32."""

    name: str
    """dense: the base's own weights and the update; dequantized: the decoded weights of the quantized base
    and the update; quantized: its codes, with the update in the shifts of their blocks; requantized: the live
    weights rounded to codes again; requantized_dense: the base's own weights and the update, rounded to
    codes."""
    stored_as: str
    """A dtype, or a quant_type."""
    num_bytes: int
    """About the size of its weights in the files."""
    kl: float
    """Mean KL(live || candidate), nats a token."""
    flips: float
    """Share of next tokens where another one is the most likely."""
    gap: float
    """Largest difference of a logit."""
    survival: float
    """Share of the update that is in the written weights: its projection on what they differ by from the base
    written in the same way."""
    error: float
    """Distance of the written weights from the live ones, over the size of the update."""
    layers: dict[str, dict[str, float]]
    """update_norm, survival and error of each tensor that changes, by name."""

    @property
    def is_no_op(self) -> bool:
        """Whether rounding leaves next to nothing of the update."""
        return self.survival < MIN_SURVIVAL

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, and how far the written model is from the live one."""

    directory: Path
    """The merged model."""
    base: str
    """The base that the adapter was folded into."""
    folded_into: str
    """The candidate that was written; see `Candidate.name`."""
    reason: str
    """Why this one."""
    dtype: str
    """Of the written weights, where they are dense."""
    quantization: dict[str, Any] | None
    """Of the written weights; None where all of them are dense."""
    kl: float
    """Of the files, read back, as the next two: mean KL(live || merged), nats a token."""
    flips: float
    """Share of next tokens where another one is the most likely."""
    logit_gap: float
    """Largest difference of a logit between merged and live model."""
    survival: float
    """Share of the update that is in the written weights."""
    adapter_effect: float
    """Largest difference of a logit between live model and base: what the gap is to be measured by."""
    adapter_kl: float
    """Mean KL(live || base), nats a token."""
    adapter_flips: float
    """Share of next tokens that the adapter changes."""
    candidates: tuple[Candidate, ...]
    """All that were measured."""
    probe: dict[str, Any]
    """What they were measured on."""
    num_layers: int
    """Layers and modules whose weights changed."""
    untied: bool
    """Whether embedding and output head, tied in the base, were written as two matrices."""
    forced_base: bool
    """Whether the base is another one than the adapter was trained on."""
    allowed_no_op: bool
    """Whether a merge was asked for that loses the update."""
    fingerprint: Fingerprint
    """Of the merged model."""
    notes: tuple[str, ...]
    """What the user should know."""

    def candidate(self, name: str) -> Candidate:
        """The candidate of a name.

        Raises:
            KeyError: It was not measured.
        """
        return {item.name: item for item in self.candidates}[name]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = {**asdict(self), "directory": str(self.directory), "notes": list(self.notes)}
        values["candidates"] = [item.to_dict() for item in self.candidates]
        return values


def rows(candidates: Sequence[Candidate], effect: Likeness, chosen: str = "") -> list[list[str]]:
    """The figures as a table: a head, the base alone, each candidate, the chosen one marked."""
    table = [["written as", "dtype", "MiB", "KL", "flips", "logit gap", "survival", "error"]]
    table.append(["(the base alone)", "", "", *_told(effect.kl, effect.flips, effect.gap), "0.0%", ""])
    for item in candidates:
        mark = "* " if item.name == chosen else "  "
        figures = _told(item.kl, item.flips, item.gap)
        size = f"{item.num_bytes / 2**20:,.1f}"
        kept = [f"{item.survival:.1%}", f"{item.error:.2f}"]
        table.append([f"{mark}{item.name}", item.stored_as, size, *figures, *kept])
    return table


def _told(kl: float, flips: float, gap: float) -> list[str]:
    return [f"{kl:.2g}", f"{flips:.1%}", f"{gap:.2g}"]
