"""Where pages are: all in memory, or in a budget of it with the rest paged to a place below.

The pager is a cache of page-sized frames that gives up the page whose use is longest ago. The order of use
is known, so the next pages are fetched, and changed ones written back, by a worker thread while the present
one is updated. Each step goes through the pages the other way round: what is in memory at the end of one is
what the next begins with, where the same order every time would find nothing of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from graft.errors import StorageError

AHEAD = 2
"""Pages that are fetched before their turn."""

Clear = Callable[[int, Tensor], None]
"""Makes a buffer what the page of that number is before its first change."""


class Store(Protocol):
    """Pages by number; a page is a flat tensor of bytes."""

    def visit(self, pages: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each of some pages once, to be changed, in an order of the store's choice; valid until the next."""

    def page(self, index: int, *, change: bool) -> Tensor:
        """One page, to be read or changed; valid until the next call."""

    def close(self) -> None:
        """Give up what is held outside memory."""


class Resident:
    """All pages in memory, each from when it is first needed.

    Args:
        sizes: Bytes of each page.
        clear: Of pages.
        device: Where to.
    """

    def __init__(self, sizes: Sequence[int], clear: Clear, device: torch.device) -> None:
        self._sizes, self._clear, self._device = sizes, clear, device
        self._buffers: dict[int, Tensor] = {}

    def visit(self, pages: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each of some pages once, in the order given."""
        for index in pages:
            yield index, self.page(index, change=True)

    def page(self, index: int, *, change: bool) -> Tensor:
        """One page."""
        if index not in self._buffers:
            buffer = torch.empty(self._sizes[index], dtype=torch.uint8, device=self._device)
            self._clear(index, buffer)
            self._buffers[index] = buffer
        return self._buffers[index]

    def close(self) -> None:
        """Nothing is held elsewhere."""


class Below(Protocol):
    """Holds the pages that are not in the frames of a pager."""

    def read(self, index: int, into: Tensor) -> None:
        """Fill a buffer with a page that was written before."""

    def write(self, index: int, buffer: Tensor) -> None:
        """Keep a page."""

    def close(self) -> None:
        """Give the pages up."""


class Lane:
    """How the worker's copies are ordered against the updates: on a CPU by what was called before.

    A copy runs on the worker's thread, and a page is handed out when its copy is done; only what the device
    has been given and not yet done needs a mark.
    """

    def mark(self) -> Any:
        """A point behind everything that this thread has asked the device for."""

    def run(self, mark: Any, job: Callable[[], None]) -> None:
        """Run copies after what the mark stands for; returns when they are done."""
        job()


class CudaLane:
    """The same with a stream of its own: copies go beside the updates, not between them.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> Any:
        """A point behind everything that this thread has asked the device for."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def run(self, mark: Any, job: Callable[[], None]) -> None:
        """Run copies after what the mark stands for; returns when they are done."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            job()
        self._stream.synchronize()


class _Frame:
    """Memory for one page, and what is known of the page in it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.changed = False
        self.coming: Future[None] | None = None


class Pager:
    """As many frames as a budget holds, over a place below.

    Args:
        sizes: Bytes of each page.
        clear: Of pages.
        frames: Memory for a page each, of the largest size; at least one. With one, nothing is fetched ahead.
        below: For the rest.
        lane: Orders copies and updates.

    Attributes:
        num_reads: Pages fetched from below so far.
        num_writes: Pages written to it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        clear: Clear,
        frames: Sequence[Tensor],
        below: Below,
        lane: Lane | CudaLane,
    ) -> None:
        self._sizes, self._clear, self._below, self._lane = sizes, clear, below, lane
        self._free = [_Frame(memory) for memory in frames]
        self._ahead = min(AHEAD, len(frames) - 1)
        self._held: OrderedDict[int, _Frame] = OrderedDict()
        self._kept_below: set[int] = set()
        self._last = -1
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pager")
        self._failure: BaseException | None = None
        self.num_reads = self.num_writes = 0

    def visit(self, pages: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each of some pages once, beginning at the end where the last visit stopped."""
        order = list(pages)
        if order and abs(order[-1] - self._last) < abs(order[0] - self._last):
            order.reverse()
        for place, index in enumerate(order):
            wanted = order[place : place + 1 + self._ahead]
            for each in wanted:
                self._bring(each, wanted)
            frame = self._wait(index)
            frame.changed = True
            self._last = index
            yield index, frame.memory[: self._sizes[index]]

    def page(self, index: int, *, change: bool) -> Tensor:
        """One page, to be read or changed; valid until the next call."""
        self._bring(index, [index])
        frame = self._wait(index)
        frame.changed |= change
        return frame.memory[: self._sizes[index]]

    def close(self) -> None:
        """End the worker and give up the pages."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._below.close()
        self._failure = self._failure or StorageError("the pager is closed", fix="make a new optimizer")

    def _bring(self, index: int, wanted: Sequence[int]) -> None:
        if self._failure:  # a page that was not written back is lost: nothing may go on without it
            raise self._failure
        if index in self._held:
            self._held.move_to_end(index)
            return
        frame, leaving = self._frame_for(wanted)
        write = leaving if leaving is not None and frame.changed else None
        read = index in self._kept_below
        if write is not None:
            self._kept_below.add(write)
        self.num_reads, self.num_writes = self.num_reads + read, self.num_writes + (write is not None)
        frame.changed = False
        mark = self._lane.mark()
        frame.coming = self._worker.submit(self._move, mark, frame.memory, write, index, read)
        self._held[index] = frame

    def _frame_for(self, wanted: Sequence[int]) -> tuple[_Frame, int | None]:
        if self._free:
            return self._free.pop(), None
        leaving = next(held for held in self._held if held not in wanted)
        return self._held.pop(leaving), leaving

    def _move(self, mark: Any, memory: Tensor, write: int | None, index: int, read: bool) -> None:
        """On the worker: one page out, another in."""

        def job() -> None:
            if write is not None:
                self._below.write(write, memory[: self._sizes[write]])
            buffer = memory[: self._sizes[index]]
            if read:
                self._below.read(index, buffer)
            else:
                self._clear(index, buffer)

        self._lane.run(mark, job)

    def _wait(self, index: int) -> _Frame:
        frame = self._held[index]
        if frame.coming is not None:
            try:
                frame.coming.result()
            except BaseException as error:
                self._failure = error
                raise
            frame.coming = None
        return frame
