"""Feeding trackers while a run goes on, a thread for each: a slow or dead one neither slows nor ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graft.errors import GraftError, StopRequested, TrainingError
from graft.runs import RunDirectory
from graft.training.trackers.base import Status, TrackedRun, Tracker, make_tracker
from graft.training.trackers.points import Points

LOOK_SECONDS = 0.5
"""Between two looks at the logs."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 30.0, 600.0
"""Before a tracker that failed is tried again; doubled each time."""

CLOSE_SECONDS: dict[Status, float] = {"finished": 60.0, "failed": 20.0, "stopped": 10.0}
"""How long the end of a run waits for its trackers: whoever stopped it may not wait long."""


class Feed:
    """One tracker and its thread.

    Args:
        name: What it is called in the configuration.
        tracker: It.
        tracked: What it is told of the run.
        run: Where the logs are.
        say: Told of the first failure, and of its end; from the thread.
    """

    def __init__(
        self, name: str, tracker: Tracker, tracked: TrackedRun, run: RunDirectory, say: Callable[[str], None]
    ) -> None:
        self.name, self._tracker, self._tracked, self._run, self._say = name, tracker, tracked, run, say
        self.failure: str | None = None
        self.last_step = 0
        self._is_open = False
        self._points: Points | None = None
        self._pause = FIRST_PAUSE_SECONDS
        self._ended = threading.Event()
        self._status: Status = "failed"
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def open(self) -> None:
        """Begin or go on; also again after a failure."""
        self.last_step = self._tracker.open(self._tracked)
        self._is_open = True
        self._points = Points(self._run)

    def open_first(self, *, resumed: bool) -> None:
        """Open before the first step.

        Raises:
            TrainingError: It fails, and the run is a new one; one that goes on must not fail for it.
        """
        try:
            self.open()
        except Exception as error:  # noqa: BLE001 - another program, over a network: anything may come
            if not resumed:
                raise TrainingError(
                    f"the tracker {self.name!r} cannot be opened: {_told(error)}",
                    where="training.trackers",
                    fix=f"start its server, or leave it out; then remove {self._run.path} and start again",
                ) from error
            self._note(error)

    def start(self) -> None:
        """Begin to send; the logs are where they should be."""
        self._thread.start()

    def end(self, status: Status) -> None:
        """Send the rest, as far as it can be sent in the time there is."""
        self._status = status
        self._ended.set()

    def wait(self, deadline: float) -> None:
        """Wait for the thread until a time of `time.monotonic`."""
        if self._thread.ident is None:  # the run ended before its first step
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and self.failure is None:
            self.failure = "did not answer in time at the end of the run"

    def outcome(self) -> dict[str, Any]:
        """For run.json: the last step that was sent, and why no more were."""
        return {"last_step": self.last_step, "failure": self.failure}

    def _work(self) -> None:
        again = 0.0
        while not self._ended.wait(LOOK_SECONDS):
            if time.monotonic() >= again and not self._try(final=False):
                again = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        # A step without its evaluation is held back when the run stops: the resumed run sends it whole.
        if self._try(final=self._status != "stopped"):
            self._try_to(lambda: self._tracker.close(self._status))

    def _try(self, *, final: bool) -> bool:
        return self._try_to(lambda: self._send(final=final))

    def _send(self, *, final: bool) -> None:
        if not self._is_open:
            self.open()
        assert self._points is not None
        for point in self._points.read(final=final):
            if point.step > self.last_step:
                self._tracker.log(point.step, point.figures, point.clock_seconds)
                self.last_step = point.step
        if self.failure is not None:
            self._say(f"tracker {self.name}: goes on, step {self.last_step} is the last one there")
            self.failure, self._pause = None, FIRST_PAUSE_SECONDS

    def _try_to(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - another program, over a network: the run goes on
            self._note(error)
            return False
        return True

    def _note(self, error: Exception) -> None:
        self._is_open = False
        if self.failure is None:
            self._say(
                f"tracker {self.name} failed after step {self.last_step}: {_told(error)}; "
                "the run goes on, and what it missed is sent when it answers again"
            )
        self.failure = _told(error)


class Feeds:
    """All trackers of a run, as a monitor: they begin when training begins.

    Args:
        feeds: One for each tracker.
    """

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block the run trains; afterwards the trackers are told how it ended.

        Yields:
            Nothing.

        Raises:
            StopRequested: As it came.
        """
        status: Status = "failed"
        try:
            yield
            status = "finished"
        except StopRequested:
            status = "stopped"
            raise
        finally:
            for feed in self._feeds:
                feed.end(status)
            deadline = time.monotonic() + CLOSE_SECONDS[status]
            for feed in self._feeds:
                feed.wait(deadline)

    def outcome(self) -> dict[str, Any]:
        """For run.json, by tracker."""
        return {feed.name: feed.outcome() for feed in self._feeds}

    def say(self, text: str) -> None:
        """Nothing."""

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """Nothing."""

    def preparing(self, num_rows: int, num_tokens: int, share: float | None) -> None:
        """Nothing."""

    def start(self, step: int, num_steps: int) -> None:
        """The logs are cut back to where the run goes on: begin."""
        for feed in self._feeds:
            feed.start()

    def step(self, record: dict[str, Any], num_tokens: int) -> None:
        """Nothing: the logs tell."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Nothing: the logs tell."""

    def finish(self) -> None:
        """Nothing: `running` ends them."""


def open_feeds(
    names: Sequence[str],
    tracked: TrackedRun,
    run: RunDirectory,
    say: Callable[[str], None],
    *,
    resumed: bool,
) -> Feeds:
    """Open the trackers of a run.

    Args:
        names: `training.trackers`.
        tracked: What they are told of the run.
        run: Where the logs are.
        say: Told of failures; also from other threads.
        resumed: Whether the run goes on: then one that fails is tried again later.

    Raises:
        ConfigError: One cannot be had.
        TrainingError: One fails at the start of a new run.
    """
    feeds = [Feed(name, make_tracker(name), tracked, run, say) for name in names]
    for feed in feeds:
        feed.open_first(resumed=resumed)
    return Feeds(feeds)


def _told(error: Exception) -> str:
    what = error.what if isinstance(error, GraftError) else str(error)
    return f"{type(error).__name__}: {' '.join(what.split())[:300]}"
