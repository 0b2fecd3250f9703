"""The computed shuffle: a permutation, the same everywhere, that looks random."""

from __future__ import annotations

import hashlib
from itertools import permutations

import numpy as np
import pytest

from graft.data.shuffling import key_of, permuted

MASK = 2**64 - 1


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def slow(place: int, n: int, key: int) -> int:
    """The same number with Python's own integers, one place at a time."""
    half = 1
    while 4**half < n:
        half += 1
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=48).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]
    while True:
        left, right = divmod(place, 2**half)
        for one in keys:
            left, right = right, left ^ (_mix(right ^ one) % 2**half)
        place = left * 2**half + right
        if place < n:
            return place


def test_every_small_set_is_permuted() -> None:
    for n in range(1, 2001):
        assert sorted(permuted(0, n, n, key=n).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**16, 2**16 + 1, 99_991, 200_003])
def test_a_larger_set_is_permuted(n: int) -> None:
    assert np.array_equal(np.sort(permuted(0, n, n, key=5)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4097, 10**12 + 39, 2**62])
def test_the_values_are_those_of_whole_number_arithmetic(n: int) -> None:
    for key in (0, key_of("seed", 7), MASK):
        begin = n // 3
        end = min(begin + 20, n)
        assert permuted(begin, end, n, key).tolist() == [slow(place, n, key) for place in range(begin, end)]


def test_a_part_is_what_the_whole_has_there() -> None:
    whole = permuted(0, 100_000, 100_000, key=3)
    assert np.array_equal(permuted(65_000, 70_001, 100_000, key=3), whole[65_000:70_001])
    assert permuted(5, 5, 10, key=3).size == 0
    assert permuted(0, 0, 0, key=3).size == 0


def test_another_key_gives_another_order() -> None:
    n = 10_000
    orders = [permuted(0, n, n, key_of(seed, epoch)) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders agree in one place on average (Poisson): ten is beyond one in a million.
            assert (one == other).sum() < 10


def _chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_each_order_of_four_is_as_frequent_as_the_others() -> None:
    number = {order: i for i, order in enumerate(permutations(range(4)))}
    found = [number[tuple(permuted(0, 4, 4, key).tolist())] for key in range(12_000)]
    # 23 degrees of freedom: above 49.7 once in a thousand, and the keys are fixed.
    assert _chi_square(np.bincount(found, minlength=24)) < 49.7


def test_each_place_gets_each_number_equally_often() -> None:
    n, keys = 10, 5_000
    found = np.stack([permuted(0, n, n, key_of("place", key)) for key in range(keys)])
    for place in range(n):
        assert _chi_square(np.bincount(found[:, place], minlength=n)) < 27.9  # 9 degrees, one in a thousand


def test_neighbours_have_nothing_to_do_with_each_other() -> None:
    n = 100_000
    order = permuted(0, n, n, key=1).astype(float)
    for distance in (1, 2, 256):
        correlation = np.corrcoef(order[:-distance], order[distance:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(n)
