"""What `graft data check` knows of one split: counts, distributions, places; no rule, no drawing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.data.check.bins import bins, width_of
from graft.data.samples import Kind


@dataclass(frozen=True)
class Place:
    """Where a problem is.

    Attributes:
        where: "file:line".
        told: What is wrong there.
        index: The sample, where there is one.
    """

    where: str
    told: str
    index: int | None = None


@dataclass(frozen=True)
class Packed:
    """The rows of an epoch.

    Attributes:
        num_rows: Rows of tokens.
        num_steps: Optimizer steps.
        utilisation: Share of token places that hold no padding.
        packing: Whether samples share rows.
        first: The sample indexes of the first rows of epoch 0.
        row_tokens: Most tokens of a row.
    """

    num_rows: int
    num_steps: int
    utilisation: float
    packing: bool
    first: tuple[tuple[int, ...], ...]
    row_tokens: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """What is known of one split.

    Attributes:
        split: "training" or "evaluation".
        path: The file.
        kind: "text", "pair" or "class", as of a loader.
        format: What the rows are, and `reason` why they are taken for that.
        template: Where the chat template comes from: "the tokenizer's own", a file, or "" where none acts.
        has_template: Whether there is one at all.
        loss_on: The setting of that name.
        on_overlong: The setting of that name.
        max_length: Most tokens of a sample; `asked_max_length` before the model's context cut it.
        context: Tokens that the model can see, None where nothing bounds them.
        num_rows: Rows read: `num_used` and `num_rejected`, of which `num_dropped` only for their length.
        removed: Rows that cleaning left out, by reason.
        odd: Rows that cleaning tells of, by what is odd about them; at most a thousand each.
        num_samples: Samples; a preference has two.
        num_tokens: Tokens of all samples.
        num_labelled: Those that are learned.
        lengths: How many samples have 0, 1, 2, ... tokens.
        labelled: How many samples learn 0, 1, 2, ... tokens.
        labelled_by_length: Learned tokens of the samples of each length.
        needed: Tokens that truncated rows, and rows left out for their length, would have (a thousand each).
        preferred: Median learned tokens of chosen and of rejected answers; of preferences only.
        num_truncated: Rows whose end was cut away; likewise `num_split`, `num_duplicates`, `num_near`
            (None where it was not looked for), `num_overlap`.
        num_without_end: Samples in which no end token is learned (pieces of a split text do not count), of
            which `num_cut_ends` were truncated.
        num_bos_twice: Samples that begin with two begin tokens; `num_bos_missing` with none, though
            the tokenizer puts one before texts.
        num_unknown: Tokens that stand for what the tokenizer does not know; `unknown` are such characters.
        num_control_text: Samples of rows that spell a control token, which was read as plain text.
        num_looked_at: Rows whose texts were searched for the marks of templates, and `num_templated` of them
            with such marks in half of their texts or more.
        unused: Columns that nothing reads.
        classes: How many samples each class has.
        packed: The rows of an epoch.
        places: The first places of each kind of problem.
        chosen: Indexes of samples by what they were chosen for: "random", "longest", "shortest", "least
            labelled", "truncated".
        raw: The rows at places, as they stand in the file.
        notes: What the report tells besides.
        error: Why a run with these settings stops at a row, "" where it does not; `error_fix` what to do.
    """

    split: str
    path: str
    kind: Kind = "text"
    format: str = "prompt_completion"
    reason: str = ""
    template: str = ""
    has_template: bool = False
    loss_on: str = "auto"
    on_overlong: str = "truncate"
    max_length: int = 1024
    asked_max_length: int = 1024
    context: int | None = None
    num_rows: int = 0
    num_used: int = 0
    num_rejected: int = 0
    num_dropped: int = 0
    removed: tuple[tuple[str, int], ...] = ()
    odd: tuple[tuple[str, int], ...] = ()
    num_samples: int = 0
    num_tokens: int = 0
    num_labelled: int = 0
    lengths: NDArray[Any] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    labelled: NDArray[Any] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    labelled_by_length: NDArray[Any] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    needed: tuple[int, ...] = ()
    preferred: tuple[int, int] | None = None
    num_truncated: int = 0
    num_split: int = 0
    num_duplicates: int = 0
    num_near: int | None = None
    num_overlap: int = 0
    num_without_end: int = 0
    num_cut_ends: int = 0
    num_bos_twice: int = 0
    num_bos_missing: int = 0
    num_unknown: int = 0
    unknown: str = ""
    num_control_text: int = 0
    num_looked_at: int = 0
    num_templated: int = 0
    unused: tuple[str, ...] = ()
    classes: tuple[tuple[str, int], ...] = ()
    packed: Packed | None = None
    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    chosen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""
    error_fix: str = ""

    @property
    def num_units(self) -> int:
        """Samples, or pairs of preferences."""
        return self.num_samples // 2 if self.kind == "pair" else self.num_samples

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.flatnonzero(self.lengths)[-1]) if self.lengths.any() else 0

    @property
    def labelled_share(self) -> float:
        """Share of the tokens that is learned."""
        return self.num_labelled / self.num_tokens if self.num_tokens else 0.0

    def length_at(self, share: float) -> int:
        """The length that so large a share of the samples does not exceed."""
        return quantile(self.lengths, share)

    def labelled_at(self, share: float) -> int:
        """So many learned tokens, or fewer, so large a share of the samples has."""
        return quantile(self.labelled, share)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON: distributions as quantiles and bins, samples and raw rows left out."""
        left_out = (
            "lengths",
            "labelled",
            "labelled_by_length",
            "chosen",
            "raw",
            "packed",
            "needed",
            "places",
        )
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        width = width_of(self.longest, 40)
        histogram = [
            {"from": bin.begin, "to": bin.last, "samples": bin.count}
            for bin in bins(self.lengths, width, self.longest)
        ]
        return {
            **plain,
            "classes": dict(self.classes),
            "removed": dict(self.removed),
            "odd": dict(self.odd),
            "longest": self.longest,
            "labelled_share": self.labelled_share,
            "quantiles": {f"{share:g}": self.length_at(share) for share in (0.5, 0.9, 0.99, 1.0)},
            "labelled_quantiles": {f"{share:g}": self.labelled_at(share) for share in (0.5, 0.9, 0.99, 1.0)},
            "histogram": histogram,
            "packing": None
            if self.packed is None
            else {name: value for name, value in asdict(self.packed).items() if name != "first"},
            "places": {name: [asdict(place) for place in found] for name, found in self.places.items()},
        }


def quantile(counts: NDArray[Any], share: float) -> int:
    """The smallest value that at least a share of the counted ones does not exceed.

    Args:
        counts: How often 0, 1, 2, ... is there.
        share: From 0 to 1.
    """
    total = int(counts.sum())
    rank = min(max(int(np.ceil(share * total)), 1), total)
    return int(np.searchsorted(np.cumsum(counts), rank)) if total else 0
