"""The live page of a run: a monitor that serves what the run's logs say, on this machine only."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from graft.errors import ConfigError
from graft.training.watch_server import Server

MOST_MESSAGES = 300
"""Sentences kept for the page."""

LINGER_SECONDS = 2.0
"""How long the end of a run waits for its viewers to get the last lines."""


class Watch:
    """Serves the page from its making until `close`; told of the run as a monitor.

    Args:
        run: The run directory; it need not exist yet.
        port: Where; 0 takes a free one.

    Raises:
        ConfigError: The port is in use, or may not be used.

    Cost: a thread for each viewer that looks at the logs four times a second; training never waits for it.
    """

    def __init__(self, run: Path, port: int) -> None:
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"phase": "waiting", "name": run.name, "messages": []}
        self._version = 0
        if not 0 <= port < 65536:
            raise ConfigError(f"the port {port}", where="--watch", fix="give one from 0 to 65535")
        try:
            self._server = Server(run, port, self.state)
        except OSError as error:
            raise ConfigError(
                f"the port {port} cannot be served on 127.0.0.1: {error.strerror}",
                where="--watch",
                fix="give another one, or --watch 0 for a free one",
            ) from error
        self.address = f"http://127.0.0.1:{self._server.port}/"
        self._server.start()

    def state(self, seen: int) -> tuple[int, str] | None:
        """What is known besides the logs, as JSON, with its version; None where a viewer has seen it."""
        with self._lock:
            return None if seen == self._version else (self._version, json.dumps(self._state))

    def close(self, phase: str, error: str = "") -> None:
        """Tell the viewers how the run ended, and stop serving."""
        self._put(phase=phase, error=error)
        self._server.stop(time.monotonic() + LINGER_SECONDS)

    def say(self, text: str) -> None:
        """Keep a sentence for the page."""
        with self._lock:
            self._state["messages"] = [*self._state["messages"], text][-MOST_MESSAGES:]
            self._version += 1

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """So much of the base is read."""
        self._put(phase="loading", loading=[done_bytes, total_bytes])

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """So many rows are read and tokens made."""
        self._put(phase="preparing", preparing=[num_rows, num_tokens, share])

    def start(self, step: int, num_steps: int) -> None:
        """Training begins; the logs are where they should be."""
        self._put(phase="training", first_step=step, num_steps=num_steps)
        self._server.open_logs()

    def step(self, record: dict[str, Any], num_tokens: int) -> None:
        """Nothing: the logs tell."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Nothing: the logs tell."""

    def finish(self) -> None:
        """Training ended; the result is still to be written."""
        self._put(phase="writing")

    def _put(self, **fields: Any) -> None:
        with self._lock:
            if fields.items() <= self._state.items():
                return
            self._state |= fields
            self._version += 1
