"""Activations that leave memory between the two passes: from a device to the host, from the host to a file.

Only what the backward pass needs and is large leaves: floating-point tensors of a mebibyte or more that are
no weights. Tensors with one memory (three linears keep one input) leave once. The backward pass asks in the
other direction, so what was put just before is fetched ahead.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from graft import files
from graft.errors import StorageError
from graft.models.recipes import AHEAD_BYTES, Handle, Kept

SMALLEST_BYTES = 1 << 20
"""Tensors from this size on leave."""

GROWTH_BYTES = 64 << 20
"""By so much the file grows at a time."""


class Place(Protocol):
    """Where bytes lie between the passes; they are put one after another, and none is taken out alone."""

    def write(self, numbers: Tensor) -> Any:
        """Keep a flat tensor; returns what `read` wants."""

    def ahead(self, where: Any) -> None:
        """Begin to fetch what will be read soon."""

    def read(self, where: Any) -> Tensor:
        """The flat tensor again, where and as it was."""

    def clear(self) -> None:
        """Nothing of what was written is read any more."""

    def close(self) -> None:
        """Give everything up."""


class _Slot:
    """One memory that left: its number in the order of leaving, where it is, its size."""

    def __init__(self, index: int, where: Any, num_bytes: int) -> None:
        self.index, self.where, self.num_bytes = index, where, num_bytes


class Offloaded(Kept):
    """A store of which large tensors leave memory.

    Args:
        place: Where to.
        lasting: Tensors that are in memory anyway, such as weights; they and their views stay.
        smallest: Bytes from which on a tensor leaves.

    Attributes:
        num_bytes: That left in the last pass.
    """

    def __init__(self, place: Place, lasting: Iterable[Tensor] = (), smallest: int = SMALLEST_BYTES) -> None:
        self._place, self._smallest = place, smallest
        self._lasting = {_storage(tensor) for tensor in lasting}
        self._slots: list[_Slot] = []
        self._gone: dict[int, list[tuple[StorageWeakRef, tuple[Any, ...], _Slot]]] = {}
        self._back: OrderedDict[int, Tensor] = OrderedDict()
        self.num_bytes = 0

    def put(self, tensor: Tensor) -> Handle:
        """Let a tensor leave, or keep it as it is."""
        if not self._leaves(tensor):
            return super().put(tensor)
        tensor = tensor.detach()
        dense = tensor.stride() == torch.empty_like(tensor).stride()
        tensor = tensor if dense else tensor.contiguous()
        return self._slot(tensor), tensor.dtype, tensor.shape, tensor.stride()

    def get(self, handle: Handle) -> Tensor:
        """The tensor again.

        Raises:
            StorageError: The disk does not give it back.
            RuntimeError: It stayed, and was written to.
        """
        if not isinstance(handle[0], _Slot):
            return super().get(handle)
        slot, dtype, shape, stride = handle
        flat = self._fetch(slot)
        return flat.view(dtype).as_strided(shape, stride)

    def close(self) -> None:
        """After a backward pass: begin again where the first tensor lay."""
        self._forget()
        self._place.clear()

    def release(self) -> None:
        """Give back memory and disk."""
        self._forget()
        self._place.close()

    def _forget(self) -> None:
        self.num_bytes = sum(slot.num_bytes for slot in self._slots) or self.num_bytes
        self._slots.clear()
        self._gone.clear()
        self._back.clear()

    def _leaves(self, tensor: Tensor) -> bool:
        return (
            tensor.is_floating_point()
            and tensor.numel() * tensor.element_size() >= self._smallest
            and not any(
                stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            )
            and not isinstance(tensor, nn.Parameter)
            and _storage(tensor) not in self._lasting
        )

    def _slot(self, tensor: Tensor) -> _Slot:
        """Where a dense tensor goes, or went: the same numbers of the same memory go once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        what = (tensor.storage_offset() * tensor.element_size(), tensor.nbytes, tensor._version)
        # While the weak reference stands, no other memory can have this address.
        known = [entry for entry in self._gone.get(key, ()) if not entry[0].expired()]
        for _, same, slot in known:
            if same == what:
                return slot
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        slot = _Slot(len(self._slots), self._place.write(flat), tensor.nbytes)
        self._slots.append(slot)
        self._gone[key] = [*known, (StorageWeakRef(storage), what, slot)]
        return slot

    def _fetch(self, slot: _Slot) -> Tensor:
        if slot.index in self._back:
            self._back.move_to_end(slot.index)
        else:
            self._back[slot.index] = self._place.read(slot.where)
            held = sum(self._slots[index].num_bytes for index in self._back)
            while held > AHEAD_BYTES and len(self._back) > 1:
                held -= self._slots[self._back.popitem(last=False)[0]].num_bytes
        self._announce(slot.index)
        return self._back[slot.index]

    def _announce(self, index: int) -> None:
        room = AHEAD_BYTES
        for slot in reversed(self._slots[:index]):
            room -= slot.num_bytes
            if room < 0:
                break
            self._place.ahead(slot.where)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class FilePlace:
    """Bytes of the host in a file without a name, which is gone with the process.

    The system writes them out while the forward pass goes on, and reads them in again ahead of the backward
    pass; what memory nobody else wants holds them meanwhile.

    Args:
        directory: Of the file; it must exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._handle: int | None = None
        self._end = self._length = 0
        self._room_for(0)  # a directory that cannot be written is told before the first step

    def write(self, numbers: Tensor) -> tuple[int, int]:
        """Keep a flat tensor of bytes.

        Raises:
            StorageError: The disk is full, or the directory cannot be written.
        """
        begin, size = self._end, len(numbers)
        with files.refusing(self._directory / "scratch file", size):
            files.write_at(self._room_for(begin + size), numbers.numpy().data, begin)
        self._end = begin + size
        return begin, size

    def ahead(self, where: tuple[int, int]) -> None:
        """Tell the system what will be read."""
        if self._handle is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, *where, os.POSIX_FADV_WILLNEED)

    def read(self, where: tuple[int, int]) -> Tensor:
        """The bytes again.

        Raises:
            StorageError: They are not there.
        """
        begin, size = where
        found = torch.empty(size, dtype=torch.uint8)
        memory = found.numpy().data
        missing = size if self._handle is None else files.read_at(self._handle, memory, begin)
        if missing:
            raise StorageError(
                f"{missing:,} bytes of activations cannot be read back",
                where=f"the scratch file in {self._directory}",
                fix="look at the disk; `graft train --resume` goes on from the newest checkpoint",
            )
        return found

    def clear(self) -> None:
        """The next bytes take the place of the first; the file keeps its length."""
        self._end = 0

    def close(self) -> None:
        """The file is gone; the next write makes another."""
        if self._handle is not None:
            self._close()
        self._handle, self._end, self._length = None, 0, 0

    def _room_for(self, length: int) -> int:
        if self._handle is None:
            self._handle = files.scratch_file(self._directory, 0)
            self._close = weakref.finalize(self, os.close, self._handle)
        if length > self._length:
            grown = -(-length // GROWTH_BYTES) * GROWTH_BYTES
            if hasattr(os, "posix_fallocate"):  # a full disk is told here, not when it writes back
                os.posix_fallocate(self._handle, self._length, grown - self._length)
            self._length = grown
        return self._handle


class HostPlace:
    """Bytes of a CUDA device in pinned memory of the host, copied beside the computation.

    Args:
        device: The device.

    Cost: two copies over the bus for each tensor; as much pinned memory as one pass needs, kept for the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._free: dict[int, list[Tensor]] = {}
        self._used: list[Tensor] = []
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._coming: dict[int, tuple[Any, Tensor]] = {}

    def write(self, numbers: Tensor) -> int:
        """Keep a flat tensor of bytes; the copy runs while the device goes on."""
        buffers = self._free.get(len(numbers), [])
        buffer = buffers.pop() if buffers else torch.empty(len(numbers), dtype=torch.uint8, pin_memory=True)
        self._leaving.append((self._copy(numbers, buffer), numbers))
        # A forward pass that is faster than the bus waits for it, or memory would fill with what leaves.
        while sum(len(waiting) for _, waiting in self._leaving) > AHEAD_BYTES and len(self._leaving) > 1:
            self._after(self._leaving.popleft()[0])
        self._used.append(buffer)
        return len(self._used) - 1

    def ahead(self, where: int) -> None:
        """Begin the copy back."""
        if where not in self._coming:
            buffer = self._used[where]
            found = torch.empty(len(buffer), dtype=torch.uint8, device=self._device)
            self._coming[where] = self._copy(buffer, found), found

    def read(self, where: int) -> Tensor:
        """The bytes again, on the device."""
        self.ahead(where)
        event, found = self._coming.pop(where)
        self._after(event)
        return found

    def clear(self) -> None:
        """The next tensors take the same pinned memory."""
        for event, _ in [*self._leaving, *self._coming.values()]:
            self._after(event)
        self._leaving.clear()
        self._coming.clear()
        for buffer in self._used:
            self._free.setdefault(len(buffer), []).append(buffer)
        self._used.clear()

    def close(self) -> None:
        """Give the pinned memory up."""
        self.clear()
        self._stream.synchronize()
        self._free.clear()

    def _copy(self, source: Tensor, into: Tensor) -> Any:
        """Copy on the stream of its own, after all that was asked of the device so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def _after(self, event: Any) -> None:
        """What the device does from here on comes after a copy, so that its tensor may be used or freed."""
        torch.cuda.current_stream(self._device).wait_event(event)
