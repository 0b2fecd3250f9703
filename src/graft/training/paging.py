"""How a memory budget becomes pages, frames and a place for what does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from graft.errors import ConfigError
from graft.training.config import TrainingConfig
from graft.training.pages import GRAIN, Kind, Page, lay_out
from graft.training.sizes import num_bytes
from graft.training.spill import HostPager, HostPages, SpillFile, host_memory
from graft.training.store import Below, Clear, CudaLane, Lane, Pager, Resident, Store

DEVICE_NUMBERS = 1 << 22
"""Numbers updated at once on a device without a budget: what is worth a launch."""

PAGED_NUMBERS = 1 << 18
"""Numbers in a page at most, with a budget."""

WANTED_FRAMES = 8
"""Pages are so small that a budget holds as many: one is updated, two are on their way, five stay."""


@dataclass(frozen=True)
class Paging:
    """What a run allows the state of its optimizer.

    Attributes:
        memory_bytes: On the device that trains; None for all of it.
        host_bytes: Of a device's host, for the rest; None for all of it.
        directory: Of the spill file.
        spill_asked: Whether the directory is the user's choice, for that device there then must be a file.
    """

    memory_bytes: int | None
    host_bytes: int | None
    directory: str | os.PathLike[str]
    spill_asked: bool = False

    @classmethod
    def of(cls, config: TrainingConfig, run_directory: str | os.PathLike[str]) -> Paging:
        """The budgets of a configuration.

        Raises:
            ConfigError: One is no amount of memory.
        """

        def amount(name: str) -> int | None:
            value = getattr(config, name)
            return None if value is None else num_bytes(value, f"training.{name}")

        asked = config.optimizer_spill
        budget, host = amount("optimizer_memory"), amount("optimizer_host_memory")
        return cls(budget, host, run_directory if asked is None else asked, asked is not None)


def pages_and_store(
    parameters: Mapping[str, Parameter], kinds: Mapping[str, Kind], paging: Paging
) -> tuple[list[Page], Store]:
    """The pages of some tensors, and where they are.

    Args:
        parameters: The tensors by name, on one device.
        kinds: Of each.
        paging: The budgets.

    Raises:
        ConfigError: A budget holds no page, or acts on nothing.
        StorageError: The spill file cannot be made.
    """
    device = next(iter(parameters.values())).device
    _check_acts(kinds, paging, device)
    numbers = {kind: _numbers(kind, paging, device) for kind in set(kinds.values())}
    pages = list(lay_out(parameters, kinds, numbers))
    sizes = [page.num_bytes for page in pages]

    def clear(index: int, buffer: torch.Tensor) -> None:
        pages[index].clear(buffer)

    budget = paging.memory_bytes
    if budget is None or budget >= sum(sizes):
        return pages, Resident(sizes, clear, device)
    _check_budget("optimizer_memory", budget, sizes)
    return pages, _pager(sizes, clear, device, paging)


def placement(pages: Sequence[Page], paging: Paging, device: torch.device) -> str:
    """Where the state is, in words; "" without a budget."""
    budget, sizes = paging.memory_bytes, [page.num_bytes for page in pages]
    if budget is None:
        return ""
    total, largest = sum(sizes), max(sizes)
    if budget >= total:
        return f"its {total:,} bytes of state fit into {budget:,}"
    host, file = paging.host_bytes, f"a file in {paging.directory}"
    if device.type == "cpu":
        rest = f"in {file}"
    elif host is None or host >= total:
        rest = "in the host's memory"
    else:
        rest = f"in the host's memory ({host // largest}) and {file}"
    where = f"{budget // largest} in memory, the rest {rest}"
    return f"{total:,} bytes of state in {len(sizes)} pages of {largest:,}: {where}"


def _pager(sizes: Sequence[int], clear: Clear, device: torch.device, paging: Paging) -> Pager:
    assert paging.memory_bytes is not None
    num_frames = paging.memory_bytes // max(sizes)
    if device.type == "cpu":
        frames = [host_memory(max(sizes), pinned=False) for _ in range(num_frames)]
        return Pager(sizes, clear, frames, SpillFile(paging.directory, sizes), Lane())
    frames = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(num_frames)]
    lane = CudaLane(device) if device.type == "cuda" else Lane()
    return Pager(sizes, clear, frames, host_tier(sizes, clear, paging, pinned=device.type == "cuda"), lane)


def host_tier(sizes: Sequence[int], clear: Clear, paging: Paging, *, pinned: bool) -> Below:
    """Below a device's frames: the host's memory, or a budget of it over a file.

    Raises:
        ConfigError: The host's budget holds no page.
    """
    if paging.host_bytes is None or paging.host_bytes >= sum(sizes):
        return HostPages(sizes, pinned=pinned)
    _check_budget("optimizer_host_memory", paging.host_bytes, sizes)
    count = paging.host_bytes // max(sizes)
    frames = [host_memory(max(sizes), pinned=pinned) for _ in range(count)]
    return HostPager(Pager(sizes, clear, frames, SpillFile(paging.directory, sizes), Lane()))


def _numbers(kind: Kind, paging: Paging, device: torch.device) -> int:
    most = kind.rule.numbers if device.type == "cpu" else DEVICE_NUMBERS
    budgets = [size for size in (paging.memory_bytes, paging.host_bytes) if size is not None]
    if not budgets or not kind.rule.parts:
        return most
    most = min(most, PAGED_NUMBERS)
    wanted = min(budgets) / WANTED_FRAMES / kind.bytes_per_number()
    return max(GRAIN, min(most, int(wanted) // GRAIN * GRAIN))


def _check_budget(name: str, budget: int, sizes: Sequence[int]) -> None:
    if budget < max(sizes):
        raise ConfigError(
            f"training.{name} is {budget:,} bytes, and the smallest page takes {max(sizes):,}",
            where=f"training.{name}",
            fix=f"give it {max(sizes):,} bytes or more, better {3 * max(sizes):,}; "
            f"the whole state takes {sum(sizes):,}",
        )


def _check_acts(kinds: Mapping[str, Kind], paging: Paging, device: torch.device) -> None:
    if paging.memory_bytes is not None and not any(kind.rule.parts for kind in kinds.values()):
        _refuse("optimizer_memory", "this optimizer keeps no state")
    if device.type == "cpu" and paging.host_bytes is not None:
        _refuse("optimizer_host_memory", "what trains is in the host's memory itself")
    if device.type != "cpu" and paging.spill_asked and paging.host_bytes is None:
        _refuse(
            "optimizer_spill", "without training.optimizer_host_memory all of it stays in the host's memory"
        )


def _refuse(name: str, why: str) -> None:
    raise ConfigError(f"training.{name} acts on nothing: {why}", where=f"training.{name}", fix="leave it out")
