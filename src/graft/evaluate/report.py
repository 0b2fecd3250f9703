"""Reports as single HTML files: facts, tables, loss curves, samples; nothing is fetched to view them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import ClassVar, Literal, Protocol, TypeGuard

from graft.files import write_text

NUM_COLOURS = 8
"""Colours of the page, `--s0` to `--s7`; runs beyond that share them."""

UNPLOTTED = ("check",)
"""Scripts of the page that draw no chart."""

# A page under this policy fetches nothing and sends nothing, whatever text is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


class Section(Protocol):
    """One part of a page."""

    @property
    def title(self) -> str:
        """Its heading."""
        ...

    def body(self) -> str:
        """HTML below the title."""
        ...


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values, as a grid."""

    title: str
    facts: Mapping[str, object]
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        pairs = (
            f"<div><dt>{escape(name)}</dt><dd>{escape(show(value))}</dd></div>"
            for name, value in self.facts.items()
        )
        return f"<dl>{''.join(pairs)}</dl>"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under columns; numbers stand to the right, the best of a column is marked."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    best: Mapping[str, Literal["min", "max"]] = field(default_factory=dict)
    """Columns whose smallest or largest number is marked."""
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        assert all(len(row) == len(self.columns) for row in self.rows)
        columns = [_Column.of(cells, self.best.get(name)) for name, cells in self._by_column()]
        head = "".join(
            f"<th{_class(number=column.numeric)}>{escape(name)}</th>"
            for name, column in zip(self.columns, columns, strict=True)
        )
        lines = "".join(
            f"<tr>{''.join(column.cell(value) for column, value in zip(columns, row, strict=True))}</tr>"
            for row in self.rows
        )
        return (
            f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead>'
            f"<tbody>{lines}</tbody></table></div>"
        )

    def _by_column(self) -> list[tuple[str, list[object]]]:
        return [(name, [row[place] for row in self.rows]) for place, name in enumerate(self.columns)]


