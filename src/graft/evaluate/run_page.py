"""The parts of a page that shows a run, finished or live: figures, curves, spectra, events, from its logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

from graft.evaluate.report import POLICY, Section, json_in_page

MOST_STEPS = 4000
"""Steps in a page; of a longer run a part is drawn, and the page says so."""

LIVE_POLICY = f"{POLICY}; connect-src 'self'"
"""A live page may fetch from its own server, and from nowhere else."""

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """The head of the page: where the run stands, its figures; holds the data that the other parts draw."""

    scripts: ClassVar[tuple[str, ...]] = ("heat", "run")

    title: str = "Run"
    lines: Mapping[str, Sequence[Line]]
    """Lines of the logs: `metrics`, `timings`, `spectra`."""
    state: Mapping[str, Any]
    """What is known besides: `phase`, `name`, `num_steps`, `audit`, ..."""
    live: str | None = None
    """Path of the event stream; None for a finished run."""
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        data = {"lines": dict(self.lines), "state": dict(self.state), "live": self.live}
        return (
            f'<script type="application/json" id="run-data">{json_in_page(data)}</script>'
            '<div data-part="overview"><div class="run-head"></div><div class="tiles"></div></div>'
            '<noscript><p class="note">The figures need JavaScript; nothing is fetched.</p></noscript>'
        )


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """A part that the page's script fills, and hides while there is nothing to show."""

    scripts: ClassVar[tuple[str, ...]] = ("heat", "run")

    title: str
    part: str
    """"loss", "course", "spectra", "events", "audit" or "log"."""
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        kinds = {"events": ("ul", "events"), "audit": ("ul", "events"), "log": ("pre", "told")}
        tag, kind = kinds.get(self.part, ("div", "panels"))
        return f'<{tag} class="{kind if self.part != "spectra" else ""}" data-part="{self.part}"></{tag}>'


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A part that is shown when it is asked for."""

    title: str
    summary: str
    inner: Section
    note: str = ""

    @property
    def scripts(self) -> tuple[str, ...]:
        """Those of what it holds."""
        found: tuple[str, ...] = getattr(self.inner, "scripts", ())
        return found

    def body(self) -> str:
        """HTML below the title."""
        return f"<details><summary>{escape(self.summary)}</summary>{self.inner.body()}</details>"


def curve_parts() -> list[Section]:
    """What every page of a run shows below its head."""
    return [
        RunPart(title="Loss", part="loss", note="Cross-entropy, in nats per labelled token."),
        RunPart(title="Rates, speed, memory", part="course"),
        RunPart(
            title="Updates, layer by layer",
            part="spectra",
            note="What the adapter has made of each layer: columns are blocks, rows their linears. "
            "Choose a cell for its singular values.",
        ),
        RunPart(title="Events", part="events"),
    ]


def drawn_lines(
    metrics: Sequence[Line], timings: Sequence[Line], spectra: Sequence[Line], most: int = MOST_STEPS
) -> tuple[dict[str, list[Line]], int]:
    """The lines that a page holds of a run.

    Of a run with more than `most` steps one of each so many is kept: the one with the largest gradient, so
    that no spike is lost, every step that was skipped, every evaluation, and the last step.

    Args:
        metrics: Lines of metrics.jsonl.
        timings: Lines of timings.jsonl; of a step with several the last one counts.
        spectra: Lines of spectra.jsonl.
        most: Steps to keep, about.

    Returns:
        The lines by log, and how many steps stand for one.
    """
    steps = [line for line in metrics if "eval_loss" not in line]
    every = -(-len(steps) // most) if steps else 1
    kept: list[Line] = [
        max(steps[start : start + every], key=lambda line: line.get("grad_norm") or 0.0)
        for start in range(0, len(steps), every)
    ]
    if every > 1:
        kept += [line for line in steps if line.get("skipped")] + steps[-1:]
    wanted = {line["step"] for line in kept}
    timing = {line["step"]: _short(line) for line in timings if line["step"] in wanted}
    shown = [line for line in metrics if "eval_loss" in line or line["step"] in wanted]
    return {
        "metrics": shown,
        "timings": [timing[step] for step in sorted(timing)],
        "spectra": list(spectra),
    }, every


def _short(line: Line) -> Line:
    return {name: value for name, value in line.items() if name not in ("flops_per_second", "clock_seconds")}
