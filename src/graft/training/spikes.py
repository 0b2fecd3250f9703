"""Steps to look at: not applied, or with a loss far above those before. A replay finds the same ones.

The measure is the distance from the median of the last finite losses, in units of their median distance from
it (times 1.4826, which makes it the standard deviation of normal noise). Unlike a mean, neither moves much
when a spike enters the window.
"""

from __future__ import annotations

import statistics
from typing import Any

WINDOW, LEAST = 64, 16
"""Losses that are looked back on, and how many there must be."""

LEAST_UNIT = 0.01
"""The unit is at least this share of the median: a loss that hardly moves makes no spikes of nothing."""


def spike(loss: float, recent: list[float], threshold: float | None) -> dict[str, Any] | None:
    """Measure a loss against those before it, and remember it.

    Args:
        loss: Of one step; finite.
        recent: The losses before it, oldest first; changed in place.
        threshold: Units above the median from which a loss is a spike; None for never.

    Returns:
        The median and the distance in units where the loss is a spike, else None.
    """
    found = None
    if threshold is not None and len(recent) >= LEAST:
        middle = statistics.median(recent)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in recent)
        unit = max(spread, LEAST_UNIT * abs(middle))
        if unit and (loss - middle) / unit > threshold:
            found = {"median": middle, "deviations": (loss - middle) / unit}
    recent.append(loss)
    del recent[:-WINDOW]
    return found


def remark(
    record: dict[str, Any], recent: list[float], threshold: float | None, overflow: str | None
) -> list[str]:
    """Add to a step's line in the log what is unusual about it.

    Args:
        record: The line; its loss and gradient norm are None where they are not finite.
        recent: The losses before it; changed in place.
        threshold: From where a loss is a spike.
        overflow: What became of the loss scale, where only that is the matter.

    Returns:
        What to tell.
    """
    step, loss = record["step"], record["loss"]
    told = []
    if record["grad_norm"] is None:
        bad = "the loss is not finite" if loss is None else "a gradient is not finite"
        record["skipped"] = overflow or bad
        told.append(f"step {step} was not applied: {record['skipped']}")
    found = None if loss is None else spike(loss, recent, threshold)
    if found:
        record["spike"] = found
        told.append(f"step {step}: the loss {loss:.4f} is far above {found['median']:.4f}, the usual one")
    return told
