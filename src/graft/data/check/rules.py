"""What to mend in data before it is trained on: the table of rules over the facts of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from graft.data.check import faults
from graft.data.check.facts import Facts
from graft.data.check.faults import TEMPLATED, Told

LEVELS = ("stop", "alarm", "advice", "note")
"""From what no run gets past to what is good to know."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about a split.

    Attributes:
        rule: Its name.
        level: Of `LEVELS`.
        split: "training" or "evaluation".
        what: What was found, with its number.
        why: Why it matters.
        fix: The setting or the command.
        places: The kind of places of `Facts` that show it, or "".
    """

    rule: str
    level: str
    split: str
    what: str
    why: str
    fix: str
    places: str = ""


@dataclass(frozen=True)
class Rule:
    """A fault that data can have.

    Attributes:
        name: What it is called in JSON.
        level: How bad it is.
        threshold: From where on it is told; what it counts is the rule's own.
        test: Tells of it, given the facts and the threshold.
        places: The kind of places that show it.
    """

    name: str
    level: str
    threshold: float
    test: Callable[[Facts, float], Told]
    places: str = ""


def find(splits: Sequence[Facts]) -> list[Finding]:
    """Everything that is to be told of the splits, the worst first."""
    told: set[tuple[str, str]] = set()
    found = []
    for finding in (finding for facts in splits for finding in _of(facts)):
        # What is so in both splits in the same words is told once.
        if (finding.rule, finding.what) not in told:
            found.append(finding)
        told.add((finding.rule, finding.what))
    names = [rule.name for rule in RULES]
    return sorted(found, key=lambda item: (LEVELS.index(item.level), names.index(item.rule)))


def _of(facts: Facts) -> Iterator[Finding]:
    for rule in RULES:
        if told := rule.test(facts, rule.threshold):
            yield Finding(rule.name, rule.level, facts.split, *told, places=rule.places)


RULES: tuple[Rule, ...] = (
    Rule("stops", "stop", 0, faults.stops, "rejected"),
    Rule("templated", "alarm", TEMPLATED, faults.templated, "control text"),
    Rule("begin_twice", "alarm", 0, faults.begin_twice, "begin token twice"),
    Rule("no_end", "alarm", 0.01, faults.no_end, "no end"),
    Rule("overlap", "alarm", 0, faults.overlap, "overlap"),
    Rule("little_learned", "alarm", 0.01, faults.little_learned),
    Rule("truncated", "alarm", 0.05, faults.truncated, "truncated"),
    Rule("class_cut", "advice", 0.05, faults.class_cut, "truncated"),
    Rule("unknown", "advice", 0, faults.unknown, "unknown"),
    Rule("no_begin", "advice", 0.01, faults.no_begin, "no begin token"),
    Rule("rejected", "advice", 0, faults.rejected, "rejected"),
    Rule("dropped", "advice", 0.01, faults.dropped, "rejected"),
    Rule("duplicates", "advice", 0.01, faults.duplicates, "duplicate"),
    Rule("near_duplicates", "advice", 0.05, faults.near, "near duplicate"),
    Rule("odd", "advice", 0.01, faults.odd),
    Rule("all_learned", "advice", 0.99, faults.all_learned),
    Rule("plain_rows", "advice", 0, faults.plain_rows),
    Rule("short_answers", "advice", 3, faults.short_answers),
    Rule("length_bias", "advice", 1.5, faults.length_bias),
    Rule("padding", "advice", 0.6, faults.padding),
    Rule("rare_class", "note", 20, faults.rare_class),
    Rule("control_text", "note", 0, faults.control_text, "control text"),
    Rule("no_template", "note", 0, faults.no_template),
    Rule("unused", "note", 0, faults.unused),
    Rule("far_too_long", "note", 8, faults.far_too_long),
    Rule("context", "note", 0, faults.context),
)
"""Every rule, the weightier first among those of a level; the third column is its threshold."""