@dataclass(frozen=True)
class _Column:
    numeric: bool
    best: float | None

    @classmethod
    def of(cls, cells: list[object], wanted: Literal["min", "max"] | None) -> _Column:
        filled = [cell for cell in cells if cell is not None]
        numbers = [cell for cell in filled if _is_number(cell)]
        finite = [number for number in numbers if math.isfinite(number)]
        best = (min(finite) if wanted == "min" else max(finite)) if wanted and len(finite) > 1 else None
        return cls(bool(filled) and len(numbers) == len(filled), best)

    def cell(self, value: object) -> str:
        best = self.best is not None and value == self.best
        return f"<td{_class(number=self.numeric, best=best)}><span>{escape(show(value))}</span></td>"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Series of the same run share a colour; of these, evaluation is drawn dashed with its points.
    """

    run: str
    kind: Literal["train", "eval", ""]
    """"" for a line that is neither."""
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Values over steps, several runs in one chart."""

    scripts: ClassVar[tuple[str, ...]] = ("report",)
    title: str
    series: Sequence[Series]
    x_label: str = "step"
    y_label: str = "loss"
    log_scale: bool = False
    whole_x: bool = False
    """Whether x is counted in whole numbers."""
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        runs = list(dict.fromkeys(series.run for series in self.series))
        lines = [
            {
                "name": f"{series.run} {series.kind}".strip(),
                "colour": runs.index(series.run) % NUM_COLOURS,
                "dashed": series.kind == "eval",
                "faint": series.kind == "train",
                **_points(series, positive=self.log_scale),
            }
            for series in self.series
        ]
        if not any(line["steps"] for line in lines):
            return '<p class="note">No values were logged.</p>'
        spec = {
            "x": self.x_label,
            "y": self.y_label,
            "log": self.log_scale,
            "whole": self.whole_x,
            "series": lines,
        }
        return (
            f'<div class="chart"><script type="application/json">{json_in_page(spec)}</script></div>'
            '<noscript><p class="note">The chart needs JavaScript; nothing is fetched.</p></noscript>'
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what each model says to it."""

    prompt: str
    answers: Sequence[str]
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts with the answers side by side, for instance before and after training."""

    title: str
    names: Sequence[str]
    """Who gives the answers, in their order."""
    samples: Sequence[Sample]
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        return "".join(map(self._sample, self.samples)) or '<p class="note">No prompts were given.</p>'

    def _sample(self, sample: Sample) -> str:
        answers = "".join(
            _said(name, answer, f"--mark: var(--s{place % NUM_COLOURS})")
            for place, (name, answer) in enumerate(zip(self.names, sample.answers, strict=True))
        )
        if sample.reference is not None:
            answers += _said("reference", sample.reference, "--mark: var(--good)")
        prompt = f'<div class="prompt">{_said("prompt", sample.prompt, "")}</div>'
        return f'<div class="sample">{prompt}<div class="answers">{answers}</div></div>'


def write_report(
    path: str | os.PathLike[str], sections: Sequence[Section], *, title: str, subtitle: str = ""
) -> None:
    """Write a page that can be viewed anywhere, also offline.

    Args:
        path: The HTML file; its directory must exist.
        sections: Its parts, in order: `Facts`, `Table`, `Curves`, `Samples`.
        title: Heading of the page.
        subtitle: A line below the heading.

    Raises:
        StorageError: The file cannot be written; an old one is untouched.
    """
    write_text(path, render(sections, title=title, subtitle=subtitle))


def render(sections: Sequence[Section], *, title: str, subtitle: str = "", policy: str = POLICY) -> str:
    """The page that `write_report` writes, as a string.

    Args:
        sections: Its parts; one that needs scripts or styles of the page names them in its attributes
            `scripts` and `styles`.
        title: Heading of the page.
        subtitle: A line below the heading.
        policy: What the page may fetch.
    """
    scripts, styles = (
        list(dict.fromkeys(name for section in sections for name in getattr(section, kind, ())))
        for kind in ("scripts", "styles")
    )
    plotted = any(name not in UNPLOTTED for name in scripts)
    style = (_asset("vendor/uplot/uPlot.min.css") if plotted else "") + _asset("page/report.css")
    style += "".join(_asset(f"page/{name}.css") for name in (["run"] if "heat" in scripts else styles))
    script = ""
    if scripts:
        code = "\n".join(_asset(f"page/{name}.js") for name in scripts)
        if plotted:
            script = f"<!-- uPlot, MIT licence:\n{_asset('vendor/uplot/LICENSE')}-->"
            code = f"{_asset('vendor/uplot/uPlot.iife.min.js')}\n{code}"
        script += f"<script>{code}</script>"
    under = f"<p>{escape(subtitle)}</p>" if subtitle else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{under}</header>\n"
        f"{''.join(map(_section, sections))}"
        f"<footer>Written by graft.</footer>\n{script}\n</body>\n</html>\n"
    )


def show(value: object) -> str:
    """A value as a reader wants it: thousands separated, four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value and not 1e-3 <= abs(value) < 1e7:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{_decimals(value)}f}"
    return str(value)


def _decimals(value: float) -> int:
    """Decimals that make four significant digits, at least one."""
    return max(1, 3 - math.floor(math.log10(abs(value)))) if value else 1


def _section(section: Section) -> str:
    note = getattr(section, "note", "")
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(section.title)}</h2>{told}{section.body()}</section>\n"


def _said(name: str, text: str, style: str) -> str:
    # The newline after <pre> is dropped by browsers; without it a text's own first newline would be.
    return f'<div class="said" style="{style}"><h3>{escape(name)}</h3><pre>\n{escape(text)}</pre></div>'


def _class(**flags: bool) -> str:
    names = " ".join(name for name, holds in flags.items() if holds)
    return f' class="{names}"' if names else ""


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _points(series: Series, *, positive: bool) -> dict[str, list[float | None]]:
    """Steps and values of a series in rising order; what cannot be drawn becomes a gap."""
    pairs = dict(zip(series.steps, series.values, strict=True))
    steps = sorted(pairs)
    values = [pairs[step] for step in steps]
    drawn = [value if math.isfinite(value) and (value > 0 or not positive) else None for value in values]
    return {"steps": list(steps), "values": drawn}


def json_in_page(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("graft.evaluate").joinpath(name).read_text(encoding="utf-8")
