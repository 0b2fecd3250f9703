"""The order of batches, and what a batch holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graft.data.held import Listed
from graft.data.loader import Loader, rounded_length
from graft.data.masking import IGNORED, Sample


def samples(*lengths: int) -> list[Sample]:
    return [Sample([n + 1] * length, [IGNORED, *[n + 1] * (length - 1)]) for n, length in enumerate(lengths)]


def order(loader: Loader, epoch: int) -> list[list[int]]:
    return [row for batch in loader.epoch(epoch) for row in batch.sample_ids]


def test_a_packed_batch_by_hand() -> None:
    loader = Loader(samples(3, 2, 4), 2, 6, packing=True, shuffle=False, pad_id=9)
    (batch,) = loader.epoch(0)
    assert batch.sample_ids == [[0], [1, 2]]
    assert batch.input_ids.tolist() == [[1, 1, 1, 9, 9, 9], [2, 2, 3, 3, 3, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    assert batch.labels.tolist() == [[-100, 1, 1, -100, -100, -100], [-100, 2, -100, 3, 3, 3]]
    assert (batch.num_tokens, batch.num_labelled_tokens) == (9, 6)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.long
    assert loader.utilisation() == pytest.approx(9 / 12)


def test_the_first_label_of_a_sample_is_never_learned() -> None:
    whole = [Sample([5, 6], [5, 6]), Sample([7, 8], [7, 8])]
    (batch,) = Loader(whole, 1, 4, packing=True, shuffle=False).epoch(0)
    assert batch.labels.tolist() == [[-100, 6, -100, 8]]


def test_the_order_follows_from_seed_and_epoch() -> None:
    rows = samples(*range(1, 9), *range(1, 9))
    for packing in (False, True):
        first, second, other = (Loader(rows, 2, 12, packing, seed=seed) for seed in (3, 3, 4))
        assert order(first, 0) == order(second, 0)
        assert order(first, 1) == order(second, 1)
        assert order(first, 0) != order(first, 1)
        assert order(first, 0) != order(other, 0)
    plain = Loader(rows, 2, 12, packing=False, shuffle=False)
    assert order(plain, 0) == order(plain, 1) == [[i] for i in range(16)]


def test_packed_rows_have_another_order_in_each_epoch() -> None:
    """No two of these samples fit into one row, and packing puts the longest first."""
    loader = Loader(samples(*range(33, 65)), 2, 64, packing=True)
    orders = [order(loader, epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == [[i] for i in range(32)]


def test_packing_in_shuffled_epochs_changes_the_company() -> None:
    loader = Loader(samples(*[3] * 40), 1, 6, packing=True)
    company = [{frozenset(row) for row in order(loader, epoch)} for epoch in (0, 1)]
    assert company[0] != company[1]
    assert loader.num_batches(0) == loader.num_batches(1) == 20


def test_lengths_are_rounded_to_few_sizes() -> None:
    sizes = {rounded_length(length) for length in range(1, 4097)}
    assert len(sizes) <= 8 * 12
    for length in range(1, 4097):
        assert length <= rounded_length(length) <= length + max(7, length / 8)


def test_the_width_of_a_batch_stays_within_max_length() -> None:
    samples = [Sample(list(range(100)), [-100, *range(1, 100)])]
    assert next(Loader(samples, 1, 100, packing=True).epoch(0)).input_ids.shape == (1, 100)
    assert next(Loader(samples, 1, 512, packing=True).epoch(0)).input_ids.shape == (1, rounded_length(100))


class Drawn(Listed):
    """Samples of which each epoch has some."""

    def __init__(self, rows: list[Sample], draws: dict[int, list[int]]) -> None:
        super().__init__(rows)
        self._draws = draws

    def drawn(self, epoch: int) -> Any:
        return np.array(self._draws[epoch])


def test_drawn_samples_are_those_of_the_epoch_with_their_repeats() -> None:
    rows = samples(3, 2, 4, 5)
    drawn = {0: [2, 0, 0, 3], 1: [1, 1, 1, 1, 1, 0]}
    for packing, shuffle in [(True, True), (True, False), (False, True), (False, False)]:
        loader = Loader(Drawn(rows, drawn), 2, 9, packing, shuffle=shuffle)
        for epoch in (0, 1, 0):
            found = [index for row in order(loader, epoch) for index in row]
            assert sorted(found) == sorted(drawn[epoch])
            assert loader.num_batches(epoch) == len(list(loader.epoch(epoch)))
        if not packing and not shuffle:
            assert order(loader, 0) == [[2], [0], [0], [3]]
            assert (loader.num_batches(0), loader.num_batches(1)) == (2, 3)
    assert not loader.is_even
    assert Loader(rows, 2, 9, packing=True).is_even


def test_drawn_pairs_stay_together() -> None:
    rows = Drawn(samples(3, 3, 2, 2), {0: [2, 3, 0, 1, 2, 3]})
    loader = Loader(rows, 1, 6, packing=True, kind="pair")
    assert sorted(index for row in order(loader, 0) for index in row) == [0, 1, 2, 2, 3, 3]
    for row in order(loader, 0):
        assert all(second == first + 1 for first, second in zip(row[::2], row[1::2], strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_is_entered_at_any_batch(packing: bool, workers: int) -> None:
    loader = Loader(samples(*range(2, 9), *range(2, 9)), 2, 12, packing, seed=3)
    loader.workers = workers
    whole = [batch.input_ids.tolist() for batch in loader.epoch(1)]
    for start in range(len(whole) + 1):
        assert [batch.input_ids.tolist() for batch in loader.epoch(1, start)] == whole[start:]
