"""The audit of a run: in its first steps every tensor learns, the output changes and the base stays.

Nothing here touches random numbers, gradients or weights: an audited run has the same bits as one without.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from graft import files
from graft.adapters.attached import base_state, disabled
from graft.adapters.effect import amplified
from graft.data.loader import Batch
from graft.errors import TrainingError
from graft.evaluate.decoding import evaluating
from graft.models.families import head, hidden_states
from graft.training.audit_findings import (
    Finding,
    Subject,
    Waiting,
    all_may_wait,
    findings,
    gradient_cause,
    movement_cause,
    requirement_defects,
    wiring_defects,
)
from graft.training.base_watch import BaseWatch

FILE = "audit.json"

RECOVERY_FILE = "audit-recovery.json"

NUM_STEPS = 2
"""Steps that are audited. lora_A has no gradient before lora_B has moved, so one is not enough."""

PROBE_TOKENS = 64
"""Tokens of the first row on which the output is compared."""

LOUDER = (2.0**10, 2.0**20)
"""Factors on an update that is too small to be seen in a coarse type so early."""

PATIENCE = 3
"""Later steps in a row without a gradient before a tensor counts as cut off."""


class Audit:
    """Called by the loop at each step; refuses a run that looks fine and trains nothing.

    Args:
        subject: What is audited.
        mode: "sampled", "full" or "none".

    Cost: a few short passes over the gradients in two steps, two forward passes of 64 tokens at three places,
    and a look at each tensor's flags in every step.
    """

    def __init__(self, subject: Subject, mode: Literal["sampled", "full", "none"]) -> None:
        self.subject, self.mode = subject, mode
        self.on = mode != "none"
        self._begun = self._done = False
        self._steps: list[int] = []
        self._rate: float | None = None
        self._highest = 0.0
        self._num_still = 0
        self._gradients: dict[str, float] = {}
        self._changes: dict[str, float] = {}
        self._starved: dict[str, int] = {}
        self._picked: dict[str, tuple[Tensor, Tensor]] = {}
        self._seconds = 0.0
        self._effect: float | None = None
        self._report: dict[str, Any] = {}

    # What the loop calls.

    def begin(self, batch: Batch) -> None:
        """Before the first step: what trains is what was asked for, and what the base is like.

        Raises:
            TrainingError: It is not.
        """
        if not self.on or self._begun:
            return
        with self._timed():
            self._begun = True
            subject = self.subject
            self._adapter = subject.adapter
            self._waiting = Waiting(subject.model)
            self._stop(wiring_defects(subject))
            self._watch = BaseWatch(self._base(), full=self.mode == "full")
            self._probe_ids = batch.input_ids[:1, :PROBE_TOKENS]
            self._probe_positions = batch.position_ids[:1, :PROBE_TOKENS]
            self._first = None if self._adapter else self._logits()

    def before_update(self, learning_rate: float) -> None:
        """With the gradients of a step there: note how large they are and where the largest ones stand.

        Raises:
            TrainingError: A tensor was cut off in the middle of the run.
        """
        if not self._begun:
            return
        with self._timed():
            if self._done:
                self._check_connected()
                return
            self._rate = learning_rate
            self._num_still += learning_rate == 0
            given = {n: p.grad for n, p in self.subject.parameters.items() if p.grad is not None}
            if not given:
                return
            for name, largest in zip(given, _largest(list(given.values())), strict=True):
                self._gradients[name] = max(largest, self._gradients.get(name, 0.0))
                if largest and learning_rate and not self._changes.get(name):
                    self._picked[name] = _pick(self.subject.parameters[name], given[name])

    def after_step(self, step: int) -> None:
        """With the step done: note what moved; after the last audited step, decide.

        Raises:
            TrainingError: The run trains nothing, or not what was asked for; audit.json says all of it.
        """
        if not self._begun or self._done or self._rate is None:  # the step was skipped
            return
        with self._timed():
            if self._picked:
                moved = [
                    (torch.take(self.subject.parameters[name].detach(), places) - before).abs().max()
                    for name, (places, before) in self._picked.items()
                ]
                self._changes |= dict(zip(self._picked, torch.stack(moved).tolist(), strict=True))
                self._picked = {}
            if self._rate:
                self._steps.append(step)
                self._highest = max(self._highest, self._rate)
            self._rate = None
            if len(self._steps) == NUM_STEPS or self._num_still == NUM_STEPS:
                self._conclude()

    def finish(self) -> None:
        """After the last step: the base is still what it was, and the output another one.

        Raises:
            TrainingError: One of them is not so.
        """
        if not self._begun:
            return
        with self._timed():
            if not self._done and self._steps:
                self._conclude()
            if not self._done:
                return
            defects = requirement_defects(self.subject) + self._base_defects(full=True)
            effect_defects = self._effect_defects()
            self._report["end"] = {
                "base": "changed" if defects else "unchanged",
                "base_checked": "every byte" if self.mode == "full" else "sampled blocks",
                "output_change": self._effect,
            }
            self._stop(defects + effect_defects)
            if not self._effect:
                self.subject.say(
                    "audit: at the end the output is still the base's: the steps are too short or too few "
                    "for the type that the base computes in"
                )
        self._write()

    # What is decided.

    def _conclude(self) -> None:
        self._done = True
        names = list(self.subject.parameters)
        alive = [name for name in names if self._gradients.get(name)]
        starved = [name for name in names if name not in self._gradients]
        zero = [name for name in self._gradients if not self._gradients[name]]
        waiting = self._waiting.excused(starved + zero, alive)
        notes = []
        if waiting:
            who = "of experts or routers without a token, of layers without a rank or of rows not seen"
            notes.append(f"{len(waiting)} tensors {who} wait for a gradient")
        early = [] if len(self._steps) >= NUM_STEPS else zero
        if early:
            notes.append(f"{len(early)} tensors get their first gradient after the first step; there was one")
        slow = self._slow(names, alive)
        if slow:
            notes.append(f"{len(slow)} tensors do not move yet: the first steps are too short for them")
        excused = {*waiting, *early, *slow}
        if self._adapter is None and len(zero) < len(names) / 2:  # such as a bias that cancels out
            notes += [f"{len(zero)} tensors have only zero gradients so far"] if zero else []
            excused |= set(zero)
        starved, zero = ([n for n in group if n not in excused] for group in (starved, zero))
        still = [n for n in alive if not self._changes.get(n) and n not in excused]
        defects = findings(
            *(
                (what, group, gradient_cause(self.subject, group, missing=group is starved))
                for what, group in (
                    ("tensors that train got no gradient", starved),
                    ("tensors that train got only zero gradients", zero),
                )
                if group
            ),
            ("tensors got gradients and did not move", still, still and self._still_cause(still) or ""),
        )
        defects += requirement_defects(self.subject) + self._base_defects()
        if not defects:
            defects = self._effect_defects()
        else:
            self._effect = None
        self._record(names, notes)
        self._stop(defects)
        self._write()
        self.subject.say(self._line(notes))

    def _still_cause(self, still: Sequence[str]) -> str:
        if not self._steps:
            return f"the learning rate is zero in the first {self._num_still} steps"
        return movement_cause(self.subject, still)

    def _slow(self, names: Sequence[str], alive: Sequence[str]) -> list[str]:
        """Tensors that so small a step leaves where they are: large values, such as norms near one."""
        still = [name for name in alive if not self._changes.get(name)]
        warm = self._highest < self.subject.learning_rate
        if not self._steps or len(still) > len(names) / 2 or not (warm or self._adapter is None):
            return []
        # AdamW's first steps are about as long as the learning rate; those of SGD as that times the gradient.
        steps = {n: self._highest * (1.0 if self._adapter else min(1.0, self._gradients[n])) for n in still}
        return [name for name in still if _resolution(self.subject.parameters[name]) > steps[name]]

    def _base_defects(self, *, full: bool = False) -> list[Finding]:
        cause = "the optimizer or a module writes to it in place"
        return findings(("the base changed", self._watch.changed(self._base(), full=full), cause))

    def _effect_defects(self) -> list[Finding]:
        named = (self._adapter.name if self._adapter else "the model",)
        found = self._compare()
        self._effect = found if math.isfinite(found) else None
        if not math.isfinite(found):
            return findings(("the output is not finite", named, "the steps are too long: lower the rate"))
        if found or self._acts_louder():
            return []
        if self._adapter and self._adapter.saved_modules and self._coarse():
            return []
        if self._adapter and all_may_wait(self.subject.model, self._adapter.name):
            return []
        cause = "the adapter is not called, or its updates do not reach the logits"
        return findings(("training does not change the output", named, cause))

    def _coarse(self) -> bool:
        return any(p.dtype in (torch.bfloat16, torch.float16) for p in self.subject.model.parameters())

    def _acts_louder(self) -> bool:
        if self._adapter is None:
            return False
        for factor in LOUDER:
            with amplified(self.subject.model, self._adapter.name, factor):
                if self._compare() != 0:  # NaN too: it acts
                    return True
        return False

    def _check_connected(self) -> None:
        parameters = self.subject.parameters
        hungry = [name for name, p in parameters.items() if p.grad is None]
        if any(not p.requires_grad for p in parameters.values()):
            self._stop(requirement_defects(self.subject))
        if not hungry:
            self._starved.clear()
            return
        self._starved = {name: self._starved.get(name, 0) + 1 for name in hungry}
        cut = [name for name, times in self._starved.items() if times >= PATIENCE]
        served = [name for name in parameters if parameters[name].grad is not None]
        excused = set(self._waiting.excused(cut, served))
        cut = [name for name in cut if name not in excused and name in self._gradients]
        if cut:
            cause = gradient_cause(self.subject, cut, missing=True)
            self._stop(findings((f"no gradient in {PATIENCE} steps in a row", cut, cause)))

    # How it is measured.

    def _base(self) -> Iterator[tuple[str, Tensor]]:
        trained = {p.data_ptr() for p in self.subject.parameters.values()}
        for name, tensor in base_state(self.subject.model):
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in trained:
                yield name, tensor

    def _compare(self) -> float:
        """Largest change of a logit by what was trained; not finite where the output is not."""
        if self._first is None:
            with disabled(self.subject.model):
                before = self._logits()
        else:
            before = self._first
        return float((self._logits() - before).abs().max())

    def _logits(self) -> Tensor:
        model = self.subject.model
        device = next(iter(self.subject.parameters.values())).device
        with evaluating(model), torch.no_grad():
            hidden = hidden_states(model, self._probe_ids.to(device), self._probe_positions.to(device))
            logits: Tensor = head(model, hidden).float()
        return logits

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    # What is told.

    def _record(self, names: Sequence[str], notes: Sequence[str]) -> None:
        self._report = {
            "steps": self._steps,
            "trained_tensors": len(names),
            "moved": sum(bool(self._changes.get(name)) for name in names),
            "base_tensors": len(self._watch.tensors),
            "base_bytes": self._watch.num_bytes,
            "sampled_bytes": self._watch.num_sampled_bytes,
            "output_change": self._effect,
            "notes": list(notes),
            "tensors": {
                name: {
                    "gradient": _finite(self._gradients.get(name, 0.0)),
                    "change": _finite(self._changes.get(name, 0.0)),
                }
                for name in names
            },
        }

    def _write(self, defects: Sequence[Finding] = ()) -> None:
        outcome = {
            "audit": self.mode,
            "passed": not defects,
            "defects": [finding.to_dict() for finding in defects],
            "seconds": round(self._seconds, 4),
        }
        files.write_json(self.subject.path, outcome | self._report)

    def _stop(self, defects: list[Finding]) -> None:
        if not defects:
            return
        self._write(defects)
        first = defects[0]
        shown = ", ".join(first.names[:5]) + (f" and {len(first.names) - 5} more" if first.names[5:] else "")
        besides = "".join(f"; besides, {finding.what} ({len(finding.names)})" for finding in defects[1:])
        raise TrainingError(
            f"{first.what} ({len(first.names)}){besides}",
            where=f"{shown}; all of it in {self.subject.path}",
            fix=f"likely cause: {first.cause}",
        )

    def _line(self, notes: Sequence[str]) -> str:
        report = self._report
        base = "" if self._adapter is None else ", base unchanged"
        effect = f"changes by up to {self._effect:.2g}" if self._effect else "changes too little to see yet"
        told = "".join(f"; {note}" for note in notes)
        moved = f"{report['moved']} of {report['trained_tensors']} tensors move"
        return f"audit: {moved}{base}, output {effect}{told}"


def _largest(gradients: list[Tensor]) -> list[float]:
    """The largest absolute value of each tensor, in one transfer."""
    found: list[float] = torch.stack(list(torch._foreach_norm(gradients, math.inf))).tolist()
    return found


def _finite(value: float) -> float | None:
    """JSON has no numbers for the others."""
    return value if math.isfinite(value) else None


def _pick(parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the largest and the smallest gradient of a tensor, and its values there."""
    places = torch.stack([gradient.argmax(), gradient.argmin()])
    return places, torch.take(parameter.detach(), places)


def _resolution(parameter: Tensor) -> float:
    """The smallest step that a typical value of a tensor can make."""
    return float(parameter.detach().abs().max()) * torch.finfo(parameter.dtype).eps
