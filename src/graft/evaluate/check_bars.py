"""Figures, lengths and shares of a data check as bars that need no script, at any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graft.data.check.bins import bins, width_of
from graft.data.check.facts import Facts
from graft.evaluate.report import show

STYLES = ("run", "check")

BARS = 40
"""Bars of a distribution, at most."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The figures that are looked at first."""

    styles: ClassVar[tuple[str, ...]] = STYLES
    title: str
    facts: Facts
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        facts = self.facts
        tiles = [
            ("samples", show(facts.num_samples), f"of {facts.num_rows:,} rows", False),
            ("tokens", show(facts.num_tokens), f"longest {facts.longest:,}", False),
        ]
        if facts.kind == "class":
            tiles.append(("classes", show(len(facts.classes)), "", False))
        else:
            share = f"{100 * facts.labelled_share:.1f}<small>%</small>"
            tiles.append(("learned", share, f"{facts.num_labelled:,} tokens", facts.labelled_share < 0.01))
        cut = facts.num_truncated
        tiles.append(("truncated", show(cut), f"at {facts.max_length:,} tokens", cut * 20 > facts.num_used))
        tiles.append(("left out", show(facts.num_rejected), "rows", facts.num_rejected > 0))
        twice = facts.num_duplicates
        tiles.append(("duplicates", show(twice), "", twice * 100 > facts.num_units))
        if facts.packed is not None:
            steps = f"{facts.packed.num_rows:,} rows of an epoch"
            tiles.append(("steps", show(facts.packed.num_steps), steps, False))
            used = f"{100 * facts.packed.utilisation:.1f}<small>%</small>"
            packing = f"packing {'on' if facts.packed.packing else 'off'}"
            tiles.append(("places used", used, packing, facts.packed.utilisation < 0.6))
        return f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _tile(name: str, value: str, under: str, warn: bool) -> str:
    return (
        f'<div class="tile{" warn" if warn else ""}"><div class="name">{name}</div>'
        f'<div class="value">{value}</div><div class="under">{under}</div></div>'
    )


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How many samples have how many tokens, and how many of them they learn."""

    styles: ClassVar[tuple[str, ...]] = STYLES
    title: str
    facts: Facts
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        facts = self.facts
        near = facts.max_length <= 2 * facts.longest
        reach = facts.max_length if near else facts.longest
        width = width_of(reach, BARS)
        lengths, labelled = (bins(counts, width, reach) for counts in (facts.lengths, facts.labelled))
        learns = facts.kind != "class"
        most = max(bin.count for bin in (*lengths, *(labelled if learns else ())))
        bars = []
        for one, other in zip(lengths, labelled, strict=True):
            told = f"{one.begin:,} to {one.last:,} tokens: {one.count:,} samples"
            told += f"; {other.count:,} learn so many" if learns else ""
            second = f'<i class="two" style="height:{_percent(other.count, most)}"></i>' if learns else ""
            bars.append(
                f'<div title="{told}"><i style="height:{_percent(one.count, most)}"></i>{second}</div>'
            )
        end = lengths[-1].begin + width
        # Bars have one width each, so the line stands where its number is on their scale.
        line = (
            f'<span class="limit" style="left:{100 * min(facts.max_length / end, 1):.2f}%">'
            f"<b>max_length {facts.max_length:,}</b></span>"
            if near
            else ""
        )
        beyond = "" if near else f"; max_length {facts.max_length:,} lies far beyond"
        keys = '<span><i style="--key:var(--s7)"></i>all tokens of a sample</span>'
        keys += '<span><i style="--key:var(--s0)"></i>learned tokens of a sample</span>' if learns else ""
        return (
            f'<div class="keys">{keys}</div>'
            f'<div class="lengths"><div class="columns">{"".join(bars)}</div>{line}</div>'
            f'<div class="axis"><span>0</span><span>{end // 2:,}</span><span>{end:,} tokens</span></div>'
            f'<p class="note">Highest bar: {most:,} samples. Half of the samples have '
            f"{facts.length_at(0.5):,} tokens or fewer, 99 % {facts.length_at(0.99):,}, the longest "
            f"{facts.longest:,}{beyond}.</p>"
        )


def _percent(part: int, whole: int) -> str:
    """A height; what is there at all can be seen."""
    return f"{max(100 * part / whole, 1.5):.1f}%" if part and whole else "0"


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Of all token places of an epoch: what is learned, what is context, what is padding."""

    styles: ClassVar[tuple[str, ...]] = STYLES
    title: str
    splits: Sequence[Facts]
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        return "".join(map(_stack, self.splits))


def _stack(facts: Facts) -> str:
    used = facts.packed.utilisation if facts.packed is not None else 1.0
    learned = used * facts.labelled_share
    parts = {"learned": learned, "context": used - learned, "padding": 1 - used}
    if facts.kind == "class":
        parts = {"text": used, "padding": 1 - used}
    bars = "".join(
        f'<i class="{name}" style="width:{100 * share:.2f}%" title="{name}: {100 * share:.1f} %"></i>'
        for name, share in parts.items()
    )
    keys = "".join(
        f'<span><i class="{name}"></i>{name} {100 * share:.1f} %</span>' for name, share in parts.items()
    )
    whole = f'<div class="whole">{bars}</div><div class="keys">{keys}</div>'
    return f'<div class="stack"><h3>{facts.split}</h3>{whole}</div>'
