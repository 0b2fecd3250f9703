"""Samples to batches of tensors, in an order that follows from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from graft.data.ahead import in_order
from graft.data.held import Held, lengths_of
from graft.data.packing import Indexes, Rows, pack
from graft.data.samples import IGNORED, Kind, Sample
from graft.data.shuffling import key_of, permuted


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, each row holding one sample or several after one another.

    Attributes:
        input_ids: (B, T) long.
        position_ids: (B, T) long; restarts at 0 at every sample, and at the padding of a row's end.
        labels: (B, T) long, unshifted; -100 where nothing is learned, always so at a sample's first token.
        num_tokens: Tokens that are not padding.
        num_labelled_tokens: Tokens that are learned.
        sample_ids: For each row the indexes of its samples.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    num_tokens: int
    num_labelled_tokens: int
    sample_ids: list[list[int]]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        if self.input_ids.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "labels")}
        return replace(self, **moved)


class Loader:
    """Yields the batches of an epoch; it keeps no state, so any place of any epoch can be gone back to.

    Args:
        samples: What to draw from, at least one.
        batch_size: Rows of a batch; the last batch of an epoch may have fewer.
        max_length: Tokens of a packed row, and the most a sample may have.
        packing: Whether samples share rows.
        seed: Decides the order, together with the epoch.
        shuffle: Whether the order changes at all; without it rows come in the order of their first samples.
        pad_id: The id that fills the ends of rows.
        kind: "pair": each two samples in a row belong together, batch_size counts pairs where nothing is
            packed, and a packed row holds whole pairs in twice max_length tokens. "class": the label of a
            sample says something of all of it, so that its first token may have it.

    Attributes:
        workers: Threads that make batches ahead of their use; they are the same with any number.

    Memory: 4 bytes a sample for its length, and 24 for the order of the epoch at hand.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        batch_size: int,
        max_length: int,
        packing: bool,
        seed: int = 0,
        shuffle: bool = True,
        pad_id: int = 0,
        kind: Kind = "text",
    ) -> None:
        assert samples, "a loader needs samples"
        assert batch_size > 0
        self._size = 2 if kind == "pair" else 1
        assert len(samples) % self._size == 0
        self._first_label = 0 if kind == "class" else 1
        self._samples = samples
        self._lengths = lengths_of(samples)
        self._batch_size = batch_size * (1 if packing else self._size)
        self._max_length = max_length * (self._size if packing else 1)
        self._packing = packing
        self._seed = seed
        self._shuffle = shuffle
        self._pad_id = pad_id
        self._rows_of: tuple[int, Rows | None] = (-1, None)
        self.workers = 0

    @property
    def rows_together(self) -> int:
        """Neighbouring rows of a batch that may not be parted: 2 where each half of a pair has a row."""
        return 1 if self._packing else self._size

    @property
    def is_even(self) -> bool:
        """Whether every epoch has the same number of batches."""
        return self._drawn(0) is None

    def num_batches(self, epoch: int = 0) -> int:
        """Batches of an epoch; the same for every epoch unless the samples are drawn anew for each."""
        return -(-len(self.rows(epoch)) // self._batch_size)

    def rows(self, epoch: int) -> Rows:
        """The sample indexes of each row of an epoch, in order."""
        key = epoch if self._shuffle or not self.is_even else 0
        number, rows = self._rows_of
        if rows is None or number != key:
            rows = self._arrange(key)
            self._rows_of = (key, rows)
        return rows

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: Which one, from 0.
            start: Batches to pass over at the beginning.

        Yields:
            The batches from `start` on, exactly those that an epoch from its beginning has there.
        """
        rows = self.rows(epoch)
        begins = range(start * self._batch_size, len(rows), self._batch_size)

        def make(begin: int) -> Batch:
            chosen = rows[begin : begin + self._batch_size]
            return collate(self._samples, chosen, self._pad_id, self._max_length, self._first_label)

        return in_order(make, begins, self.workers)

    def places(self, batch: Batch) -> list[str]:
        """Where the samples of a batch come from, as "name:line" without the folder, which may change."""
        return [self._samples[index].where.rpartition("/")[2] for row in batch.sample_ids for index in row]

    def utilisation(self, epoch: int = 0) -> float:
        """Share of an epoch's token places that hold no padding."""
        sums = self.rows(epoch).sums(self._lengths)
        batches = [sums[begin : begin + self._batch_size] for begin in range(0, len(sums), self._batch_size)]
        places = sum(_width(int(batch.max()), self._max_length) * len(batch) for batch in batches)
        return float(sums.sum()) / places

    def widest(self) -> int:
        """Tokens of the widest rows of the first epoch, padding included."""
        return _width(int(self.rows(0).sums(self._lengths).max()), self._max_length)

    def _arrange(self, epoch: int) -> Rows:
        size = self._size
        drawn = self._drawn(epoch)
        units = np.arange(len(self._samples) // size) if drawn is None else drawn[::size] // size
        if self._shuffle:
            units = units[_order(len(units), self._seed, epoch)]
        if not self._packing:
            return Rows.each(_members(units, size))
        lengths = self._lengths.reshape(-1, size).sum(axis=1, dtype=np.int32)
        packed = pack(lengths[units], self._max_length)
        rows = Rows(_members(units[packed.members], size), packed.starts * size)
        if self._shuffle:
            return rows.taken(_order(len(rows), self._seed, epoch, "rows"))
        return rows.in_order()

    def _drawn(self, epoch: int) -> Indexes | None:
        return self._samples.drawn(epoch) if isinstance(self._samples, Held) else None


def _order(count: int, *names: int | str) -> Indexes:
    return permuted(0, count, count, key_of(*names))


def _members(units: Indexes, size: int) -> Indexes:
    """The samples of units of `size` samples."""
    return (units[:, None] * size + np.arange(size)).reshape(-1)


def rounded_length(length: int) -> int:
    """A length rounded up to one of eight sizes per doubling, at most an eighth more.

    Matrix libraries compile and keep code and scratch memory for each shape they meet; lengths that are all
    different cost them time in every batch and gigabytes in the end.
    """
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _width(longest: int, max_length: int | None) -> int:
    rounded = rounded_length(longest)
    return rounded if max_length is None else max(longest, min(rounded, max_length))


def collate(
    samples: Sequence[Sample],
    rows: Sequence[Sequence[int]],
    pad_id: int,
    max_length: int | None = None,
    first_label: int = 1,
) -> Batch:
    """Lay samples into the rows of one batch.

    Args:
        samples: All samples.
        rows: For each row the indexes of its samples.
        pad_id: Fills rows up to the width of the batch: the longest row, rounded up by `rounded_length`.
        max_length: The width is not rounded above this.
        first_label: Labels of a sample before this token do not count.
    """
    members = [[samples[index] for index in row] for row in rows]
    lengths = [sum(map(len, row)) for row in members]
    width = _width(max(lengths), max_length)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(members):
        begin = 0
        for sample in row:
            end = begin + len(sample)
            input_ids[number, begin:end] = sample.ids
            position_ids[number, begin:end] = np.arange(end - begin)
            for first, last in sample.learned:
                first = max(first, first_label)
                labels[number, begin + first : begin + last] = sample.labels_in(first, last)
            begin = end
        position_ids[number, begin:] = np.arange(width - begin)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(labels),
        sum(lengths),
        int((labels != IGNORED).sum()),
        [list(row) for row in rows],
    )
