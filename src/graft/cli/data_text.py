"""What `graft data check` shows in a terminal: samples in colours, lengths as bars, counts, what to mend."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graft.data.check.bins import bins, width_of
from graft.data.check.counts import counts, first_places, heading
from graft.data.check.facts import Facts
from graft.data.check.rules import Finding
from graft.data.check.samples import CONTROL, END, LEARNED, Shown, show
from graft.data.report import LEARNED_MARKS
from graft.training.data_check import Checked

MOST_TOKENS = 260
"""Tokens of a sample that are shown; of more the middle is left out."""
BARS = 12
"""Bars of the lengths, at most."""
WIDTH = 110
"""Columns, where the terminal has as many."""

STYLES = {
    "learned": "green",
    "context": "dim",
    "stop": "bold red",
    "alarm": "bold red",
    "advice": "bold yellow",
}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_END = "◀"


def text_of(found: Checked, samples: int, page: Path | None) -> str:
    """The whole answer as text, with colours where stdout is a terminal.

    Args:
        found: What was found.
        samples: Samples of the training data to show.
        page: The page that was written.
    """
    out = io.StringIO()
    wide = min(shutil.get_terminal_size((100, 24)).columns, WIDTH)
    console = Console(
        file=out, force_terminal=sys.stdout.isatty(), width=wide, highlight=False, soft_wrap=False
    )
    for part in _parts(found, samples, page):
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def _parts(found: Checked, samples: int, page: Path | None) -> Iterator[RenderableType]:
    for facts in found.facts:
        yield _title(f"{facts.split} data")
        yield _pairs(heading(facts))
    training, data = found.facts[0], found.datasets[0]
    if samples:
        yield _title("samples")
        yield _legend(training)
    for index in list(dict.fromkeys(training.chosen.get("random", ())))[:samples]:
        shown = show(
            index,
            data.samples[index],
            found.encoder,
            kind=training.kind,
            labels=data.labels,
            most=MOST_TOKENS,
        )
        yield _sample(shown)
    yield _title("tokens of a sample")
    yield from _lengths(training)
    yield _title("counts")
    yield _counts(found.facts)
    for facts in found.facts:
        if places := first_places(facts):
            yield _title(f"first places, {facts.split} data")
            yield _pairs(places)
    yield _title("what to mend" if found.findings else "nothing to mend")
    for number, finding in enumerate(found.findings, 1):
        yield _finding(number, finding)
    yield _verdict(found)
    if page is not None:
        yield Text(f"page: {page}")


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _pairs(pairs: dict[str, str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(Text(name, style="dim"), Text(visible(value), overflow="fold"))
    return Padding(table, (0, 0, 0, 2))


def _legend(facts: Facts) -> Text:
    begin, end = LEARNED_MARKS
    text = Text("  ")
    what = "the token that tells the class" if facts.kind == "class" else "learned"
    text.append(f"{begin}{what}{end}", STYLES["learned"])
    text.append("  context", STYLES["context"])
    text.append("  ")
    text.append("control token", "reverse")
    return text.append(f"  {_END} an end that is learned")


def _sample(shown: Shown) -> Panel:
    text = Text(overflow="fold")
    learning = False
    for place, (piece, flags) in enumerate(zip(shown.pieces, shown.flags, strict=True)):
        if place == shown.gap:
            text.append(f" ... {shown.num_tokens - len(shown.ids):,} tokens ... ", "italic dim")
        if bool(flags & LEARNED) != learning:
            text.append(LEARNED_MARKS[learning], STYLES["learned"])
            learning = not learning
        style = STYLES["learned" if learning else "context"]
        text.append(visible(piece), f"{style} reverse" if flags & CONTROL else style)
        if flags & END:
            text.append(_END, STYLES["learned"])
    if learning:
        text.append(LEARNED_MARKS[1], STYLES["learned"])
    told = f"{shown.num_tokens:,} tokens, {shown.num_labelled:,} learned"
    return Panel(
        text,
        title=Text(visible(shown.where.rpartition("/")[2])),
        subtitle=Text(visible("; ".join(part for part in (told, shown.note) if part))),
        title_align="left",
        subtitle_align="right",
        border_style="dim",
    )


def visible(text: str) -> str:
    """A text in which nothing acts on a terminal: control characters and turns of direction as pictures."""
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char >= " " and char != "\x7f" and not "\x80" <= char <= "\x9f":
        turns = "\u200e" <= char <= "\u200f" or "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
        return f"<U+{ord(char):04X}>" if turns or "\ud800" <= char <= "\udfff" else char
    if char == "\n":
        return char
    return "    " if char == "\t" else chr(0x2400 + ord(char)) if char < " " else f"<U+{ord(char):04X}>"


def _lengths(facts: Facts) -> Iterator[Text]:
    width = width_of(facts.longest, BARS)
    found = bins(facts.lengths, width, facts.longest)
    found = found[next(place for place, bin in enumerate(found) if bin.count) :]
    most = max(bin.count for bin in found)
    names = [f"{bin.begin:,}–{bin.last:,}" for bin in found]
    room = max(map(len, names))
    marked = False
    for name, bin in zip(names, found, strict=True):
        text = Text(f"  {name.rjust(room)} ")
        text.append(_bar(bin.count / most, 40), "cyan")
        text.append(f" {bin.count:,}" if bin.count else " ", "dim")
        if bin.begin <= facts.max_length <= bin.last:
            text.append(f"   ◀ max_length {facts.max_length:,}", "bold yellow")
            marked = True
        yield text
    if not marked:
        yield Text(f"  {'...'.rjust(room)}   ◀ max_length {facts.max_length:,}", "dim")


def _bar(share: float, width: int) -> str:
    """A bar in eighths of a column; something that is there has one eighth at least."""
    eighths = max(round(share * width * 8), 1 if share else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _counts(splits: Sequence[Facts]) -> RenderableType:
    table = Table(box=None, padding=(0, 2), pad_edge=False, show_header=len(splits) > 1)
    table.add_column("")
    for facts in splits:
        table.add_column(facts.split)
    columns = [counts(facts) for facts in splits]
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [Text(visible(column.get(name, "–")), overflow="fold") for column in columns]
        table.add_row(Text(name, style="dim"), *cells)
    return Padding(table, (0, 0, 0, 2))


def _finding(number: int, finding: Finding) -> RenderableType:
    head = Text().append(finding.level, STYLES.get(finding.level, "bold"))
    head.append(f" ({finding.split})" if finding.split != "training" else "", "dim")
    head.append(f" {visible(finding.what)}")
    mend = Text("mend: ", "bold").append(visible(finding.fix), "not bold")
    table = Table.grid(padding=(0, 1))
    table.add_row(Text(f"{number}."), Group(head, Text(visible(finding.why), "dim"), mend))
    return Padding(table, (0, 0, 0, 2))


def _verdict(found: Checked) -> Text:
    if found.error is not None:
        text = Text("\ncannot be trained on: ", STYLES["stop"])
        text.append(visible(f"{found.error.what} ({found.error.where})"), "not bold")
        return text.append(f"\n  fix: {found.error.fix}" if found.error.fix else "", "not bold")
    alarms = sum(finding.level == "alarm" for finding in found.findings)
    if alarms:
        return Text(
            f"\ncan be trained on, but {alarms} alarm{'s' if alarms > 1 else ''} first", STYLES["advice"]
        )
    return Text("\ncan be trained on", "bold green")
