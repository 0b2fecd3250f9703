"""Who is told how the preparation of data goes."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """What preparation tells; a monitor of a run is one."""

    def say(self, text: str) -> None:
        """A sentence about a decision or an event."""

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """So many rows are read and tokens made; the share of the file that this is, where it is known."""


class Silent:
    """Nobody."""

    def say(self, text: str) -> None:
        """Nothing."""

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """Nothing."""


SILENT = Silent()
