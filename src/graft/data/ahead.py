"""Work done ahead of its use by threads, its results in the order of the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from graft.errors import GraftError

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_order(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """What `make` gives for each item, in their order.

    An error, of an item or of what is made of it, comes where its turn is: all that stands before it was
    given. What is left when the caller stops is not made.

    Args:
        make: Called in any of the threads.
        items: Drawn in the caller's thread, so many ahead as there are places for them.
        workers: Threads; with none each is made when it is asked for.
    """
    if not workers:
        yield from map(make, items)
        return
    ahead: deque[Future[Made]] = deque()
    failed: GraftError | None = None
    source = iter(items)
    with ThreadPoolExecutor(workers, "graft-ahead") as pool:
        try:
            while True:
                try:
                    item = next(source)
                except StopIteration:
                    break
                except GraftError as error:
                    failed = error
                    break
                ahead.append(pool.submit(make, item))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
    if failed is not None:
        raise failed
