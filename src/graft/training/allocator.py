"""The C library's heap under torch's tensors: fast to take from, and without holes that hold memory.

Tensors with pages of their own (glibc gives them from 128 KiB on, and ever larger ones as they are freed) go
back to the system at once, which clears fresh pages for the next ones: much of a step's time where a page
fault is dear, as in a virtual machine. Tensors in the heap are cheap, but holes stay between those that are
kept for the backward pass: a freed block is seldom found fit for its own size again, because torch asks for
aligned ones. So tensors go into the heap, and its holes go back to the system when the process holds more
than it held after the last time: in the first step as memory fills, later about once a step.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from torch import Tensor

from graft.models.recipes import Handle, Kept
from graft.training.monitors import memory_bytes

MOST_IN_HEAP_BYTES = 32 << 20
"""The largest size from which on tensors may have pages of their own: glibc takes no larger one."""

FEW_IN_HEAP_BYTES = 1 << 20
"""The size where memory counts more than time."""

SPARE_BYTES = 256 << 20
"""Free memory at the heap's end that glibc does not give back by itself: the next passes take it."""

STRIDE_BYTES = 160 << 20
"""When the process holds so much more than after the heap's holes were given back last, they are again."""

SHORT_STRIDE_BYTES = 64 << 20
"""The same where blocks are recomputed: less is kept, and memory counts more than time."""

LOOK_BYTES = 16 << 20
"""After so much was kept or taken up again it is looked how much the process holds."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # their numbers in malloc.h


def tensors_in_heap(*, below: int) -> bool:
    """Set for the life of the process which tensors are in the heap.

    Args:
        below: Their bytes; larger ones have pages of their own.

    Returns:
        Whether it was done; not where the C library has no such settings, or where MALLOC_MMAP_THRESHOLD_ or
        MALLOC_TRIM_THRESHOLD_ says that the user has chosen.
    """
    chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if sys.platform != "linux" or chosen:
        return False
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    sizes = {M_MMAP_THRESHOLD: below, M_TRIM_THRESHOLD: SPARE_BYTES}
    return all(bool(mallopt(name, size)) for name, size in sizes.items())


def give_back() -> None:
    """Give the heap's free pages back to the system, where the C library can: glibc does, musl needs not."""
    if sys.platform == "linux":
        trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


class TidyKept(Kept):
    """Keeps tensors as they are, and the heap around them without more holes than it must have.

    Args:
        stride_bytes: Memory beyond what was held after holes were given back that leads to it again.
    """

    def __init__(self, stride_bytes: int = STRIDE_BYTES) -> None:
        self._stride_bytes, self._since = stride_bytes, 0
        self._most_bytes: int | None = None

    def put(self, tensor: Tensor) -> Handle:
        """Keep a tensor."""
        self._count(tensor)
        return super().put(tensor)

    def get(self, handle: Handle) -> Tensor:
        """The tensor again."""
        found = super().get(handle)
        self._count(found)
        return found

    def _count(self, tensor: Tensor) -> None:
        self._since += tensor.nbytes
        if self._since < LOOK_BYTES:
            return
        self._since = 0
        held = memory_bytes()
        if self._most_bytes is None:
            self._most_bytes = held + self._stride_bytes
        if held > self._most_bytes:
            give_back()
            # What a run needs at its fullest is learned in the first step: it only ever rises.
            self._most_bytes = max(self._most_bytes, memory_bytes() + self._stride_bytes)
