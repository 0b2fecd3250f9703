"""Weights & Biases: a run under the id of ours, through wandb; WANDB_MODE=offline keeps it on the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.training.trackers.base import Status, TrackedRun

FOLDER = "wandb"
MARK = "sent-{}"
"""Holds the last step that was handed over: offline nobody else knows it."""


class WandbTracker:
    """Resumes the run of the same id. The project is WANDB_PROJECT, or "graft"."""

    _run: Any = None

    def open(self, run: TrackedRun) -> int:
        """Begin or resume; what was handed over before is what the mark in the run directory says."""
        import wandb

        if self._run is not None:
            self._run.finish()
        folder = run.directory / FOLDER
        folder.mkdir(exist_ok=True)
        self._mark: Path = folder / MARK.format(run.id)
        self._run = wandb.init(
            id=run.id,
            name=run.name,
            project=os.environ.get("WANDB_PROJECT", "graft"),
            dir=str(run.directory),
            config=dict(run.settings),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        return int(self._mark.read_text() or 0) if self._mark.exists() else 0

    def log(self, step: int, figures: Mapping[str, float], clock_seconds: float) -> None:
        """One row of the run's history."""
        self._run.log({**figures, "_timestamp": clock_seconds}, step=step, commit=True)
        self._mark.write_text(str(step))

    def close(self, status: Status) -> None:
        """Upload the rest."""
        self._run.finish(exit_code=0 if status == "finished" else 1)
