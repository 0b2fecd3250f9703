"""Counts over samples, one after another: what is learned, how they begin and end, which to look at."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.data.check.facts import Place
from graft.data.masking import Encoder
from graft.data.samples import CONTROL_AS_TEXT, SPLIT, Kind, Range, Sample

MOST_PLACES = 50
"""Places that are kept of each kind of problem."""
MOST_CHOSEN = 20
"""Samples that are kept of each choice: longest, shortest, ..."""
CUT = "cut at max_length"
"""How the remarks begin that say that a part of a row is missing."""
MOST_MEASURED = 1000
"""Truncated rows whose whole length is measured."""

_CLOSING = 3
"""Tokens of a learned part's end among which its end token stands."""

Progress = Callable[[int, int], None]


class Tally:
    """Counts over samples, taken one after another.

    Args:
        encoder: Knows the control tokens.
        kind: What the samples are.
        seed: Decides which samples are chosen at random.
        wanted: Rows whose samples are looked up.
        progress: Told how many samples of how many are done.

    Attributes:
        indexes: The samples of the wanted rows.
        truncated: The first rows that were truncated.
        places: The first places of each kind of problem.
    """

    def __init__(
        self,
        encoder: Encoder,
        kind: Kind,
        seed: str = "",
        wanted: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> None:
        text = encoder.text
        self._kind, self._seed, self._progress = kind, seed, progress
        self._bos = list(text.bos_ids)
        self._controls = {*text.control_ids, text.eos_id}
        unknown, ends = encoder.tokenizer.unk_token_id, (text.eos_id, encoder.tokenizer.bos_token_id)
        self._unknown = -1 if unknown is None or unknown in ends else int(unknown)
        self._lengths = np.zeros(0, dtype=np.int32)
        self._labelled = np.zeros(0, dtype=np.int32)
        self._counts: Counter[str] = Counter()
        self.indexes: dict[str, list[int]] = {where: [] for where in wanted}
        self.truncated: set[str] = set()
        self.places: dict[str, list[Place]] = defaultdict(list)
        self._cut: list[int] = []

    def add_all(self, samples: Sequence[Sample]) -> None:
        """Count all samples of a data set."""
        total = len(samples)
        self._lengths, self._labelled = (np.zeros(total, dtype=np.int32) for _ in range(2))
        for index, sample in enumerate(samples):
            self._add(index, sample)
            if self._progress is not None and index % 1000 == 0:
                self._progress(index, total)

    def _add(self, index: int, sample: Sample) -> None:
        ids, learned = sample.ids, sample.learned
        self._lengths[index], self._labelled[index] = len(ids), sum(end - begin for begin, end in learned)
        if sample.where in self.indexes:
            self.indexes[sample.where].append(index)
        cut = any(remark.startswith(CUT) for remark in sample.remarks)
        if cut:
            self._note("truncated", index, sample, f"cut at {len(ids):,} tokens")
            if len(self.truncated) < MOST_MEASURED:
                self.truncated.add(sample.where)
            if len(self._cut) < MOST_CHOSEN:
                self._cut.append(index)
        if CONTROL_AS_TEXT in sample.remarks:
            self._note("control text", index, sample, "spells a control token")
        if self._kind != "class" and SPLIT not in sample.remarks and not self._has_end(ids, learned):
            self._note("no end", index, sample, "cut away" if cut else "no end token is learned")
            self._counts["cut end"] += cut
        if self._bos:
            self._begin(index, sample)
        if self._unknown >= 0 and (lost := int(np.count_nonzero(ids == self._unknown))):
            self._counts["unknown tokens"] += lost
            self._note("unknown", index, sample, f"{lost} unknown token{'s' if lost > 1 else ''}")

    def _has_end(self, ids: NDArray[np.int32], learned: Sequence[Range]) -> bool:
        """Whether a learned part ends with a control token, perhaps a template's line end after it."""
        return any(
            int(id) in self._controls
            for begin, end in learned
            for id in ids[max(begin, end - _CLOSING) : end]
        )

    def _begin(self, index: int, sample: Sample) -> None:
        size = len(self._bos)
        first = sample.ids[: 2 * size].tolist()
        if first[:size] != self._bos:
            # A later piece of a split text begins in its middle.
            if SPLIT not in sample.remarks:
                self._note("no begin token", index, sample, "begins without the begin token")
        elif first[size:] == self._bos:
            self._note("begin token twice", index, sample, "begins with two begin tokens")

    def _note(self, name: str, index: int, sample: Sample, told: str) -> None:
        self._counts[name] += 1
        if len(self.places[name]) < MOST_PLACES:
            self.places[name].append(Place(sample.where, told, index))

    def counts(self) -> dict[str, Any]:
        """Fields of `Facts`."""
        lengths, labelled = self._lengths, self._labelled
        preferred = None
        if self._kind == "pair":
            preferred = (int(np.median(labelled[0::2])), int(np.median(labelled[1::2])))
        return {
            "num_samples": len(lengths),
            "num_tokens": int(lengths.sum(dtype=np.int64)),
            "num_labelled": int(labelled.sum(dtype=np.int64)),
            "lengths": np.bincount(lengths, minlength=1),
            "labelled": np.bincount(labelled, minlength=1),
            "labelled_by_length": np.bincount(lengths, weights=labelled, minlength=1).astype(np.int64),
            "preferred": preferred,
            "num_without_end": self._counts["no end"],
            "num_cut_ends": self._counts["cut end"],
            "num_bos_twice": self._counts["begin token twice"],
            "num_bos_missing": self._counts["no begin token"],
            "num_unknown": self._counts["unknown tokens"],
            "num_control_text": self._counts["control text"],
        }

    def chosen(self) -> dict[str, tuple[int, ...]]:
        """Indexes of samples worth a look, by what they were chosen for."""
        lengths, labelled = self._lengths, self._labelled
        few = min(MOST_CHOSEN, len(lengths))
        share = labelled / np.maximum(lengths, 1)
        found = {
            # The first rows are what a user knows; the rest is drawn.
            "random": [*range(min(2, few)), *_drawn(random.Random(self._seed), len(lengths), few)],
            "longest": _least(-lengths, few),
            "shortest": _least(lengths, few),
            "least labelled": _least(share, few) if self._kind != "class" else [],
            "truncated": self._cut,
        }
        return {name: tuple(map(int, indexes)) for name, indexes in found.items() if len(indexes)}


def _drawn(generator: random.Random, total: int, most: int) -> list[int]:
    return sorted(generator.sample(range(2, total), min(most, total) - 2)) if total > 2 else []


def _least(values: NDArray[Any], few: int) -> list[int]:
    """Indexes of the smallest values, the smallest first, the earlier of equal ones first."""
    if few >= len(values):
        return [int(index) for index in np.argsort(values, kind="stable")]
    edge = np.partition(values, few - 1)[few - 1]
    below = np.flatnonzero(values < edge)
    equal = np.flatnonzero(values == edge)[: few - len(below)]
    indexes = np.concatenate([below, equal])
    return [int(index) for index in indexes[np.argsort(values[indexes], kind="stable")]]
