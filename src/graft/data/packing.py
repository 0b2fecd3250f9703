"""Which samples share a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put samples into rows of at most `max_length` tokens, first fit decreasing.

    The longest sample comes first, and each goes into the first row that has room; among samples of one
    length the earlier comes first. At most 11/9 of the fewest possible rows are used, plus one.

    Args:
        lengths: Tokens of each sample, each from 1 to max_length.
        max_length: Tokens of a row.

    Returns:
        For each row the indexes of its samples.

    Cost: one vector operation over the rows for each distinct length.
    Source: Johnson, Near-optimal bin packing algorithms, 1973.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.size == 0 or (sizes.min() > 0 and sizes.max() <= max_length)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    rows: list[list[int]] = []
    room = np.zeros(0, dtype=np.int64)
    members = iter(order.tolist())
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        # First fit of equal sizes fills each row as far as it goes before the next.
        fits = room // size
        takes = np.minimum(fits, np.maximum(count - (np.cumsum(fits) - fits), 0))
        left = count - int(takes.sum())
        per_row = max_length // size
        fresh = [min(per_row, left - start) for start in range(0, left, per_row)]
        rows.extend([] for _ in fresh)
        takes = np.concatenate([takes, np.asarray(fresh, dtype=np.int64)])
        room = np.concatenate([room, np.full(len(fresh), max_length, dtype=np.int64)]) - takes * size
        for row in np.flatnonzero(takes).tolist():
            rows[row].extend(islice(members, int(takes[row])))
    return rows
