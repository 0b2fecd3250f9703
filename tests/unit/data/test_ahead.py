"""Work ahead by threads: order, errors in their turn, no more made than there are places for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from graft.data.ahead import in_order
from graft.errors import DataError


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_are_in_the_order_of_the_work(workers: int) -> None:
    def slow_when_even(item: int) -> int:
        time.sleep(0.002 * (item % 2 == 0))
        return item * item

    assert list(in_order(slow_when_even, range(40), workers)) == [item * item for item in range(40)]
    assert list(in_order(slow_when_even, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_where_its_turn_is(workers: int) -> None:
    def refuse_seven(item: int) -> int:
        if item == 7:
            raise DataError("seven")
        return item

    def items() -> Iterator[int]:
        yield from range(20)
        raise DataError("the source ended badly")

    found = in_order(refuse_seven, range(20), workers)
    assert [next(found) for _ in range(7)] == list(range(7))
    with pytest.raises(DataError, match="seven"):
        next(found)
    found = in_order(lambda item: item, items(), workers)
    assert [next(found) for _ in range(20)] == list(range(20))
    with pytest.raises(DataError, match="ended badly"):
        next(found)
    both = in_order(refuse_seven, items(), workers)
    with pytest.raises(DataError, match="seven"):
        list(both)


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_is_made_than_there_are_places_for(workers: int) -> None:
    drawn, made = [], []
    lock = threading.Lock()

    def make(item: int) -> int:
        with lock:
            made.append(item)
        return item

    def items() -> Iterator[int]:
        for item in range(1000):
            drawn.append(item)
            yield item

    found = in_order(make, items(), workers)
    for wanted in range(10):
        assert next(found) == wanted
        assert len(drawn) <= wanted + workers + 2
    found.close()  # type: ignore[attr-defined]
    assert len(made) <= 10 + workers + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("graft-ahead")]
