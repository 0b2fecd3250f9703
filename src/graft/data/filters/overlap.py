"""Training rows that are also in the evaluation data: equal, nearly so, or sharing a stretch of words.

The evaluation data, which is small, is put into an index; training rows stream past it. A row that is in
both makes the evaluation look better than the model is, so it is the training row that has to go: the
evaluation stays what it was, and its losses can be compared with those of other runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graft.data.examples import Example
from graft.data.filters.content import Content, content_of
from graft.data.filters.duplicates import BATCH, Twin
from graft.data.filters.near_duplicates import NearIndex
from graft.data.filters.sorted_index import DigestIndex, Places, as_numbers
from graft.data.filters.words import Grams, grams, words

By = Literal["exact", "near", "ngrams"]

NGRAM = 13
"""Words that training and evaluation texts must share in one stretch (GPT-3, arXiv:2005.14165, appendix
C)."""
MAX_ROWS = 10
"""An n-gram of more evaluation rows than this is their common wording, not what one of them asks."""


class Overlap:
    """The evaluation data as training rows are compared with it.

    Args:
        by: "exact": equal rows, as `Duplicates` means it. "near": near duplicates too. "ngrams": also rows
            whose prompt or answer shares `NGRAM` words in a row with the prompt or the answer of an
            evaluation row; an evaluation text of fewer words is compared as a whole only.
        threshold: Jaccard similarity of near duplicates.

    Attributes:
        num_train: Training rows that were found in the evaluation data.

    Cost: a microsecond a training row, 15 with near duplicates or n-grams; memory follows the evaluation
        data: 40 bytes a row, 400 with near duplicates, 16 bytes a word with n-grams.
    """

    def __init__(self, by: By = "exact", threshold: float = 0.8) -> None:
        self._near = NearIndex(threshold) if by == "near" else None
        self._by_ngrams = by == "ngrams"
        self._exact, self._places = DigestIndex(), Places()
        self._all_places = Places()
        self._stretches: list[NDArray[np.uint64]] = []
        self._stretch_rows: list[NDArray[np.int64]] = []
        self._ngrams: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None
        self._hit: set[str] = set()
        self._copies: Counter[str] = Counter()  # evaluation rows that are equal to the one at a place
        self.num_train = 0

    @property
    def num_eval(self) -> int:
        """Evaluation rows that were found in the training data."""
        return sum(1 + self._copies[where] for where in self._hit)

    def add(self, examples: Iterable[Example]) -> None:
        """Put evaluation rows into the index."""
        contents = map(content_of, examples)
        while batch := list(islice(contents, BATCH)):
            self.add_contents(batch)

    def add_contents(self, contents: Sequence[Content]) -> None:
        """The same for what rows say."""
        fresh: dict[bytes, Content] = {}
        digests = as_numbers([content.digest for content in contents])
        for content, known in zip(contents, self._exact.find(digests).tolist(), strict=True):
            if known >= 0:
                self._copies[self._places[known]] += 1
            elif content.digest in fresh:
                self._copies[fresh[content.digest].where] += 1
            else:
                fresh[content.digest] = content
        self._exact.add(as_numbers(list(fresh)))
        self._places.extend([content.where for content in fresh.values()])
        start = len(self._all_places)
        self._all_places.extend([content.where for content in contents])
        if self._near is not None:
            self._near.add(self._near.sketch(contents))
        if self._by_ngrams:
            found = _stretches(contents)
            self._stretches.append(found.hashes)
            self._stretch_rows.append(start + found.owners() // 2)
            self._ngrams = None

    def find_all(self, examples: Sequence[Example]) -> list[str | None]:
        """For each training row the place of the evaluation row that it overlaps with, or None."""
        return [twin.where if twin else None for twin in self.twins(list(map(content_of, examples)))]

    def twins(self, contents: Sequence[Content]) -> list[Twin | None]:
        """The same with how alike they are; a shared stretch counts as 0."""
        found: list[Twin | None] = []
        for begin in range(0, len(contents), BATCH):
            found += self._twins(contents[begin : begin + BATCH])
        self.num_train += sum(twin is not None for twin in found)
        self._hit.update(twin.where for twin in found if twin)
        return found

    def _twins(self, contents: Sequence[Content]) -> list[Twin | None]:
        digests = as_numbers([content.digest for content in contents])
        found: list[Twin | None] = [
            Twin(self._places[number], 1.0, exact=True) if number >= 0 else None
            for number in self._exact.find(digests).tolist()
        ]
        rows = [row for row, twin in enumerate(found) if twin is None]
        left = [contents[row] for row in rows]
        if self._near is not None and left:
            numbers, similarity = self._near.find(self._near.sketch(left))
            for row, number, alike in zip(rows, numbers.tolist(), similarity.tolist(), strict=True):
                if number >= 0:
                    found[row] = Twin(self._all_places[number], alike, exact=False)
        if self._by_ngrams and left:
            for row, number in zip(rows, self._sharing(left), strict=True):
                if number >= 0:
                    found[row] = Twin(self._all_places[number], 0.0, exact=False)
        return found

    def _sharing(self, contents: Sequence[Content]) -> list[int]:
        """For each training row the first evaluation row with an n-gram of it, or -1."""
        known, owners = self._table()
        found = _stretches(contents)
        first = np.full(len(contents), np.iinfo(np.int64).max)
        if known.size:
            at = np.minimum(np.searchsorted(known, found.hashes), known.size - 1)
            same = known[at] == found.hashes
            np.minimum.at(first, found.owners()[same] // 2, owners[at[same]])
        return [-1 if number == np.iinfo(np.int64).max else number for number in first.tolist()]

    def _table(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The n-grams that tell an evaluation row, sorted, each with its first row."""
        if self._ngrams is None:
            hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *self._stretches])
            rows = np.concatenate([np.zeros(0, dtype=np.int64), *self._stretch_rows])
            order = np.lexsort((rows, hashes))
            hashes, rows = hashes[order], rows[order]
            again = (hashes[1:] == hashes[:-1]) & (rows[1:] == rows[:-1])
            single = np.concatenate([[True], ~again]) if hashes.size else np.zeros(0, dtype=bool)
            known, first, counts = np.unique(hashes[single], return_index=True, return_counts=True)
            telling = counts <= MAX_ROWS
            self._ngrams = known[telling], rows[single][first[telling]]
        return self._ngrams


def _stretches(contents: Sequence[Content]) -> Grams:
    """The n-grams of prompt, answer, prompt, ...; none of a text of fewer words."""
    found = words([text for content in contents for text in (content.prompt, content.answer)])
    counts = np.diff(found.starts)
    short = counts < NGRAM
    kept = found.hashes[np.repeat(~short, counts)]
    starts = np.zeros(counts.size + 1, dtype=np.int64)
    np.cumsum(np.where(short, 0, counts), out=starts[1:])
    return grams(Grams(kept, starts), NGRAM)
