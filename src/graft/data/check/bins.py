"""Distributions of whole numbers in few bins of round widths, for bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Bin:
    """Numbers from `begin` to `last`, both within, and how often they are there."""

    begin: int
    last: int
    count: int


def width_of(largest: int, most: int) -> int:
    """The smallest width of 1, 2 or 5 times a power of ten with which `most` bins reach up to a number."""
    width = 1
    while width * most <= largest:
        width = next(
            factor * power for power in [_power(width)] for factor in (2, 5, 10) if factor * power > width
        )
    return width


def _power(number: int) -> int:
    power = 1
    while power * 10 <= number:
        power *= 10
    return power


def bins(counts: NDArray[Any], width: int, largest: int) -> list[Bin]:
    """The bins from 0 up to the one that holds `largest`.

    Args:
        counts: How often 0, 1, 2, ... is there.
        width: Numbers of a bin.
        largest: Where the last bin ends.
    """
    starts = range(0, largest + 1, width)
    return [
        Bin(begin, min(begin + width - 1, largest), int(counts[begin : begin + width].sum()))
        for begin in starts
    ]
