"""What the page of a data check draws: samples token by token, places of problems, rows; bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from graft.data.check.counts import KINDS
from graft.data.check.facts import Facts
from graft.data.check.rows import row_of
from graft.data.check.samples import Shown, show
from graft.data.masking import Encoder
from graft.data.prepare import Dataset

MOST_TOKENS = 100_000
"""Tokens in a page."""
MOST_CHARACTERS = 400_000
"""Characters of raw rows in a page."""
OF_A_CHOICE, OF_A_PROBLEM = 600, 300
"""Tokens of a sample that was chosen for a look, and of one at a place; of more the middle is left out."""
WHOLE_ROWS = 4
"""Rows whose samples can be read."""
_SOON = 10
"""Places of each kind that come before the rows."""


def page_data(splits: Sequence[Facts], datasets: Sequence[Dataset], encoder: Encoder) -> dict[str, Any]:
    """The data of the page.

    Args:
        splits: The facts of each split.
        datasets: The same data.
        encoder: What made the samples.
    """
    share = len(splits)
    return {
        "splits": [
            _split(facts, data, encoder, MOST_TOKENS // share, MOST_CHARACTERS // share)
            for facts, data in zip(splits, datasets, strict=True)
        ]
    }


def _split(facts: Facts, data: Dataset, encoder: Encoder, tokens: int, characters: int) -> dict[str, Any]:
    samples: dict[int, dict[str, Any]] = {}
    for index, most in _wanted(facts):
        if index in samples or tokens <= 0:
            continue
        shown = show(
            index,
            data.samples[index],
            encoder,
            kind=facts.kind,
            labels=data.labels,
            most=min(most, max(tokens, 2)),
        )
        tokens -= len(shown.ids)
        samples[index] = _sample(shown)
    first = facts.packed.first if facts.packed is not None else ()
    return {
        "name": facts.split,
        "rowTokens": facts.packed.row_tokens if facts.packed is not None else facts.max_length,
        "packing": facts.packed is not None and facts.packed.packing,
        "samples": samples,
        "choices": [{"name": name, "items": list(items)} for name, items in facts.chosen.items()],
        "rows": [[[index, len(data.samples[index])] for index in row] for row in first],
        "problems": [*_problems(facts, characters)],
    }


def _wanted(facts: Facts) -> Iterator[tuple[int, int]]:
    """Samples in the order of their worth, with the most tokens to show of each."""
    for items in facts.chosen.values():
        yield from ((index, OF_A_CHOICE) for index in items)
    places = [[p.index for p in found if p.index is not None] for found in facts.places.values()]
    for indexes in places:
        yield from ((index, OF_A_PROBLEM) for index in indexes[:_SOON])
    rows = facts.packed.first[:WHOLE_ROWS] if facts.packed is not None else ()
    for row in rows:
        yield from ((index, OF_A_CHOICE) for index in row)
    for indexes in places:
        yield from ((index, OF_A_PROBLEM) for index in indexes[_SOON:])


def _sample(shown: Shown) -> dict[str, Any]:
    return {
        "where": shown.where,
        "tokens": shown.num_tokens,
        "learned": shown.num_labelled,
        "gap": shown.gap,
        "note": shown.note,
        "ids": list(shown.ids),
        "pieces": list(shown.pieces),
        "flags": "".join(map(str, shown.flags)),
    }


def _problems(facts: Facts, characters: int) -> Iterator[dict[str, Any]]:
    totals = {
        "rejected": facts.num_rejected,
        "truncated": facts.num_truncated,
        "duplicate": facts.num_duplicates,
        "near duplicate": facts.num_near or 0,
        "overlap": facts.num_overlap,
        "no end": facts.num_without_end,
        "begin token twice": facts.num_bos_twice,
        "no begin token": facts.num_bos_missing,
        "control text": facts.num_control_text,
    }
    raw: dict[str, str] = {}
    for kind, name in KINDS.items():
        found = facts.places.get(kind, ())
        places = []
        for place in found:
            row = row_of(place.where)
            if row not in raw and row in facts.raw and characters > 0:
                raw[row] = facts.raw[row][:characters]
                characters -= len(raw[row])
            places.append(
                {"where": place.where, "told": place.told, "index": place.index, "raw": raw.get(row, "")}
            )
        if places:
            yield {"kind": kind, "name": name, "total": totals.get(kind, len(places)), "places": places}
