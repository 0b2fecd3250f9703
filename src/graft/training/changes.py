"""What a run may change when it goes on: only what is named, one by one, and written into its record.

A setting, or what the run was started with (base, tokenizer, data), is compared with the checkpoint that
the run goes on from. What differs is refused unless it is named; what was named is remembered with the step
after which it holds, so that a run that is killed after a change goes on without naming it again.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from graft.config import Settings, build, did_you_mean, flattened
from graft.data.loader import Loader
from graft.errors import CheckpointError, ConfigError
from graft.training.checkpoint import Checkpoint
from graft.training.choices import MAY_MOVE, WITHOUT_EFFECT, binding_settings
from graft.training.config import RunConfig
from graft.training.stopping import BestEval

IDENTITY = (
    "base weights",
    "base tokenizer",
    "base chat_template",
    "base quantization",
    "training data",
    "evaluation data",
    "chat template file",
)
"""What a run is started with besides its settings; compared by digest."""


def configure(
    record: Mapping[str, Any], settings: Settings, allowed: Collection[str], where: str
) -> RunConfig:
    """The configuration that a run goes on with.

    Args:
        record: Its run.json.
        settings: What is given for the resume, by dotted path.
        allowed: Names of what may change.
        where: The run directory.

    Raises:
        ConfigError: A name that nothing has, or a value that changes what was not named; the flag is told.
    """
    before = build(RunConfig, flattened(record["config"], f"{where}/run.json"))
    merged = flattened(record["config"], f"{where}/run.json")
    merged.update(settings)
    after = build(RunConfig, merged)
    then, now = binding_settings(before), binding_settings(after)
    _check_names(allowed, then.keys() | now.keys())
    if after.output != before.output:
        raise ConfigError(
            "a run goes on in its own directory",
            where="--set output",
            fix="move the directory, then resume it",
        )
    unnamed = [name for name in differing(then, now) if name not in allowed]
    if unnamed:
        words = [f"--allow-change {name} --set {name}={_plain(now.get(name))}" for name in unnamed]
        told = "; ".join(f"{name} was {then.get(name)!r}, would be {now.get(name)!r}" for name in unnamed)
        raise ConfigError(
            f"a run goes on with its own settings: {told}",
            where=", ".join(f"--set {name}" for name in unnamed),
            fix=f"name each change: graft train --resume {where} {' '.join(words)}",
        )
    return after


def _plain(value: Any) -> str:
    return "" if value is None else shlex.quote(str(value))


def _check_names(allowed: Collection[str], fields: Collection[str]) -> None:
    for name in allowed:
        if name in MAY_MOVE + WITHOUT_EFFECT:
            held = {"data.train": '; what is in the file is "training data"'}.get(name, "")
            raise ConfigError(
                f"{name} may change without being named{held}", where="--allow-change", fix="leave it out"
            )
        if name not in fields and name not in IDENTITY:
            raise ConfigError(
                f"nothing is called {name!r}",
                where="--allow-change",
                fix=did_you_mean(name, [*fields, *IDENTITY]) or f"a field, or one of {', '.join(IDENTITY)}",
            )


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values are not the same, or that only one of the two has."""
    return [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]


def allow(
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
    now: Mapping[str, Any],
    allowed: Collection[str],
    where: str,
) -> list[str]:
    """Compare a run with its checkpoint, or with its record where there is none; remember what changes.

    Args:
        record: Its run.json; gets the changes that hold from here on, under "changes".
        checkpoint: Where it goes on.
        now: Settings and identity as they are now.
        allowed: Names of what may change.
        where: The run directory.

    Returns:
        What changes here, in words.

    Raises:
        CheckpointError: Something changed that was not named; each is told with both values.
        ConfigError: Something was named that did not change.
    """
    step = checkpoint.position.step if checkpoint else 0
    then = checkpoint.settings if checkpoint else _as_recorded(record, now)
    changed = differing(then, now)
    # A change that a damaged checkpoint took with it never happened.
    known = [change for change in record.get("changes", []) if change["after_step"] <= step]
    here = {
        change["what"]
        for change in known
        if change["after_step"] == step and change["from"] == then.get(change["what"])
    }
    refused = [name for name in changed if name not in allowed and name not in here]
    if refused:
        since = f"since {checkpoint.path.name}" if checkpoint else "since the run was started"
        flags = " ".join(f"--allow-change {shlex.quote(name)}" for name in refused)
        raise CheckpointError(
            f"the settings changed {since}: " + "; ".join(_told(name, then, now) for name in refused),
            where=f"{where}/run.json",
            fix=f"put them back, start a new run, or mean it: graft train --resume {where} {flags}",
        )
    idle = [name for name in allowed if name not in changed and name not in {c["what"] for c in known}]
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} did not change", where="--allow-change", fix="leave it out, or --set a value"
        )
    new = [name for name in changed if name not in here or name in allowed]
    known = [change for change in known if change["after_step"] != step or change["what"] not in new]
    known += [{"what": name, "from": then.get(name), "to": now.get(name), "after_step": step} for name in new]
    if known or "changes" in record:
        record["changes"] = known
    return [f"changes after step {step}: {_told(name, then, now)}" for name in changed]


def _as_recorded(record: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a run without a checkpoint was started with; fields that its record lacks are as they are now."""
    config = build(RunConfig, flattened(record["config"], "run.json"))
    return {**binding_settings(config), **record["identity"]}


def _told(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, after = then.get(name), now.get(name)
    if name in IDENTITY:
        return f"{name} was {str(before)[:12]}, is {str(after)[:12]}"
    return f"{name} was {before!r}, is {after!r}"


def carry_over(checkpoint: Checkpoint, now: Mapping[str, Any], loader: Loader) -> None:
    """Fit a checkpoint's position to what changed.

    Another batch size goes on after as many rows of the epoch as were seen, rounded down to whole batches;
    an epoch that has no more of them is over. Losses on other evaluation data, or of samples cut otherwise,
    are not compared with earlier ones. A run that stopped early goes on under other rules for stopping.

    Args:
        checkpoint: Its position is changed in place.
        now: Settings and identity as they are now.
        loader: Of the training data as it is now.
    """
    changed, position = differing(checkpoint.settings, now), checkpoint.position
    if "training.batch_size" in changed:
        rows = position.batch * int(checkpoint.settings["training.batch_size"])
        position.batch = rows // int(now["training.batch_size"])
    if changed and position.batch >= loader.num_batches(position.epoch):
        position.epoch, position.batch = position.epoch + 1, 0
    if {"evaluation data", "base tokenizer"} & {*changed} or any(
        name.startswith("data.") for name in changed
    ):
        position.best = BestEval()
    if any(name.startswith("training.early_stopping") for name in changed):
        position.stopped_early, position.best.num_worse = False, 0
