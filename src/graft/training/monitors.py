"""What a person sees of a run while it goes on: loss, rate, time left, memory; on stderr."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

BIG_BYTES = 200 * 10**6
"""Models from this size on are shown as they load; smaller ones are there at once."""


class Monitor(Protocol):
    """Told about a run as it goes; the console is one, a silent object another."""

    def say(self, text: str) -> None:
        """A sentence about a decision or an event."""

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """So much of the base model is read."""

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """So many rows are read and tokens made; the share of the file that this is, where it is known."""

    def start(self, step: int, num_steps: int) -> None:
        """Training begins at `step` of `num_steps`."""

    def step(self, record: dict[str, Any], num_tokens: int) -> None:
        """One optimizer step was done; the record is its line in metrics.jsonl."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """An evaluation was done."""

    def finish(self) -> None:
        """Training ended."""


def memory_bytes() -> int:
    """Memory that the process holds now (resident set), or has allocated on the GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The most memory that the process has held (resident set), or allocated on the GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins, after an exec, with the peak of the program before
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m12s or 1h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Console:
    """Progress on a terminal (one line that is rewritten) or in a log (a line every so many steps).

    Args:
        log_steps: Steps between lines where the output is no terminal.
        stream: Where to; stderr, so that stdout stays for answers.
    """

    def __init__(self, log_steps: int = 10, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._log_steps = log_steps
        self._num_steps = self._first = 0
        self._started = 0.0
        self._tokens = 0
        self._smoothed: float | None = None
        self._width = 0
        self._loading: tuple[float, int] | None = None
        self._preparing: float | None = None
        self._shown = 0.0

    def say(self, text: str) -> None:
        """Print a sentence on its own line."""
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """Show how far a big model is, how fast it comes and how long it will take, on a terminal."""
        if not self._live or total_bytes < BIG_BYTES:
            return
        now = time.monotonic()
        if self._loading is None:
            self._loading = (now, done_bytes)
        if done_bytes >= total_bytes:
            self._loading = None
            self._clear()
            self._stream.flush()
        elif now - self._shown > 0.1:
            self._shown = now
            start, first = self._loading
            line = f"loading {done_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB"
            if now > start:
                rate = (done_bytes - first) / (now - start)
                left = (total_bytes - done_bytes) / max(rate, 1.0)
                line += f"  {rate / 1e6:,.0f} MB/s  {duration(left)} left"
            self._show(line)

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """Show how far the data is, how fast it comes and how long it will take, on a terminal."""
        if not self._live:
            return
        now = time.monotonic()
        if self._preparing is None:
            self._preparing = now
        if share == 1.0:
            self._preparing = None
            self._clear()
            self._stream.flush()
        elif now - self._shown > 0.1 and now - self._preparing > 1.0:
            self._shown = now
            taken = now - self._preparing
            line = f"preparing data: {num_rows:,} rows  {num_tokens / 1e6:,.1f} M tokens"
            line += f"  {num_tokens / taken:,.0f} tokens/s"
            if share:
                line += f"  {duration(taken * (1 - share) / share)} left"
            self._show(line)

    def start(self, step: int, num_steps: int) -> None:
        """Start the clock."""
        self._first, self._num_steps = step, num_steps
        self._started = time.monotonic()

    def step(self, record: dict[str, Any], num_tokens: int) -> None:
        """Show where the run stands."""
        self._tokens += num_tokens
        step = record["step"]
        loss = record["loss"]
        if loss is not None:
            self._smoothed = loss if self._smoothed is None else 0.9 * self._smoothed + 0.1 * loss
        due = step % self._log_steps == 0 or step == self._num_steps
        if self._live or due or step == self._first + 1:
            self._show(self._line(step, record))

    def _line(self, step: int, record: dict[str, Any]) -> str:
        elapsed = max(1e-9, time.monotonic() - self._started)
        left = elapsed / (step - self._first) * (self._num_steps - step)
        loss = "not finite" if self._smoothed is None or record["loss"] is None else f"{self._smoothed:.4f}"
        parts = [
            f"step {step}/{self._num_steps}",
            f"loss {loss}",
            f"{self._tokens / elapsed:,.0f} tok/s",
            f"{duration(left)} left",
            f"{memory_bytes() / 2**20:,.0f} MiB",
            f"lr {record['learning_rate']:.2e}",
        ]
        # The last ones are the least missed.
        while self._live and len("  ".join(parts)) > self._room() and len(parts) > 1:
            parts.pop()
        return "  ".join(parts)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Show an evaluation loss."""
        best = "  (best so far)" if record.get("best") else ""
        self.say(f"step {record['step']}/{self._num_steps}  evaluation loss {record['eval_loss']:.4f}{best}")

    def finish(self) -> None:
        """End the live line."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _room(self) -> int:
        """Letters that fit on one line of the terminal that is written to, which need not be stdout's."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        # A line that fills the last column wraps on some terminals.
        return (columns or shutil.get_terminal_size().columns) - 1

    def _show(self, line: str) -> None:
        if not self._live:
            self._stream.write(line + "\n")
        else:
            line = line[: self._room()]
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        self._stream.flush()

    def _clear(self) -> None:
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


class Silent:
    """A monitor that shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """Nothing."""

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """Nothing."""

    def start(self, step: int, num_steps: int) -> None:
        """Nothing."""

    def step(self, record: dict[str, Any], num_tokens: int) -> None:
        """Nothing."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""
