"""The Tracker contract, which trackers there are, and how they are found before a run starts."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from graft.config import closest
from graft.errors import ConfigError

Status = Literal["finished", "failed", "stopped"]

PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX", "TensorBoardTracker"),
    "wandb": ("wandb", "wandb", "WandbTracker"),
    "mlflow": ("mlflow", "mlflow-skinny", "MlflowTracker"),
}
"""For each tracker of ours: the module that it needs, the package to install, its class."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        id: Its own for each run directory, the same when the run is resumed.
        name: For people.
        directory: The run directory; a tracker that writes files makes a folder of its own there.
        settings: The configuration as "section.field", values of JSON.
    """

    id: str
    name: str
    directory: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Tracker(Protocol):
    """Keeps the figures of a run. Made without arguments; one thread at a time calls it.

    It is fed from the run's own logs, from the first step on, so a point is never lost: what `open` says is
    there is left out, the rest is sent, also what a tracker that was down has missed.
    """

    def open(self, run: TrackedRun) -> int:
        """Begin with a run or go on with it, also after a failure of `log`.

        Returns:
            The last step whose figures are there; 0 for none.
        """
        ...

    def log(self, step: int, figures: Mapping[str, float], clock_seconds: float) -> None:
        """Keep the figures of one step; steps come in rising order, each once.

        Args:
            step: Optimizer steps done, from 1.
            figures: Finite numbers by name, such as "loss" or "lora_A/grad_norm".
            clock_seconds: When it was, in seconds since 1970.
        """
        ...

    def close(self, status: Status) -> None:
        """The run ended, or stopped and may be resumed; everything is written out."""
        ...


def check_names(names: Sequence[str]) -> None:
    """Check before anything is loaded that every tracker of a configuration can be had.

    Raises:
        ConfigError: An unknown name, one given twice, or one whose package is missing.
    """
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name!r} stands there twice", where="training.trackers", fix="leave one out")
        if ":" in name:
            _outsider(name)
        elif name not in PACKAGES:
            near = closest(name, PACKAGES)
            raise ConfigError(
                f"there is no tracker {name!r}",
                where="training.trackers",
                fix=f"did you mean {near!r}?" if near else f"{', '.join(PACKAGES)}, or package.module:Class",
            )
        elif importlib.util.find_spec(PACKAGES[name][0]) is None:
            module, package, _ = PACKAGES[name]
            raise ConfigError(
                f"the tracker {name!r} needs {module}, which is not installed",
                where="training.trackers",
                fix=f"pip install {package}",
            )


def make_tracker(name: str) -> Tracker:
    """The tracker of a name, its package imported.

    Raises:
        ConfigError: It cannot be had, or is no tracker.
    """
    check_names([name])
    if ":" in name:
        made = _outsider(name)()
    else:
        module = importlib.import_module(f"graft.training.trackers.{name}")
        made = getattr(module, PACKAGES[name][2])()
    if not isinstance(made, Tracker):
        raise ConfigError(
            f"{name} is no tracker: it lacks open, log or close",
            where="training.trackers",
            fix="see graft.training.trackers.base.Tracker, and try it with check_tracker",
        )
    return made


def _outsider(name: str) -> Any:
    module, _, kind = name.partition(":")
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the tracker {name!r} cannot be imported: {error}",
            where="training.trackers",
            fix="package.module:Class, where Python finds the package (PYTHONPATH)",
        ) from error


def check_tracker(make: Any, directory: Path) -> None:
    """Try the promises of a tracker on a small run; for its author.

    Args:
        make: Called without arguments, gives the tracker.
        directory: An empty directory for its files.

    Raises:
        AssertionError: The first promise that is not kept.
    """
    run = TrackedRun("check-0123456789abcdef", "check", directory, {"training.seed": 0, "data.eval": None})
    first = make()
    assert isinstance(first, Tracker), "open, log and close must be there"
    last = first.open(run)
    assert last == 0, f"open of a new run must return 0, not {last!r}"
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 / step, "lora_A/grad_norm": 0.5}, 1.7e9 + step)
    first.close("stopped")
    again = make()
    last = again.open(run)
    assert isinstance(last, int), f"open must return a step, not {last!r}"
    assert 0 <= last <= 3, f"steps up to 3 were logged, open says {last} are there"
    for step in range(last + 1, 6):
        again.log(step, {"loss": 1.0 / step}, 1.7e9 + step)
    last = again.open(run)
    assert 0 <= last <= 5, f"open in the middle, as after a failure, says {last} of 5"
    for step in range(last + 1, 6):
        again.log(step, {"loss": 1.0 / step}, 1.7e9 + step)
    again.close("finished")
