"""An index from numbers to rows in flat arrays: no Python object for each row, millions of rows in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Column:
    """An array that grows at its end.

    Args:
        dtype: Of the values.
        width: Values of one entry; entries are rows of an array where there are several.
    """

    def __init__(self, dtype: Any, width: int | None = None) -> None:
        self._values = np.empty((1024,) if width is None else (1024, width), dtype=dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> NDArray[Any]:
        """What is in it; a view that the next `extend` may leave behind."""
        return self._values[: self._size]

    def extend(self, values: NDArray[Any]) -> None:
        """Put values at the end."""
        wanted = self._size + len(values)
        if wanted > len(self._values):
            # A quarter more each time: copying stays linear, and little room is left over.
            grown = np.empty(
                (max(wanted, len(self._values) * 5 // 4), *self._values.shape[1:]), self._values.dtype
            )
            grown[: self._size] = self.values
            self._values = grown
        self._values[self._size : wanted] = values
        self._size = wanted

    def cut(self, size: int) -> None:
        """Forget what is beyond so many entries."""
        self._size = size


class SortedIndex:
    """Rows by keys of 32 bits, in sorted runs of which each is at least twice as long as the next.

    A key may have many rows. Keys are parts of digests, so that some rows share one by chance: whoever asks
    compares what is found.

    Cost: 8 bytes an entry (24 for a moment when the longest runs merge); finding a key searches in each of
        at most log2(entries / entries added at a time) runs.
    Source: the merging of runs is that of log-structured merge trees (O'Neil et al., 1996).
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def add(self, keys: NDArray[np.uint64], rows: NDArray[Any]) -> None:
        """Put entries in.

        Args:
            keys: Below 2**32.
            rows: As long; the numbers of rows, below 2**32.
        """
        if not keys.size:
            return
        self._runs.append(np.sort((keys << _HALF) | rows.astype(np.uint64)))
        while len(self._runs) > 1 and self._runs[-2].size < 2 * self._runs[-1].size:
            last = self._runs.pop()
            merged = np.concatenate([self._runs.pop(), last])
            merged.sort()
            self._runs.append(merged)

    def find(self, keys: NDArray[np.uint64], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The entries with some keys.

        Args:
            keys: Below 2**32.
            most: So many rows at most for a key in each run, those with the lowest numbers.

        Returns:
            The places in `keys`, and for each the row that was found; a place for each of its rows.
        """
        order = np.argsort(keys)  # neighbours in a run are looked up after one another
        low = keys[order] << _HALF
        places, rows = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for run in self._runs:
            begin = np.searchsorted(run, low)
            end = np.searchsorted(run, low | _LOW, side="right")
            counts = np.minimum(end - begin, most)
            hit = np.flatnonzero(counts)
            counts = counts[hit]
            first = np.repeat(begin[hit] - (np.cumsum(counts) - counts), counts)
            places.append(np.repeat(order[hit], counts))
            rows.append((run[first + np.arange(first.size)] & _LOW).astype(np.int64))
        return np.concatenate(places), np.concatenate(rows)


class DigestIndex:
    """Digests of 128 bits, each with the number under which it was put in.

    Cost: 24 bytes a digest.
    """

    def __init__(self) -> None:
        self._index = SortedIndex()
        self._digests = Column(np.uint64, 2)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of each digest, -1 where it is not there.

        Args:
            digests: (n, 2).
        """
        found = np.full(len(digests), -1, dtype=np.int64)
        places, numbers = self._index.find(digests[:, 0] >> _HALF, most=1 << 30)
        same = (self._digests.values[numbers] == digests[places]).all(axis=1)
        found[places[same]] = numbers[same]
        return found

    def add(self, digests: NDArray[np.uint64]) -> None:
        """Put digests in that are not there yet; they are numbered on.

        Args:
            digests: (n, 2).
        """
        start = len(self)
        self._index.add(digests[:, 0] >> _HALF, np.arange(start, start + len(digests)))
        self._digests.extend(digests)


def as_numbers(digests: list[bytes]) -> NDArray[np.uint64]:
    """Digests of 16 bytes as an array (n, 2)."""
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64).reshape(-1, 2)


class Places:
    """The places of rows ("file:line") in a few bytes each."""

    def __init__(self) -> None:
        self._heads: dict[str, int] = {}
        self._names: list[str] = []
        self._head, self._line = Column(np.int32), Column(np.int64)

    def __len__(self) -> int:
        return len(self._head)

    def __getitem__(self, number: int) -> str:
        name, line = self._names[self._head.values[number]], int(self._line.values[number])
        return name if line < 0 else f"{name}:{line}"

    def extend(self, places: list[str]) -> None:
        """Put places at the end."""
        heads, lines = [], []
        for place in places:
            head, colon, line = place.rpartition(":")
            plain = (
                bool(colon)
                and line.isascii()
                and line.isdecimal()
                and (line == "0" or line[0] != "0")
                and len(line) < 19
            )
            name = head if plain else place
            number = self._heads.setdefault(name, len(self._heads))
            if number == len(self._names):
                self._names.append(name)
            heads.append(number)
            lines.append(int(line) if plain else -1)
        self._head.extend(np.array(heads, dtype=np.int32))
        self._line.extend(np.array(lines, dtype=np.int64))
