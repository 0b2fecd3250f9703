"""The page of `graft data check`: what to mend, distributions, rows to look at, samples token by token.

It holds at most 100,000 tokens and 400,000 characters of raw rows, whatever the size of the data: 5 MB at
the very most, under 2 MB in ordinary text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from graft.data.check.counts import counts, heading
from graft.data.check.facts import Facts as DataFacts
from graft.data.check.rules import Finding
from graft.data.masking import Encoder
from graft.data.prepare import Dataset
from graft.evaluate.check_bars import Learned, Lengths, Tiles
from graft.evaluate.check_data import page_data
from graft.evaluate.report import Facts, Section, Table, json_in_page, write_report

STYLES = ("run", "check")


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The verdict and what to mend, the worst first."""

    styles: ClassVar[tuple[str, ...]] = STYLES
    title: str = "What to mend"
    findings: Sequence[Finding]
    verdict: str
    phase: str
    """"finished" where all is well, "failed" where it is not."""
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        items = "".join(map(_item, self.findings))
        listed = f'<ol class="findings">{items}</ol>' if items else '<p class="note">Nothing.</p>'
        pill = f'<span class="pill" data-phase="{self.phase}">{self.verdict}</span>'
        return f'<p class="verdict">{pill}</p>{listed}'


def _item(finding: Finding) -> str:
    link = ""
    if finding.places:
        target = f"#look/{finding.split}/{finding.places}/0".replace(" ", "-")
        link = f' <a href="{escape(target)}">show</a>'
    other = "" if finding.split == "training" else f" <em>{escape(finding.split)} data</em>"
    return (
        f'<li data-level="{finding.level}"><b>{finding.level}</b>{other} '
        f"<span>{text(finding.what)}</span>{link}"
        f"<p>{text(finding.why)}</p><p><b>Mend:</b> {text(finding.fix)}</p></li>"
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that the page's script fills."""

    scripts: ClassVar[tuple[str, ...]] = ("check",)
    styles: ClassVar[tuple[str, ...]] = STYLES
    title: str
    part: str
    data: dict[str, Any] | None = None
    """What the scripts draw; one part of the page has it."""
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        held = ""
        if self.data is not None:
            held = f'<script type="application/json" id="check-data">{json_in_page(self.data)}</script>'
            held += (
                '<noscript><p class="note">The samples need JavaScript; nothing is fetched.</p></noscript>'
            )
        return f'{held}<div data-part="{self.part}"></div>'


def text(value: str) -> str:
    """Any text as HTML; half of a surrogate pair, which no file can hold, as its escape."""
    return escape(plain(value))


def plain(value: str) -> str:
    """A text that can be written, half of a surrogate pair as its escape."""
    return value.encode("utf-8", "backslashreplace").decode()


def write_check(
    path: str | os.PathLike[str],
    splits: Sequence[DataFacts],
    datasets: Sequence[Dataset],
    findings: Sequence[Finding],
    encoder: Encoder,
) -> None:
    """Write what was found as a page that can be viewed anywhere, also offline.

    Args:
        path: The HTML file; its directory must exist.
        splits: The facts of the training data and, where there is one, of the evaluation data.
        datasets: The same data.
        findings: What to mend.
        encoder: What made the samples.

    Raises:
        StorageError: The file cannot be written; an old one is untouched.

    Cost: about a second for the samples that it shows.
    """
    training = splits[0]
    write_report(
        path,
        [*_sections(splits, datasets, findings, encoder)],
        title=plain(f"Data check: {Path(training.path).name}"),
        subtitle=plain(f"{training.num_rows:,} rows, {training.format}"),
    )


def _sections(
    splits: Sequence[DataFacts], datasets: Sequence[Dataset], findings: Sequence[Finding], encoder: Encoder
) -> Iterator[Section]:
    yield Findings(findings=findings, **_verdict(findings))
    yield Tiles(title="At a glance", facts=splits[0])
    for facts in splits:
        yield Facts(title=f"The {facts.split} data", facts={k: plain(v) for k, v in heading(facts).items()})
    for facts in splits:
        yield Lengths(title=f"Tokens of a sample, {facts.split} data", facts=facts)
    yield Learned(title="Where the token places go", splits=splits)
    yield Part(title="Rows to look at", part="problems", data=page_data(splits, datasets, encoder))
    yield Part(
        title="Samples",
        part="browser",
        note="Left and right arrow keys go through them; a token that is pointed at or touched tells its id.",
    )
    yield Part(
        title="Rows of the first epoch",
        part="rows",
        note="Which samples share a row; each sees only itself. Choose a row to read it.",
    )
    columns = [counts(facts) for facts in splits]
    names = list(dict.fromkeys(name for column in columns for name in column))
    yield Table(
        title="Counts",
        columns=("", *(facts.split for facts in splits)),
        rows=[(name, *(plain(column.get(name, "–")) for column in columns)) for name in names],
    )


def _verdict(findings: Sequence[Finding]) -> dict[str, str]:
    if any(finding.level == "stop" for finding in findings):
        return {"verdict": "cannot be trained on", "phase": "failed"}
    alarms = sum(finding.level == "alarm" for finding in findings)
    if alarms:
        told = f"can be trained on, but {alarms} alarm{'s' if alarms > 1 else ''} first"
        return {"verdict": told, "phase": "warned"}
    return {"verdict": "can be trained on", "phase": "finished"}
