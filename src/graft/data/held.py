"""Samples with their figures at hand: lengths, learned tokens, digests; wherever the samples are."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from graft.data.samples import Sample

FIGURES = np.dtype([("key", "<u8", (2,)), ("tokens", "<i4"), ("learned", "<i4"), ("ends", "<i4")])


class Held(Sequence[Sample]):
    """Samples with their figures at hand, that are made when they are asked for."""

    lengths: NDArray[np.int32]
    """Tokens of each sample."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.sample(number) for number in range(*index.indices(len(self)))]
        return self.sample(range(len(self))[index])

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """The sample at a place from 0 on."""

    @abstractmethod
    def figures(self) -> NDArray[Any]:
        """Of each sample its key, tokens, learned tokens and ends; 28 bytes each."""

    def drawn(self, epoch: int) -> NDArray[np.int64] | None:
        """Which samples an epoch has, by their numbers; None where it has each of them once."""
        return None


class Chosen(Held):
    """Some of the samples of another sequence, in an order of their own.

    Args:
        samples: All.
        indexes: Which ones.
    """

    def __init__(self, samples: Held, indexes: NDArray[np.int64]) -> None:
        self._samples, self._indexes = samples, indexes
        self.lengths = samples.lengths[indexes]

    def sample(self, index: int) -> Sample:
        """The sample at a place from 0 on."""
        return self._samples.sample(int(self._indexes[index]))

    def figures(self) -> NDArray[Any]:
        """As of all samples."""
        return self._samples.figures()[self._indexes]


class Listed(Held):
    """A list of samples.

    Args:
        samples: All.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.lengths = lengths_of(samples)

    def sample(self, index: int) -> Sample:
        """The sample at a place from 0 on."""
        return self._samples[index]

    def figures(self) -> NDArray[Any]:
        """Of each sample its key, tokens, learned tokens and ends; 28 bytes each."""
        return figures_of(self._samples, ())


def held(samples: Sequence[Sample]) -> Held:
    """The same samples with their figures at hand."""
    return samples if isinstance(samples, Held) else Listed(samples)


def chosen(samples: Sequence[Sample], indexes: NDArray[np.int64]) -> Sequence[Sample]:
    """Some of the samples, in the order of the indexes."""
    if isinstance(samples, Held):
        return Chosen(samples, indexes)
    return [samples[index] for index in indexes.tolist()]


def tell(
    samples: Sequence[Sample], control_ids: Collection[int], into: NDArray[Any]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Fill in what is counted of samples.

    Args:
        samples: At least one.
        control_ids: See `StoreWriter`.
        into: One record for each, whose key, tokens, learned and ends (and spans) are filled in.

    Returns:
        All ids, and (N, 2) all learned ranges, sample by sample.
    """
    sizes = [len(sample) for sample in samples]
    written = array("i")  # takes lists five times as fast as numpy does
    for sample in samples:
        written.extend(sample.input_ids)
    ids = np.frombuffer(written, dtype=np.int32)
    ranges = [sample.learned for sample in samples]
    spans = np.asarray(list(chain.from_iterable(ranges)), dtype="<i4").reshape(-1, 2)
    counts = np.fromiter(map(len, ranges), np.int64, len(ranges))
    last = np.fromiter(
        (int(s.labels_in(end - 1, end)[0]) for s in samples for _, end in s.learned), "<i4", len(spans)
    )
    owners = np.repeat(np.arange(len(samples)), counts)
    into["tokens"] = sizes
    into["learned"] = np.bincount(owners, spans[:, 1] - spans[:, 0], len(samples))
    into["ends"] = np.bincount(owners, np.isin(last, list(control_ids)), len(samples))
    if "spans" in (into.dtype.names or ()):
        into["spans"] = counts
    into["key"] = _keys(ids.tobytes(), spans.tobytes(), last.tobytes(), sizes, counts.tolist())
    return ids, spans


def _keys(
    ids: bytes, spans: bytes, last: bytes, sizes: Sequence[int], counts: Sequence[int]
) -> NDArray[np.uint64]:
    """Of each sample 128 bits that are the same for equal ids and labels."""
    keys, token, span = [], 0, 0
    for size, count in zip(sizes, counts, strict=True):
        digest = hashlib.blake2b(ids[4 * token : 4 * (token + size)], digest_size=16)
        digest.update(spans[8 * span : 8 * (span + count)])
        digest.update(last[4 * span : 4 * (span + count)])
        keys.append(digest.digest())
        token, span = token + size, span + count
    return np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)


def lengths_of(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Tokens of each sample."""
    if isinstance(samples, Held):
        return samples.lengths
    return np.fromiter((len(sample) for sample in samples), np.int32, len(samples))


def figures_of(samples: Sequence[Sample], control_ids: Collection[int]) -> NDArray[Any]:
    """Of each sample its key, tokens, learned tokens and ends."""
    if isinstance(samples, Held):
        return samples.figures()
    found = np.zeros(len(samples), dtype=FIGURES)
    if len(samples):
        tell(samples, control_ids, found)
    return found


def repeats(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows of keys are equal to an earlier one.

    Args:
        keys: (N, W).

    Returns:
        The later ones, ascending, and for each the first that is equal.
    """
    order = np.lexsort(keys.T)  # stable: equal rows stay in their order
    ranked = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    first = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    later, first = order[~new], first[~new]
    ascending = np.argsort(later)
    return later[ascending], first[ascending]
