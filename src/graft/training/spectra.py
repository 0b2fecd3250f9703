"""The spectra of a run: spectra.jsonl, a line every so many steps, the same bytes after a resume."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from graft.adapters.attached import Adapter
from graft.errors import ConfigError
from graft.runs import LineLog
from graft.training.spectrum import measure, trained_updates, weight_norms

NUM_MEASURED, FEWEST_STEPS = 10, 20
"""Without `training.spectrum_steps`: how often in a run, and how many steps lie between at least."""


def interval(asked: int | None, num_steps: int) -> int:
    """Steps between two measurements; 0 for none.

    Args:
        asked: `training.spectrum_steps`.
        num_steps: Of the whole run.
    """
    return max(FEWEST_STEPS, -(-num_steps // NUM_MEASURED)) if asked is None else asked


class Spectra:
    """Measures the adapter that trains as the run goes on.

    Args:
        model: The model that carries it.
        adapter: It; None where the model itself trains.
        asked: `training.spectrum_steps`.
        num_steps: Of the whole run.

    Raises:
        ConfigError: Spectra are asked for, and no update is a product of two factors.

    Cost: see `spectrum.singular_values`; before the first time one read of every adapted weight.
    """

    def __init__(self, model: nn.Module, adapter: Adapter | None, asked: int | None, num_steps: int) -> None:
        self._model, self._adapter, self._num_steps = model, adapter, num_steps
        self._every = interval(asked, num_steps)
        if not trained_updates(model, adapter):
            if asked:
                raise ConfigError(
                    f"training.spectrum_steps = {asked}, but nothing trained is an update of the form B A",
                    where="training.spectrum_steps",
                    fix="leave it out, or train an adapter such as lora",
                )
            self._every = 0
        self._norms: dict[str, float] | None = None
        self._log: LineLog | None = None
        self.seconds = 0.0

    def open(self, path: Path, keep_bytes: int) -> None:
        """Cut the log back to a checkpoint's position; the file is made only where something is measured."""
        if self._every:
            self._log = LineLog(path, keep_bytes)

    def after_step(self, step: int) -> None:
        """Measure where it is due, and after the last step."""
        if self._is_due(step):
            self._measure(step)

    def stopped_early(self, step: int) -> None:
        """Measure where the run ends before its last step, if that step was not due anyway."""
        if not self._is_due(step):
            self._measure(step)

    def _is_due(self, step: int) -> bool:
        return bool(self._every) and (step % self._every == 0 or step == self._num_steps)

    def _measure(self, step: int) -> None:
        if self._log is None:
            return
        started = time.perf_counter()
        found = trained_updates(self._model, self._adapter)
        if self._norms is None:
            self._norms = weight_norms(self._model, list(found))
        self._log.write({"step": step, "layers": measure(found, self._norms)})
        self.seconds += time.perf_counter() - started

    def sync(self) -> int:
        """Flush the log; returns its length in bytes, 0 where there is none."""
        return 0 if self._log is None else self._log.sync()

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
