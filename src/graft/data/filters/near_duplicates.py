"""Examples that say nearly the same: MinHash finds candidates, the shingles themselves decide.

An example is the set of its word 3-grams, those of its prompt and those of its answer apart. Two examples are
near duplicates where the Jaccard similarity of these sets is at least the threshold, and that of the answers
alone too: rows that share a long prompt and differ in a short answer teach different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.data.filters.content import Content
from graft.data.filters.sorted_index import Column, SortedIndex
from graft.data.filters.words import grams, words
from graft.data.shuffling import spread

SHINGLE = 3
"""Words of a shingle. One changed word changes three: 40 words with one changed are alike to 0.85 (of 5-grams
0.76, which a threshold of 0.8 would miss)."""

NUM_HASHES = 128
MISSED = 0.005
"""A pair at the threshold may fail to become a candidate at most this often; more alike ones less often."""

SKETCH = 256
"""Shingles of a part that are kept, the smallest: all of a part of no more words, a random sample
otherwise."""

_CANDIDATES = 8
"""Candidates of a row that are compared, those with the most bands in common first."""
_BUCKET = 4
"""Rows of one band and run that become candidates: boilerplate that all rows share finds no more than
these."""
_PAIRS = 4096
_HALF = np.uint64(32)

Numbers = NDArray[np.int64]


def bands_for(threshold: float) -> tuple[int, int]:
    """How signatures are cut into bands: the longest bands that miss few enough pairs at the threshold.

    Two sets of similarity J agree in a band of r minima with probability J**r, and in one of b bands with
    1 - (1 - J**r)**b.

    Returns:
        The number of bands and the minima of each.

    Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.
    """
    fitting = [size for size in range(1, 17) if (1 - threshold**size) ** (NUM_HASHES // size) <= MISSED]
    return NUM_HASHES // fitting[-1], fitting[-1]


@dataclass(frozen=True)
class Sketches:
    """What is kept of some examples.

    Attributes:
        hashes: The smallest different shingles of each part, ascending: of the first prompt, the first
            answer, ...
        sizes: (2n) How many of them each part has.
        counts: (2n) How many different shingles each part has in all.
        keys: (n, bands) 32 bits for each band of the signature.
        empty: (n) Examples without a word, which are like nothing.
    """

    hashes: NDArray[np.uint32]
    sizes: Numbers
    counts: Numbers
    keys: NDArray[np.uint64]
    empty: NDArray[np.bool_]

    def taken(self, chosen: NDArray[np.bool_]) -> Sketches:
        """Those of some of the examples."""
        parts = np.repeat(chosen, 2)
        return Sketches(
            self.hashes[np.repeat(parts, self.sizes)],
            self.sizes[parts],
            self.counts[parts],
            self.keys[chosen],
            self.empty[chosen],
        )


class NearIndex:
    """Examples among which like ones are found. Each has a number, in the order in which they came.

    Args:
        threshold: Jaccard similarity from which on two examples are near duplicates.

    Cost: about 20 microseconds an example of 50 words. Memory of one: 4 bytes for each different shingle of
        up to 256 in the prompt and in the answer, and 8 for each band (21 at a threshold of 0.8).
    Source: Broder, On the resemblance and containment of documents, 1997 (shingles, the smallest hashes as a
        sample); Indyk and Motwani, 1998 (bands). The similarity of parts of no more than 256 shingles is
        exact; that of longer ones has a standard error of sqrt(J (1 - J) / 256), 0.025 at 0.8.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._bands, self._size = bands_for(threshold)
        generator = np.random.Generator(np.random.PCG64(20021219))
        self._factors = generator.integers(0, 1 << 63, NUM_HASHES, dtype=np.uint64) * np.uint64(
            2
        ) + np.uint64(1)
        self._index = SortedIndex()
        self._hashes = Column(np.uint32)
        self._ends, self._counts = Column(np.int64), Column(np.int32)

    def __len__(self) -> int:
        return len(self._ends) // 2

    def sketch(self, contents: Sequence[Content]) -> Sketches:
        """What the index needs of examples."""
        texts = [text for content in contents for text in (content.prompt, content.answer)]
        found = grams(words(texts), SHINGLE)
        # Sorted with the part in the upper half: each part's shingles ascending, equal ones side by side.
        whole = (found.owners().astype(np.uint64) << _HALF) | (found.hashes >> _HALF)
        whole.sort()
        first = np.ones(whole.size, dtype=bool)
        first[1:] = whole[1:] != whole[:-1]
        whole = whole[first]
        owners = (whole >> _HALF).astype(np.int64)
        counts = np.bincount(owners, minlength=len(texts))
        rank = np.arange(whole.size) - (np.cumsum(counts) - counts)[owners]
        kept = whole[rank < SKETCH].astype(np.uint32)
        rows = counts.reshape(-1, 2).sum(axis=1)
        keys = self._keys(spread(whole & np.uint64(0x1FFFFFFFF)), rows)
        return Sketches(kept, np.minimum(counts, SKETCH), counts, keys, rows == 0)

    def _keys(self, shingles: NDArray[np.uint64], rows: Numbers) -> NDArray[np.uint64]:
        """The bands of each row's signature; `shingles` are those of row after row."""
        keys = np.zeros((rows.size, self._bands), dtype=np.uint64)
        filled = np.flatnonzero(rows)
        if not filled.size:
            return keys
        starts = (np.cumsum(rows) - rows)[filled]
        for band in range(self._bands):
            folded = np.full(filled.size, band + 1, dtype=np.uint64)
            for factor in self._factors[band * self._size : (band + 1) * self._size]:
                values = ((shingles * factor) >> _HALF).astype(np.uint32)
                folded = spread(folded ^ np.minimum.reduceat(values, starts))
            keys[filled, band] = folded >> _HALF
        return keys

    def add(self, sketches: Sketches) -> None:
        """Put examples in, whatever they are like."""
        start = len(self)
        self._store(sketches)
        filled = np.flatnonzero(~sketches.empty)
        rows = np.repeat(start + filled, self._bands)
        self._index.add(sketches.keys[filled].ravel(), rows)

    def find(self, sketches: Sketches) -> tuple[Numbers, NDArray[np.float64]]:
        """For each example the first one in the index that it is like.

        Returns:
            Its number, or -1; and how alike they are.
        """
        return self._settle(sketches, self._candidates(sketches, among=False))

    def admit(self, sketches: Sketches) -> tuple[Numbers, NDArray[np.float64]]:
        """The same, also among these; those that are like none before them are put in.

        Returns:
            The number of an example in the index, or -1; and how alike they are.
        """
        found = self._settle(sketches, self._candidates(sketches, among=True))
        start = len(self)
        fresh = found[0] < 0
        numbers = start + np.cumsum(fresh) - 1  # an example of this batch is numbered among those put in
        inside = found[0] >= start
        found[0][inside] = numbers[found[0][inside] - start]
        self.add(sketches.taken(fresh))
        return found

    def _candidates(self, sketches: Sketches, *, among: bool) -> tuple[Numbers, Numbers]:
        """Pairs of an example and the number of one that may be like it; the batch follows the index."""
        start, filled = len(self), np.flatnonzero(~sketches.empty)
        keys = sketches.keys[filled].ravel()
        owners = np.repeat(filled, self._bands)
        places, rows = self._index.find(keys, _BUCKET)
        pairs = [(owners[places], rows)]
        if among:
            batch = SortedIndex()
            batch.add(keys, owners)
            places, rows = batch.find(keys, _BUCKET)
            before = rows < owners[places]
            pairs.append((owners[places][before], start + rows[before]))
        left = np.concatenate([one for one, _ in pairs])
        right = np.concatenate([other for _, other in pairs])
        both, shared = np.unique(
            (left.astype(np.uint64) << _HALF) | right.astype(np.uint64), return_counts=True
        )
        left, right = (both >> _HALF).astype(np.int64), (both & np.uint64(0xFFFFFFFF)).astype(np.int64)
        best = np.lexsort((right, -shared, left))
        left, right = left[best], right[best]
        rank = np.arange(left.size) - np.searchsorted(left, left)
        chosen = rank < _CANDIDATES
        return left[chosen], right[chosen]

    def _settle(
        self, sketches: Sketches, pairs: tuple[Numbers, Numbers]
    ) -> tuple[Numbers, NDArray[np.float64]]:
        left, right = pairs
        start = len(self)
        size = (len(self._hashes), len(self._ends))
        self._store(sketches)
        alike = [
            self._similarity(start + left[begin : begin + _PAIRS], right[begin : begin + _PAIRS])
            for begin in range(0, left.size, _PAIRS)
        ]
        self._hashes.cut(size[0])
        self._ends.cut(size[1])
        self._counts.cut(size[1])
        found = np.full(sketches.empty.size, -1, dtype=np.int64)
        similarity = np.zeros(found.size)
        if not alike:
            return found, similarity
        whole, answers = (np.concatenate(values) for values in zip(*alike, strict=True))
        near = np.flatnonzero((whole >= self.threshold) & (answers >= self.threshold))
        for pair in near[np.lexsort((right[near], left[near]))].tolist():
            row, other = int(left[pair]), int(right[pair])
            dropped = other >= start and found[other - start] >= 0
            if found[row] < 0 and not dropped:
                found[row], similarity[row] = other, whole[pair]
        return found, similarity

    def _store(self, sketches: Sketches) -> None:
        self._ends.extend(len(self._hashes) + np.cumsum(sketches.sizes))
        self._hashes.extend(sketches.hashes)
        self._counts.extend(sketches.counts.astype(np.int32))

    def _similarity(self, left: Numbers, right: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """Jaccard similarity of pairs of stored examples, and of their answers alone."""
        shared = np.zeros(left.size)
        total = np.zeros(left.size)
        alike = np.ones(left.size)
        for part in (0, 1):
            alike, size = self._part(2 * left + part, 2 * right + part)
            shared += alike * size
            total += size
            alike[size == 0] = 1.0  # two without an answer do not differ in it
        return shared / np.maximum(total, 1), alike

    def _part(self, left: Numbers, right: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """Jaccard similarity of pairs of parts, and the size of their unions."""
        pairs, values = self._gathered(np.stack([left, right], axis=1).ravel())
        keys = ((pairs // 2).astype(np.uint64) << _HALF) | values
        keys.sort()
        second = np.zeros(keys.size, dtype=bool)
        second[1:] = keys[1:] == keys[:-1]
        owners = (keys >> _HALF).astype(np.int64)
        different = np.bincount(owners[~second], minlength=left.size)
        begin = np.cumsum(different) - different
        rank = np.cumsum(~second) - 1 - begin[owners]
        counts = self._counts.values[left] + self._counts.values[right]
        whole = np.maximum(self._counts.values[left], self._counts.values[right]) <= SKETCH
        limit = np.where(whole, 2 * SKETCH, SKETCH)
        seen = np.minimum(different, limit)
        common = np.bincount(owners[second & (rank < limit[owners])], minlength=left.size)
        alike = common / np.maximum(seen, 1)
        return alike, np.where(whole, seen, counts / (1 + alike))

    def _gathered(self, parts: Numbers) -> tuple[Numbers, NDArray[np.uint64]]:
        """The stored shingles of parts, each with the place of its part in the list."""
        ends = self._ends.values
        begin = np.where(parts > 0, ends[parts - 1], 0)
        sizes = ends[parts] - begin
        owners = np.repeat(np.arange(parts.size), sizes)
        first = np.repeat(begin - (np.cumsum(sizes) - sizes), sizes)
        return owners, self._hashes.values[first + np.arange(first.size)].astype(np.uint64)
