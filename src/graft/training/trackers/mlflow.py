"""MLflow: a run on the server that MLFLOW_TRACKING_URI names, through mlflow or mlflow-skinny."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from graft.training.trackers.base import Status, TrackedRun

TAG = "graft.id"
MARK = "learning_rate"
"""A figure of every step: where its history ends, the run's does."""

MOST_PARAMS, LONGEST_PARAM = 100, 500
"""What a server takes in one request, and in one value."""

STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MlflowTracker:
    """Finds its run by a tag, so a resumed run goes on where the server's history ends.

    The experiment is MLFLOW_EXPERIMENT_NAME, or "graft". Cost: one request a step, on a thread of its own.
    """

    def open(self, run: TrackedRun) -> int:
        """Find the run by its tag, or make it and send its settings."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "graft")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'")
        if found:
            self._id: str = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, MARK)
            return max((point.step for point in history), default=0)
        made = self._client.create_run(experiment, run_name=run.name, tags={TAG: run.id})
        self._id = made.info.run_id
        self._send_settings(run.settings)
        return 0

    def _send_settings(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in settings.items()]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])

    def log(self, step: int, figures: Mapping[str, float], clock_seconds: float) -> None:
        """All figures of the step in one request."""
        from mlflow.entities import Metric

        when = int(clock_seconds * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, when, step) for name, value in figures.items()]
        )

    def close(self, status: Status) -> None:
        """Tell the server how the run ended."""
        self._client.set_terminated(self._id, STATES[status])
