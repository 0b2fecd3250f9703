"""The counts of a split as names and values, in the words that a terminal and a page share."""

from __future__ import annotations

from collections.abc import Iterator

from graft.data.check.facts import Facts
from graft.data.filters.findings import FINDINGS

NAMED = 3
"""First places that are named beside a count."""


def share(part: int, whole: int) -> str:
    """A count with its share: "12 (3.4 %)"."""
    if not part or not whole:
        return f"{part:,}"
    value = 100 * part / whole
    return f"{part:,} ({'under 0.1' if value < 0.1 else f'{value:.1f}'.removesuffix('.0')} %)"


def heading(facts: Facts) -> dict[str, str]:
    """What the file is and how it is read."""
    told = {
        "file": facts.path,
        "format": f"{facts.format} ({facts.reason})" if facts.reason else facts.format,
    }
    if facts.template:
        told["template"] = facts.template
    elif facts.has_template:
        told["template"] = "none acts on these rows; the tokenizer has one"
    else:
        told["template"] = "none; the tokenizer has none"
    noun = "row" if facts.num_rows == 1 else "rows"
    removed = "".join(f" + {count:,} {name.replace('_', ' ')}" for name, count in facts.removed)
    told["rows"] = (
        f"{facts.num_rows:,} {noun} read = {facts.num_used:,} used + {facts.num_rejected:,} left out{removed}"
    )
    if facts.classes:
        shown = ", ".join(f"{name} {count:,}" for name, count in facts.classes[:8])
        told["classes"] = f"{len(facts.classes):,}: {shown}{', ...' if len(facts.classes) > 8 else ''}"
    return told


def counts(facts: Facts) -> dict[str, str]:
    """Names and values, in an order that both splits of a run have."""
    return dict([*_sizes(facts), *_problems(facts), *_tokens(facts), *_rows(facts)])


def _sizes(facts: Facts) -> Iterator[tuple[str, str]]:
    pairs = f" in {facts.num_units:,} pairs" if facts.kind == "pair" else ""
    yield "samples", f"{facts.num_samples:,}{pairs}"
    yield "tokens", f"{facts.num_tokens:,}"
    if facts.kind != "class":
        yield "learned tokens", share(facts.num_labelled, facts.num_tokens)
    lengths = " / ".join(f"{facts.length_at(at):,}" for at in (0.5, 0.99, 1.0))
    yield "tokens of a sample: median / 99 % / most", lengths
    if facts.kind != "class":
        learned = " / ".join(f"{facts.labelled_at(at):,}" for at in (0.5, 0.99, 1.0))
        yield "learned of a sample: median / 99 % / most", learned
    if facts.preferred:
        yield "learned, median: chosen / rejected", " / ".join(f"{number:,}" for number in facts.preferred)


def _problems(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "rows left out", share(facts.num_rejected, facts.num_rows)
    yield "... for their length", share(facts.num_dropped, facts.num_rows)
    yield "rows truncated", share(facts.num_truncated, facts.num_used)
    if facts.format == "text" or facts.num_split:
        yield "rows split", share(facts.num_split, facts.num_used)
    yield "duplicates", share(facts.num_duplicates, facts.num_units)
    if facts.num_near is not None:
        yield "near duplicates", share(facts.num_near, facts.num_units)
    if facts.split == "evaluation":
        yield "also in the training data", share(facts.num_overlap, facts.num_units)


def _tokens(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.kind != "class":
        yield "samples without a learned end token", share(facts.num_without_end, facts.num_samples)
    twice, missing = facts.num_bos_twice, facts.num_bos_missing
    yield (
        "begin token: twice / missing",
        f"{share(twice, facts.num_samples)} / {share(missing, facts.num_samples)}",
    )
    yield "samples that spell a control token", share(facts.num_control_text, facts.num_samples)
    lost = share(facts.num_unknown, facts.num_tokens)
    yield "unknown tokens", f"{lost}: {facts.unknown}" if facts.unknown else lost


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.packed is None:
        return
    packed = facts.packed
    yield "packing", "on" if packed.packing else "off"
    yield "token places that are used", f"{100 * packed.utilisation:.1f} %"
    yield "rows of an epoch", f"{packed.num_rows:,} of up to {packed.row_tokens:,} tokens"
    yield ("steps of an epoch" if facts.split == "training" else "batches"), f"{packed.num_steps:,}"


KINDS: dict[str, str] = {
    "rejected": "left out",
    "truncated": "truncated",
    "duplicate": "duplicates",
    "near duplicate": "near duplicates",
    "overlap": "in the training and the evaluation data",
    "no end": "no end token is learned",
    "begin token twice": "two begin tokens",
    "no begin token": "no begin token",
    "control text": "spell a control token",
    "unknown": "unknown tokens",
    "contradiction": "the prompt of an earlier row, another answer",
    **FINDINGS,
}
"""Kinds of places, in the order in which they are shown, and what they are called."""


def first_places(facts: Facts) -> dict[str, str]:
    """The first places of each kind of problem, by its name."""
    found = {}
    for kind, name in KINDS.items():
        if places := facts.places.get(kind):
            named = [place.where.rpartition("/")[2] for place in places[:NAMED]]
            found[name] = f"{', '.join(named)}{', ...' if len(places) > NAMED else ''}"
    return found
