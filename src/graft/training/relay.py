"""One monitor made of several: each is told what the run tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.training.monitors import Monitor


class Relay:
    """Tells several monitors, in order.

    Args:
        monitors: Who is told.
    """

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self._monitors = monitors

    def say(self, text: str) -> None:
        """A sentence."""
        for monitor in self._monitors:
            monitor.say(text)

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """So much of the base is read."""
        for monitor in self._monitors:
            monitor.loading(done_bytes, total_bytes)

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """So many rows are read and tokens made."""
        for monitor in self._monitors:
            monitor.preparing(num_rows, num_tokens, share)

    def start(self, step: int, num_steps: int) -> None:
        """Training begins."""
        for monitor in self._monitors:
            monitor.start(step, num_steps)

    def step(self, record: dict[str, Any], num_tokens: int) -> None:
        """A step was done."""
        for monitor in self._monitors:
            monitor.step(record, num_tokens)

    def evaluated(self, record: dict[str, Any]) -> None:
        """An evaluation was done."""
        for monitor in self._monitors:
            monitor.evaluated(record)

    def finish(self) -> None:
        """Training ended."""
        for monitor in self._monitors:
            monitor.finish()
