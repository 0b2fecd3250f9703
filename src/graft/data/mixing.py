"""Several sources in stated shares: which samples each epoch has.

Each source is an endless stream: its rows in one order, then in another, each round with every row once. An
epoch takes from each stream the stretch that its share asks for, where the epoch before it stopped. So no
row is drawn twice before all of its source were, and which rows an epoch has follows from (seed, epoch)
alone.

An epoch is as long as all sources together, in rows or in tokens: as much work as training on the plain
union.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graft.data.held import Held
from graft.data.samples import Sample
from graft.data.shuffling import key_of, permuted

MixBy = Literal["examples", "tokens"]


class Joined(Held):
    """Samples of several sources after one another, without copying them.

    Args:
        parts: The samples of each.
        mixture: What an epoch has of them; each of them once if left out.

    Attributes:
        starts: Where each source begins, and where the last ends.
    """

    def __init__(self, parts: Sequence[Held], mixture: Mixture | None = None) -> None:
        self._parts = list(parts)
        self._mixture = mixture
        self.starts = [0, *accumulate(map(len, parts))]
        self.lengths = np.concatenate([part.lengths for part in parts])

    def sample(self, index: int) -> Sample:
        """The sample at a place from 0 on."""
        part = bisect_right(self.starts, index) - 1
        return self._parts[part].sample(index - self.starts[part])

    def figures(self) -> NDArray[Any]:
        """Those of the sources, after one another."""
        return np.concatenate([part.figures() for part in self._parts])

    def drawn(self, epoch: int) -> NDArray[np.int64] | None:
        """Which samples an epoch has."""
        return None if self._mixture is None else self._mixture(epoch)


def shares(
    weights: Mapping[str, float | None], sizes: Mapping[str, int], temperature: float
) -> dict[str, float]:
    """The share of each source, summing to 1.

    Args:
        weights: As given; all None for sizes in their place.
        sizes: Rows or tokens of each.
        temperature: Shares are in proportion to w**(1 / temperature): 1 leaves them, more makes them equal.

    Source: Devlin et al., multilingual BERT (exponent 0.7 on sizes); Conneau and Lample, arXiv:1901.07291,
        3.1 (0.5); Arivazhagan et al., arXiv:1907.05019, for the temperature.
    """
    given = {name: float(sizes[name] if weight is None else weight) for name, weight in weights.items()}
    largest = max(given.values())
    raised = {name: (value / largest) ** (1 / temperature) for name, value in given.items()}
    total = sum(raised.values())
    return {name: value / total for name, value in raised.items()}


@dataclass(frozen=True)
class Source:
    """What one source gives to an epoch.

    Attributes:
        name: Its path.
        wanted: Its share, of rows or of tokens.
        got: The share of the first epoch.
        rounds: How often an epoch goes through it.
    """

    name: str
    wanted: float
    got: float
    rounds: float

    def describe(self) -> str:
        """In words."""
        often = (
            f"each row {self.rounds:.2f} times an epoch"
            if self.rounds >= 1
            else f"{self.rounds:.1%} of it an epoch"
        )
        return f"{self.name}: {self.wanted:.2%} wanted, {self.got:.2%} got, {often}"


class Mixture:
    """Draws the samples of each epoch: `Mixture(...)(epoch)` gives their indexes among the joined sources.

    Args:
        lengths: Tokens of each sample, by source, in the order in which they are joined.
        wanted: The share of each source.
        by: What shares are of.
        seed: Decides the order, together with the round.
        shuffle: Whether the rows of a source come in a new order in each round.
        size: So many samples after one another are one row.

    Cost: of an epoch, memory of 24 bytes a row drawn, and of a round's lengths where shares are of tokens.
    """

    def __init__(
        self,
        lengths: Mapping[str, NDArray[np.int32]],
        wanted: Mapping[str, float],
        *,
        by: MixBy = "examples",
        seed: int = 0,
        shuffle: bool = True,
        size: int = 1,
    ) -> None:
        self._names = list(lengths)
        self._by: MixBy = by
        self._seed, self._shuffle, self._size = seed, shuffle, size
        self._measures = [
            np.asarray(lengths[name], dtype=np.int64).reshape(-1, size).sum(axis=1) for name in self._names
        ]
        if by == "examples":
            self._measures = [np.ones_like(measure) for measure in self._measures]
        self._totals = [int(measure.sum()) for measure in self._measures]
        # What an epoch takes of each stream; whole numbers, so that no epoch drifts.
        self._quotas = [max(1, round(wanted[name] * sum(self._totals))) for name in self._names]
        self._wanted = wanted

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """The indexes of an epoch's samples, sources in turn as their shares say."""
        rows, places, begin = [], [], 0
        for number, measure in enumerate(self._measures):
            row, place = self._drawn(number, epoch)
            rows.append(begin + row)
            places.append(place)
            begin += measure.size
        order = np.argsort(np.concatenate(places), kind="stable")
        drawn = np.concatenate(rows)[order]
        return (drawn[:, None] * self._size + np.arange(self._size)).ravel()

    def sources(self) -> list[Source]:
        """What each source gives."""
        taken = []
        for number, measure in enumerate(self._measures):
            rows, _ = self._drawn(number, 0)
            taken.append(int(measure[rows].sum()))
        return [
            Source(
                name,
                self._wanted[name],
                taken[number] / sum(taken),
                self._quotas[number] / self._totals[number],
            )
            for number, name in enumerate(self._names)
        ]

    def _drawn(self, number: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows of a source whose first unit lies in the epoch's stretch, and where in it, from 0 to 1."""
        measure, total, quota = self._measures[number], self._totals[number], self._quotas[number]
        begin, end = epoch * quota, (epoch + 1) * quota
        rows, places = [], []
        for turn in range(begin // total, -(-end // total)):
            first, last = max(begin - turn * total, 0), min(end - turn * total, total)
            found, at = self._stretch(number, turn, first, last, measure)
            rows.append(found)
            places.append((at + (turn * total - begin)) / quota)
        return np.concatenate(rows), np.concatenate(places)

    def _stretch(
        self, number: int, turn: int, first: int, last: int, measure: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        n = measure.size
        key = key_of("mixture", self._seed, number, turn)
        if self._by == "examples":
            order = permuted(first, last, n, key) if self._shuffle else np.arange(first, last)
            return order, np.arange(first, last)
        order = permuted(0, n, n, key) if self._shuffle else np.arange(n)
        sizes = measure[order]
        starts = np.cumsum(sizes) - sizes
        a, b = np.searchsorted(starts, [first, last])
        return order[a:b], starts[a:b]
