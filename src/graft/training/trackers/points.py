"""From the lines of a run's logs to the figures of each step: what trackers are sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from graft.runs import RunDirectory

MOST_BYTES = 1 << 20
"""Read at a time."""


class Tail:
    """The complete lines that a growing file has got since the last look.

    Args:
        path: The file; it need not exist yet.
        offset: Bytes to pass over.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def size(self) -> int:
        """Bytes that the file has now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read(self, most_bytes: int = MOST_BYTES) -> list[bytes]:
        """New lines without their ends, in order; at least one if there is one, however long."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(most_bytes)
                while data and b"\n" not in data and (more := file.read(most_bytes)):
                    data += more
        except FileNotFoundError:
            return []
        whole, end, _ = data.rpartition(b"\n")
        self.offset += len(whole) + len(end)
        return whole.split(b"\n") if end else []


@dataclass
class Point:
    """The figures of a step."""

    step: int
    figures: dict[str, float] = field(default_factory=dict)
    clock_seconds: float = 0.0


class Points:
    """Reads the logs of a run from their beginning and yields a point for each step that is complete.

    A step is complete when a later one stands in the log, or the run is over: its evaluation comes after it.

    Args:
        run: The run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._metrics = Tail(run.metrics_path)
        self._timings, self._spectra = Tail(run.timings_path), Tail(run.spectra_path)
        self._timing: dict[int, dict[str, Any]] = {}
        self._spectrum: dict[int, dict[str, float]] = {}
        self._open: Point | None = None

    def read(self, *, final: bool = False) -> Iterator[Point]:
        """Points that became complete since the last call.

        Args:
            final: Whether no more lines will come.

        Yields:
            One for each step, in order.
        """
        while lines := self._metrics.read():
            # A step's timing is written before its line here; its spectrum before the next step's.
            for line in _all(self._timings):
                self._timing[line["step"]] = line
            for line in _all(self._spectra):
                self._spectrum[line["step"]] = summary(line["layers"])
            for line in map(json.loads, lines):
                if self._open is not None and line["step"] != self._open.step:
                    yield self._complete(self._open)
                    self._open = None
                self._open = self._open or Point(line["step"])
                self._open.figures |= figures(line)
        if final and self._open is not None:
            yield self._complete(self._open)
            self._open = None

    def _complete(self, point: Point) -> Point:
        timing = self._timing.pop(point.step, None)
        if timing is not None:
            point.clock_seconds = timing.get("clock_seconds", 0.0)
            point.figures |= _speed(timing)
        for line in _all(self._spectra):
            self._spectrum[line["step"]] = summary(line["layers"])
        point.figures |= self._spectrum.pop(point.step, {})
        return point


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl; those of groups as "group/name"."""
    found = {name: value for name, value in line.items() if name != "step" and _is_figure(value)}
    for group, values in line.get("groups", {}).items():
        found |= {f"{group}/{name}": value for name, value in values.items() if _is_figure(value)}
    if line.get("skipped"):
        found["skipped"] = 1
    return {name: float(value) for name, value in found.items()}


def summary(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean, lowest and highest of each figure over the layers of a line of spectra.jsonl."""
    found: dict[str, float] = {}
    for name in ("effective_rank", "update_ratio", "balance"):
        values = [layer[name] for layer in layers.values() if layer[name] is not None]
        if values:
            found |= {f"spectrum/{name}_{kind.__name__}": kind(values) for kind in (min, max)}
            found[f"spectrum/{name}_mean"] = fmean(values)
    return found


def _speed(timing: Mapping[str, Any]) -> dict[str, float]:
    seconds = max(timing["seconds"], 1e-9)
    named = {"tokens_per_second": "num_tokens", "padded_tokens_per_second": "num_padded_tokens"}
    found = {name: timing[count] / seconds for name, count in named.items() if count in timing}
    kept = ("memory_bytes", "peak_memory_bytes", "achieved")
    return found | {name: float(timing[name]) for name in kept if _is_figure(timing.get(name))}


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(tail: Tail) -> Iterator[dict[str, Any]]:
    while lines := tail.read():
        yield from map(json.loads, lines)
