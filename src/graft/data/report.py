"""What became of a file: counts, refused rows, and samples shown as the model sees them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graft.data.samples import IGNORED, Sample

MAX_PLACES = 1_000
"""Places of one kind that a report names; counts go on."""
LEARNED_MARKS = ("⟦", "⟧")
"""Stand around what is learned in a shown sample."""


@dataclass
class Report:
    """What the data is and what was made of it.

    Attributes:
        path: The file.
        format: What the rows are.
        reason: Why they were taken for that.
        num_rows: Rows read.
        num_used: Rows that gave samples.
        num_samples: Samples; more than num_used where long texts were split.
        rejected: Rows that gave none, and why; the first 1,000.
        num_rejected: How many there are: num_rows is num_used, these and the `removed` ones.
        num_dropped: Those of them that are left out only for their length.
        num_tokens: Tokens of all samples.
        num_labelled_tokens: Tokens that are learned.
        num_end_tokens: Learned tokens that end an answer or a text.
        longest_tokens: Tokens of the longest sample.
        num_truncated: Rows whose end was cut away at max_length.
        num_split: Plain texts that were split into several samples.
        num_duplicates: Samples that are equal to an earlier one.
        num_overlap: Samples of an evaluation split that are also in the training split.
        removed: Rows that were left out though nothing in them is wrong, by reason.
        places: The first 1,000 places of each kind: "rejected", "dropped" and "truncated" rows, and what was
            found by cleaning; "file:line", or "file:line = file:line" for a row and the one that it repeats.
        notes: What the user should know.
        preview: The first samples, the learned part between ⟦ and ⟧.
    """

    path: str
    format: str
    reason: str
    num_rows: int = 0
    num_used: int = 0
    num_samples: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    num_rejected: int = 0
    num_dropped: int = 0
    num_tokens: int = 0
    num_labelled_tokens: int = 0
    num_end_tokens: int = 0
    longest_tokens: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_duplicates: int = 0
    num_overlap: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    preview: list[str] = field(default_factory=list)

    def reject(self, where: str, reason: str, *, overlong: bool = False) -> None:
        """Count a row that gave no sample."""
        self.num_rejected += 1
        self.num_dropped += overlong
        if len(self.rejected) < MAX_PLACES:
            self.rejected.append((where, reason))
        self.place("dropped" if overlong else "rejected", where)

    def place(self, kind: str, where: str) -> None:
        """Keep a place of a kind, one of the first."""
        known = self.places.setdefault(kind, [])
        if len(known) < MAX_PLACES:
            known.append(where)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


_ADDED = tuple(name for name in Report.__dataclass_fields__ if name.startswith("num_"))


def joined_report(reports: Sequence[Report]) -> Report:
    """One report of several files: counts are added, notes name their file."""
    found = Report(
        ", ".join(report.path for report in reports),
        ", ".join(dict.fromkeys(report.format for report in reports)),
        "each file by its own columns",
        **{name: sum(getattr(report, name) for report in reports) for name in _ADDED},
        rejected=[one for report in reports for one in report.rejected],
        longest_tokens=max(report.longest_tokens for report in reports),
        notes=[f"{report.path}: {note}" for report in reports for note in report.notes],
        preview=[report.preview[0] for report in reports if report.preview],
    )
    for report in reports:
        for name, count in report.removed.items():
            found.removed[name] = found.removed.get(name, 0) + count
        for name, places in report.places.items():
            found.places[name] = [*found.places.get(name, []), *places][:MAX_PLACES]
    return found


def num_rows(count: int) -> str:
    """A count with its noun: "1 row", "2 rows"."""
    return "1 row" if count == 1 else f"{count:,} rows"


def show_sample(sample: Sample, tokenizer: Any) -> str:
    """The text of a sample, what is learned standing between ⟦ and ⟧."""
    ids, labels = sample.input_ids, sample.labels
    changes = [i for i in range(1, len(ids)) if (labels[i] == IGNORED) != (labels[i - 1] == IGNORED)]
    # Decoding from the beginning each time keeps the spaces that some tokenizers drop at a text's begin.
    texts = [_decode(ids[:end], tokenizer) for end in [0, *changes, len(ids)]]
    parts = []
    for number, begin in enumerate([0, *changes]):
        part = texts[number + 1][len(texts[number]) :]
        parts.append(part if labels[begin] == IGNORED else part.join(LEARNED_MARKS))
    return "".join(parts)


def shorten_sample(shown: str, width: int = 600) -> str:
    """A shown sample on one line: line ends as ⏎, long parts cut in their middle so that all marks stay.

    Args:
        shown: What `show_sample` gave.
        width: Most characters; a part that is learned or not gets at most a third of them.
    """
    begin, end = LEARNED_MARKS
    parts = re.split(f"({begin}.*?{end})", shown, flags=re.DOTALL)
    text = "".join(_cut_middle(part, width // 3) for part in parts).replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def _cut_middle(text: str, width: int) -> str:
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
