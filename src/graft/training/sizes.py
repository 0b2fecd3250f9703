"""Amounts of memory as people write them, and those that the optimizer's state may take."""

from __future__ import annotations

import re

from graft.errors import ConfigError

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
"""Bytes of each unit: KB is a thousand, KiB is 1024."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*")


def num_bytes(size: int | str, where: str) -> int:
    """Bytes of 67108864, "64MB", "1.5 GiB" or "1e9".

    Args:
        size: The amount; without a unit it is bytes.
        where: The field, for the error.

    Raises:
        ConfigError: It is no amount, or less than a byte.
    """
    found = None if isinstance(size, bool) else _SIZE.fullmatch(str(size))
    unit = found[2] if found else ""
    units = {name.lower(): value for name, value in UNITS.items()}
    amount = float(found[1]) * units.get(unit.lower(), 0) if found else 0
    if not 1 <= amount < 2**63:
        raise ConfigError(
            f"{where} = {size!r} is no amount of memory",
            where=where,
            fix="bytes, or a number with KB, MB, GB (thousands) or KiB, MiB, GiB (1024): 64MB",
        )
    return int(amount)


def check_paging(memory: int | str | None, host_memory: int | str | None, spill: str | None) -> None:
    """Check the fields that page the optimizer's state.

    Raises:
        ConfigError: One is no amount, or acts on nothing because another one is missing.
    """
    given = {"optimizer_memory": memory, "optimizer_host_memory": host_memory, "optimizer_spill": spill}
    for name in ("optimizer_memory", "optimizer_host_memory"):
        if (size := given[name]) is not None:
            num_bytes(size, f"training.{name}")
    for name in ("optimizer_host_memory", "optimizer_spill"):
        if given[name] is not None and memory is None:
            raise ConfigError(
                f"training.{name} = {given[name]!r} without training.optimizer_memory: nothing is paged",
                where=f"training.{name}",
                fix="give training.optimizer_memory, or leave it out",
            )
