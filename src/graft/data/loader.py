"""Samples to batches of tensors, in an order that follows from (seed, epoch) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graft.data.packing import pack
from graft.data.samples import IGNORED, Sample

Kind = Literal["text", "pair", "class"]
"""What samples are: texts, halves of preference pairs, texts with a class."""


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
        draw: Gives the indexes of the samples of an epoch, where it has not all of them once.
    """

    def __init__(  # noqa: PLR0913 - plain values, each told above
        self,
        samples: Sequence[Sample],
        batch_size: int,
        max_length: int,
        packing: bool,
        seed: int = 0,
        shuffle: bool = True,
        pad_id: int = 0,
        kind: Kind = "text",
        draw: Callable[[int], NDArray[np.int64]] | None = None,
    ) -> None:
        assert samples, "a loader needs samples"
        assert batch_size > 0
        self._size = 2 if kind == "pair" else 1
        assert len(samples) % self._size == 0
        self._first_label = 0 if kind == "class" else 1
        self._samples = samples
        self._lengths = [len(sample.input_ids) for sample in samples]
        self._batch_size = batch_size * (1 if packing else self._size)
        self._max_length = max_length * (self._size if packing else 1)
        self._packing = packing
        self._seed = seed
        self._shuffle = shuffle
        self._pad_id = pad_id
        self._draw = draw
        self._rows_of: tuple[int, list[list[int]]] = (-1, [])

    @property
    def rows_together(self) -> int:
        """Neighbouring rows of a batch that may not be parted: 2 where each half of a pair has a row."""
        return 1 if self._packing else self._size

    @property
    def epochs_differ(self) -> bool:
        """Whether epochs may have different numbers of batches."""
        return self._draw is not None

    def num_batches(self, epoch: int = 0) -> int:
        """Batches of an epoch; the same for every epoch where nothing is drawn."""
        return -(-len(self.rows(epoch)) // self._batch_size)

    def rows(self, epoch: int) -> list[list[int]]:
        """The sample indexes of each row of an epoch, in order."""
        key = epoch if self._shuffle or self._draw else 0
        if self._rows_of[0] != key:
            self._rows_of = (key, self._arrange(key))
        return self._rows_of[1]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: Which one, from 0.
            start: Batches to pass over at the beginning.

        Yields:
            The batches from `start` on, exactly those that an epoch from its beginning has there.
        """
        rows = self.rows(epoch)
        for begin in range(start * self._batch_size, len(rows), self._batch_size):
            chosen = rows[begin : begin + self._batch_size]
            yield collate(self._samples, chosen, self._pad_id, self._max_length, self._first_label)

    def places(self, batch: Batch) -> list[str]:
        """Where the samples of a batch come from, as "name:line" without the folder, which may change."""
        return [self._samples[index].where.rpartition("/")[2] for row in batch.sample_ids for index in row]

    def utilisation(self, epoch: int = 0) -> float:
        """Share of an epoch's token places that hold no padding."""
        rows = [sum(self._lengths[index] for index in row) for row in self.rows(epoch)]
        batches = [rows[begin : begin + self._batch_size] for begin in range(0, len(rows), self._batch_size)]
        return sum(rows) / sum(_width(batch, self._max_length) * len(batch) for batch in batches)

    def widest(self) -> int:
        """Tokens of the widest rows of the first epoch, padding included."""
        return _width([sum(self._lengths[index] for index in row) for row in self.rows(0)], self._max_length)

    def _arrange(self, epoch: int) -> list[list[int]]:
        size = self._size
        drawn = range(len(self._samples)) if self._draw is None else self._draw(epoch).tolist()
        units = [drawn[begin : begin + size] for begin in range(0, len(drawn), size)]
        order = list(range(len(units)))
        # A string seeds the generator through its digest, the same on every machine.
        generator = random.Random(f"{self._seed}/{epoch}")
        if self._shuffle:
            generator.shuffle(order)
        if not self._packing:
            return [[index] for number in order for index in units[number]]
        lengths = [sum(self._lengths[index] for index in units[number]) for number in order]
        packed = pack(lengths, self._max_length)
        rows = [[order[place] for place in row] for row in packed]
        if self._shuffle:
            generator.shuffle(rows)
        else:
            rows = sorted(sorted(row) for row in rows)
        return [[index for number in row for index in units[number]] for row in rows]


def rounded_length(length: int) -> int:
    """A length rounded up to one of eight sizes per doubling, at most an eighth more.

    Matrix libraries compile and keep code and scratch memory for each shape they meet; lengths that are all
    different cost them time in every batch and gigabytes in the end.
    """
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _width(lengths: Sequence[int], max_length: int | None) -> int:
    longest = max(lengths)
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
    lengths = [sum(len(samples[index].input_ids) for index in row) for row in rows]
    width = _width(lengths, max_length)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        begin = 0
        for index in row:
            sample = samples[index]
            end = begin + len(sample.input_ids)
            input_ids[number, begin:end] = torch.tensor(sample.input_ids)
            learned = torch.tensor(sample.labels[first_label:], dtype=torch.long)
            labels[number, begin + first_label : end] = learned
            position_ids[number, begin:end] = torch.arange(end - begin)
            begin = end
        position_ids[number, begin:] = torch.arange(width - begin)
    num_labelled_tokens = int((labels != IGNORED).sum())
    return Batch(
        input_ids, position_ids, labels, sum(lengths), num_labelled_tokens, [list(row) for row in rows]
    )
