"""Which samples share a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

Indexes = NDArray[np.int64]


@dataclass(frozen=True)
class Rows(Sequence[list[int]]):
    """The members of each row, one row after another, in two arrays.

    Attributes:
        members: Sample indexes.
        starts: Where each row begins in them, and their end: one more than there are rows.
    """

    members: Indexes
    starts: Indexes

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        found: list[int] = self.members[self.starts[row] : self.starts[row + 1]].tolist()
        return found

    def sums(self, values: NDArray[np.int32]) -> Indexes:
        """Of each row the sum of its members' values."""
        running = np.zeros(len(self.members) + 1, dtype=np.int64)
        np.cumsum(values[self.members], out=running[1:])
        return running[self.starts[1:]] - running[self.starts[:-1]]

    def taken(self, order: Indexes) -> Rows:
        """The same rows in another order."""
        counts = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(counts)])
        shift = np.repeat(self.starts[:-1][order] - starts[:-1], counts)
        return Rows(self.members[np.arange(len(self.members)) + shift], starts)

    def in_order(self) -> Rows:
        """The same rows, the members of each ascending, rows in the order of their first members."""
        row_of = np.repeat(np.arange(len(self)), np.diff(self.starts))
        sorted_rows = Rows(self.members[np.lexsort((self.members, row_of))], self.starts)
        return sorted_rows.taken(np.argsort(sorted_rows.members[self.starts[:-1]], kind="stable"))

    @classmethod
    def each(cls, members: Indexes, size: int = 1) -> Rows:
        """Rows of `size` neighbouring members."""
        return cls(members, np.arange(0, len(members) + 1, size, dtype=np.int64))


def pack(lengths: Sequence[int] | NDArray[np.int32], max_length: int) -> Rows:
    """Put samples into rows of at most `max_length` tokens, first fit decreasing.

    The longest sample comes first, and each goes into the first row that has room; among samples of one
    length the earlier comes first. At most 11/9 of the fewest possible rows are used, plus one.

    Args:
        lengths: Tokens of each sample, each from 1 to max_length.
        max_length: Tokens of a row.

    Cost: one vector operation over the rows with room for each distinct length; 0.2 s and 50 bytes a sample
        for a million samples.
    Source: Johnson, Near-optimal bin packing algorithms, 1973.
    """
    sizes = np.asarray(lengths, dtype=np.int32)
    assert sizes.size == 0 or (sizes.min() > 0 and sizes.max() <= max_length)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    row_of = np.empty(len(sizes), dtype=np.int64)
    numbers, room = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    num_rows = done = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        # Rows without room for the shortest sample are done with.
        open_rows = room >= distinct[0]
        numbers, room = numbers[open_rows], room[open_rows]
        # First fit of equal sizes fills each row as far as it goes before the next.
        fits = room // size
        takes = np.minimum(fits, np.maximum(count - (np.cumsum(fits) - fits), 0))
        fresh = _fresh(count - int(takes.sum()), max_length // size)
        takes = np.concatenate([takes, fresh])
        numbers = np.concatenate([numbers, np.arange(num_rows, num_rows + len(fresh))])
        room = np.concatenate([room, np.full(len(fresh), max_length)]) - takes * size
        row_of[done : done + count] = np.repeat(numbers, takes)
        num_rows, done = num_rows + len(fresh), done + count
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return Rows(order[np.argsort(row_of, kind="stable")], starts)


def _fresh(left: int, per_row: int) -> Indexes:
    """How many samples each new row takes."""
    full, rest = divmod(left, per_row)
    return np.asarray([per_row] * full + [rest] * (rest > 0), dtype=np.int64)
