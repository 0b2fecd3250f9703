"""What a run's record has to do with its monitors: the id that trackers know it by, speed, outcomes."""

from __future__ import annotations

import secrets
from typing import Any

from graft.runs import RunDirectory
from graft.training.choices import flat_settings
from graft.training.config import RunConfig
from graft.training.figures import Figures
from graft.training.monitors import Monitor
from graft.training.relay import Relay
from graft.training.speed import speed_of
from graft.training.trackers.base import TrackedRun
from graft.training.trackers.feed import Feeds, open_feeds


def follow(
    config: RunConfig, run: RunDirectory, record: dict[str, Any], monitor: Monitor, *, resumed: bool
) -> tuple[Feeds, Monitor]:
    """The trackers of a run, and a monitor that tells them too.

    Args:
        config: The run's.
        run: Its directory.
        record: Its run.json; gets the id that trackers know the run by.
        monitor: Who is told anyway.
        resumed: Whether the run goes on.

    Raises:
        TrainingError: A tracker fails at the start of a new run.
    """
    names = config.training.trackers
    if not names:
        return Feeds([]), monitor
    identity = str(record.setdefault("tracking_id", secrets.token_hex(8)))
    run.write_record(record)  # known before the first point is sent: a resumed run goes on under it
    tracked = TrackedRun(identity, run.path.name, run.path.absolute(), flat_settings(config))
    feeds = open_feeds(names, tracked, run, monitor.say, resumed=resumed)
    return feeds, Relay([monitor, feeds])


def conclude(record: dict[str, Any], run: RunDirectory, figures: Figures, feeds: Feeds) -> None:
    """Put into a finished run's record how fast it was, what watching cost, what the trackers have."""
    record["speed"] = speed_of(run, figures.product_rate)
    record["speed"]["spectra_seconds"] = round(figures.spectra.seconds, 3)
    if outcome := feeds.outcome():
        record["trackers"] = outcome
