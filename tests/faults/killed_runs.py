"""Trains in forked children that are killed with SIGKILL at random moments, and resumes until they are done.

    python killed_runs.py MODEL ROWS DIRECTORY KILLS SEED [every | SETTING ...]

Run in a process of its own: torch is imported once, each child is a fork and so starts at once. "every" takes
the runs of `EVERY` in turn. A moment is a time while a process starts, or a random time after a random number
of its steps, after the beginning of a checkpoint, or after that of the result: times alone would fall before
the first step, which is most of such a short run. Prints one JSON object: kills, runs, the phases in which
they hit (by what the dead process left on disk), the same of the processes that had resumed a checkpoint, the
kills of each kind of run, checkpoints that were lost, and what differs from an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch

from graft.config import build, read_assignments
from graft.errors import CheckpointError
from graft.runs import RunDirectory
from graft.training.build import resume, run_from_config
from graft.training.checkpoint import load_checkpoint
from graft.training.config import RunConfig

COMPARED = (
    "metrics.jsonl",
    "spectra.jsonl",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/graft.json",
    "model/model.safetensors",
)

EVERY = {
    "adamw, cosine, packed": ["training.min_lr_ratio=0.1"],
    "adamw_8bit, linear": [
        "optimizer=adamw_8bit",
        "adapter.rank=128",
        "lr_scheduler=linear",
        "data.packing=false",
    ],
    "lion, wsd": [
        "optimizer=lion",
        "learning_rate=1e-3",
        "lr_scheduler=wsd",
        "gradient_accumulation_steps=3",
    ],
    "sgd, constant": [
        "optimizer=sgd",
        "sgd_momentum=0.9",
        "lr_scheduler=constant",
        "gradient_accumulation_steps=1",
    ],
    "restarts, early stopping": [
        "lr_scheduler=cosine_with_restarts",
        "early_stopping_patience=2",
        "eval_steps=2",
    ],
    "inverse root, best of three": ["lr_scheduler=inverse_sqrt", "keep_best_checkpoints=3", "eval_steps=3"],
    "float16, adamw_8bit": ["model.dtype=float16", "optimizer=adamw_8bit", "adapter.rank=128"],
    "full": ["adapter=", "quantization=", "learning_rate=1e-3", "lora_plus_ratio=1"],
}
"""Settings by what a run is of; a name without a section is of training."""


SECTIONS = ("adapter=", "quantization=")

STEPS = 10
"""Optimizer steps of a run."""

BEFORE, STEP, SAVE, RESULT = "before the first step", "in a step", "in a save", "while writing the result"
"""Where a process may be killed; an evaluation counts as part of a step."""

SHARES = {BEFORE: 15, STEP: 45, SAVE: 30, RESULT: 10}
"""Of the kills, as far as the runs have so much left to do."""


def config(model: str, rows: str, out: Path, more: list[str]) -> RunConfig:
    words = [
        f"model.name={model}",
        f"data.train={rows}",
        f"data.eval={rows}",
        "data.max_length=64",
        f"output={out}",
        "quantization=nf4",
        *([] if "adapter=" in more else ["adapter.rank=4", "adapter.dropout=0.1"]),
        "training.batch_size=1",
        "training.gradient_accumulation_steps=2",
        "training.learning_rate=1e-2",
        f"training.max_steps={STEPS}",
        "training.eval_steps=4",
        "training.save_steps=2",
        "training.load_best_at_end=true",
        *(word if "." in word.partition("=")[0] or word in SECTIONS else f"training.{word}" for word in more),
    ]
    return build(RunConfig, read_assignments(words))


def child(made: RunConfig, out: Path) -> None:
    torch.set_num_threads(1)
    if (out / "run.json").exists():
        resume(out)
    else:
        run_from_config(made)


def start(made: RunConfig, out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(made, out)
            status = 0
        finally:
            os._exit(status)
    return pid


Entry = tuple[str, int]
"""A name with its inode: the name alone may stand for what an earlier process wrote, and so may the inode."""


@dataclass
class Seen:
    """What stood in a run directory when a process of the run began; says what the process did since."""

    out: Path
    num_lines: int = 0
    saves: set[Entry] = field(default_factory=set)
    results: set[Entry] = field(default_factory=set)

    @classmethod
    def now(cls, out: Path) -> Seen:
        made = cls(out)
        made.num_lines, made.saves, made.results = made.steps(), made.new_saves(), made.new_results()
        return made

    def steps(self) -> int:
        """Steps since then: each has a line in timings.jsonl, which no resume cuts."""
        path = self.out / "timings.jsonl"
        return (path.read_bytes().count(b"\n") if path.exists() else 0) - self.num_lines

    def new_saves(self) -> set[Entry]:
        """Checkpoints that are being written or removed now."""
        return _entries(self.out / "checkpoints", (".",)) - self.saves

    def new_results(self) -> set[Entry]:
        return _entries(self.out, ("adapter", "model", ".adapter", ".model")) - self.results

    def phase(self) -> str:
        if self.new_results():
            return RESULT
        if self.new_saves():
            return SAVE
        return STEP if self.steps() else BEFORE


def _entries(directory: Path, beginnings: tuple[str, ...]) -> set[Entry]:
    try:
        return {
            (each.name, each.inode()) for each in os.scandir(directory) if each.name.startswith(beginnings)
        }
    except FileNotFoundError:
        return set()


@dataclass(frozen=True)
class Pace:
    """How long the parts of an uninterrupted run took, in seconds."""

    start: float
    step: float
    save: float
    result: float

    @classmethod
    def typical(cls, paces: Sequence[Pace]) -> Pace:
        """The median of each, so that a run which the machine held up counts for nothing."""
        return cls(*(statistics.median(found) for found in zip(*map(astuple, paces), strict=True)))


@dataclass(frozen=True)
class Moment:
    """When to kill: so long after the process began, took a step, began a save, or began the result."""

    phase: str
    steps: int
    delay: float

    @classmethod
    def draw(cls, generator: random.Random, pace: Pace, left: int) -> Moment:
        """A moment of a process that has so many steps left."""
        shares = SHARES if left else {BEFORE: 1, RESULT: 1}
        phase = generator.choices(list(shares), list(shares.values()))[0]
        longest = {BEFORE: pace.start, STEP: pace.step, SAVE: pace.save, RESULT: pace.result}[phase]
        return cls(phase, generator.randint(1, max(1, left)), generator.uniform(0.0, longest))

    def has_come(self, seen: Seen) -> bool:
        """Whether its delay begins."""
        if self.phase == STEP:
            return seen.steps() >= self.steps
        if self.phase == SAVE:
            return seen.steps() >= self.steps and bool(seen.new_saves())
        return self.phase == BEFORE or bool(seen.new_results())


def ended(pid: int) -> bool:
    """Whether a child is done; the last process of a run must end well."""
    found, status = os.waitpid(pid, os.WNOHANG)
    assert not found or os.waitstatus_to_exitcode(status) == 0, "a resume failed"
    return bool(found)


def straight_run(made: RunConfig, out: Path) -> Pace:
    """Train without a kill, and see how long its parts take."""
    began, seen, pid = time.monotonic(), Seen.now(out), start(made, out)
    first = result = saving = 0.0
    saves: set[Entry] = set()
    before = began
    while not ended(pid):
        now = time.monotonic()
        first = first or (now if seen.steps() else 0.0)
        result = result or (now if seen.new_results() else 0.0)
        saving += now - before if seen.new_saves() else 0.0
        saves |= seen.new_saves()
        before = now
        time.sleep(0.0005)
    steps = (result - first) / STEPS
    return Pace(first - began, steps, saving / max(1, len(saves)), time.monotonic() - result)


@dataclass
class Told:
    """What is known of all kills so far."""

    phases: Counter[str] = field(default_factory=Counter)
    resumed: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def killed_run(
    made: RunConfig, out: Path, generator: random.Random, pace: Pace, most: int, told: Told
) -> int:
    """Kill a run at most `most` times, then let it end; returns how often."""
    kills = 0
    while True:
        done = check_checkpoints(out, told)
        seen, left = Seen.now(out), STEPS - done
        moment = Moment.draw(generator, pace, left)
        pid = start(made, out)
        if kills == most:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the last resume failed"
            return kills
        if not killed(pid, moment, seen):
            return kills
        kills += 1
        told.phases[seen.phase()] += 1
        told.resumed[seen.phase()] += done > 0
        if check_checkpoints(out, told) < done:
            told.lost.append(f"{out.name}: step {done} was there before the kill")


def killed(pid: int, moment: Moment, seen: Seen) -> bool:
    """Kill a child at a moment; whether that came before its end."""
    while not moment.has_come(seen):
        if ended(pid):
            return False
        time.sleep(0.0005)
    deadline = time.monotonic() + moment.delay
    while time.monotonic() < deadline:
        if ended(pid):
            return False
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), "a resume failed"
    return code != 0


def check_checkpoints(out: Path, told: Told) -> int:
    """Step of the newest checkpoint, 0 without one; notes those that are not whole."""
    newest = 0
    for path in RunDirectory(out).checkpoints():
        try:
            newest = load_checkpoint(path).position.step
        except CheckpointError as error:
            told.lost.append(f"{out.name}: {error}")
    return newest


def differences(straight: Path, out: Path) -> list[str]:
    """Files of an uninterrupted run that are others in a killed one."""
    there = [name for name in COMPARED if (straight / name).exists()]
    return [
        f"{out.name}/{name}"
        for name in there
        if not (out / name).exists() or (out / name).read_bytes() != (straight / name).read_bytes()
    ]


def main() -> None:
    model, rows, directory, more = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[6:]
    kills, generator = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    torch.set_num_threads(1)
    kinds = EVERY if more == ["every"] else {"as given": more}
    straight, paces = {}, []
    for number, (kind, settings) in enumerate(kinds.items()):
        straight[kind] = directory / ("straight" if kinds is not EVERY else f"straight{number}")
        paces.append(straight_run(config(model, rows, straight[kind], settings), straight[kind]))
    pace = Pace.typical(paces)
    hits, told = dict.fromkeys(kinds, 0), Told()
    different: list[str] = []
    runs = 0
    while (missing := kills - sum(hits.values())) > 0:
        kind = list(kinds)[runs % len(kinds)]
        out = directory / f"killed{runs}"
        # At most 8 kills a run, so that some runs are killed often and several runs end.
        made = config(model, rows, out, kinds[kind])
        hits[kind] += killed_run(made, out, generator, pace, min(8, missing), told)
        different += [f"{kind}: {name}" for name in differences(straight[kind], out)]
        shutil.rmtree(out)
        runs += 1
    answer = {
        "kills": sum(hits.values()),
        "runs": runs,
        "phases": told.phases,
        "resumed": told.resumed,
        "kinds": hits,
        "lost": told.lost,
        "different": different,
    }
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
