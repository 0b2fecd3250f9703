"""Where a pager's pages lie when they are not in its frames: a file without a name, or the host's memory.

The file has no name in its directory, so that nothing is left of it however the process ends. Its whole
length is asked for at the start: a disk that is too small is told before the first step, not in the middle.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from graft import files
from graft.errors import StorageError
from graft.training.store import Pager

SECTOR = 4096
"""Pages begin at multiples of this, as the disk's and the system's own do."""


class SpillFile:
    """Pages in a file.

    Args:
        directory: That holds it; must exist.
        sizes: Bytes of each page.

    Raises:
        StorageError: The directory cannot be written, or the disk has not so many bytes.
    """

    def __init__(self, directory: str | os.PathLike[str], sizes: Sequence[int]) -> None:
        spaces = [-(-size // SECTOR) * SECTOR for size in sizes]
        *self._begins, self.num_bytes = accumulate(spaces, initial=0)
        self._directory = directory
        self._handle = files.scratch_file(directory, self.num_bytes)
        self._close = weakref.finalize(self, os.close, self._handle)

    def read(self, index: int, into: Tensor) -> None:
        """Fill a buffer in host memory with a page that was written before.

        Raises:
            StorageError: It cannot be read back.
        """
        if missing := files.read_at(self._handle, into.numpy().data, self._begins[index]):
            raise StorageError(
                f"a page of the optimizer's state cannot be read back: {missing:,} bytes are missing",
                where=f"the spill file in {self._directory}",
                fix="look at the disk; `graft train --resume` goes on from the newest checkpoint",
            )

    def write(self, index: int, buffer: Tensor) -> None:
        """Keep a page from host memory."""
        memory = buffer.numpy().data
        with files.refusing(Path(self._directory) / "scratch file", len(memory)):
            files.write_at(self._handle, memory, self._begins[index])

    def close(self) -> None:
        """Close the file, which is then gone."""
        self._close()


class HostPages:
    """Pages of a device in the host's memory, each from when it is first written.

    Args:
        sizes: Bytes of each page.
        pinned: Whether the memory stays where it is, so that the device copies at full speed.
    """

    def __init__(self, sizes: Sequence[int], *, pinned: bool) -> None:
        self._sizes, self._pinned = sizes, pinned
        self._pages: dict[int, Tensor] = {}

    def read(self, index: int, into: Tensor) -> None:
        """Fill a buffer on the device."""
        into.copy_(self._pages[index])

    def write(self, index: int, buffer: Tensor) -> None:
        """Keep a page of the device."""
        if index not in self._pages:
            self._pages[index] = host_memory(self._sizes[index], pinned=self._pinned)
        self._pages[index].copy_(buffer)

    def close(self) -> None:
        """Give the memory up."""
        self._pages.clear()


class HostPager:
    """Pages of a device in a budget of the host's memory, over a file.

    Args:
        inner: The pager of the host's memory.
    """

    def __init__(self, inner: Pager) -> None:
        self._inner = inner

    def read(self, index: int, into: Tensor) -> None:
        """Fill a buffer on the device."""
        into.copy_(self._inner.page(index, change=False))

    def write(self, index: int, buffer: Tensor) -> None:
        """Keep a page of the device."""
        self._inner.page(index, change=True).copy_(buffer)

    def close(self) -> None:
        """Give memory and file up."""
        self._inner.close()


def host_memory(num_bytes: int, *, pinned: bool) -> Tensor:
    """Bytes in the host's memory."""
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
