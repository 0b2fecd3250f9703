"""What a model will really see of a data set, from one pass over its samples: `graft data check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from graft.data.check.facts import Facts, Packed, Place
from graft.data.check.rows import Reread, reread, row_of
from graft.data.check.tally import MOST_CHOSEN, MOST_PLACES, Progress, Tally
from graft.data.config import DataConfig
from graft.data.filters.findings import FINDINGS
from graft.data.formats import CHAT_FORMATS
from graft.data.loader import Loader
from graft.data.masking import Encoder
from graft.data.prepare import Dataset
from graft.data.report import Report
from graft.data.samples import Kind

UNKNOWN_NOTE = "characters that the tokenizer does not know: "
"""How a report begins to tell of them."""
TOLD = {"duplicate": "duplicate", "near_duplicate": "near duplicate", "contradiction": "contradiction"}
TOLD |= {"overlap": "overlap", **{name: name for name in FINDINGS}}
"""Kinds of places of a report, and their names here."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which split is looked at, and in what run.

    Attributes:
        name: "training" or "evaluation".
        kind: What the samples are.
        against: The training data, for what evaluation data has in common with it.
        accumulation: Batches of a step.
        asked_max_length: Before the model's context cut it.
        context: Tokens that the model can see, None where nothing bounds them.
        error: Why the run stops at a row of this file; "" where it does not.
        error_fix: What to do about it.
    """

    name: str
    kind: Kind = "text"
    against: Dataset | None = None
    accumulation: int = 1
    asked_max_length: int | None = None
    context: int | None = None
    error: str = ""
    error_fix: str = ""


def examine(
    dataset: Dataset,
    loader: Loader,
    encoder: Encoder,
    config: DataConfig,
    split: Split,
    progress: Progress | None = None,
) -> Facts:
    """The facts of one split, as a run with this configuration would see it.

    Args:
        dataset: What `prepare_splits` gave.
        loader: Of these samples, as the run would make it.
        encoder: What made the samples.
        config: What they were made with.
        split: Which one it is.
        progress: Told how many samples of how many are done.

    Raises:
        StorageError: The file cannot be read once more.

    Cost: one pass over the samples with 8 bytes for each, one more over the rows as far as the last place
        that is shown, 2,000 rows at least.
    """
    report, kind = dataset.report, split.kind
    places = _told_places(report, split)
    wanted = {place.where for found in places.values() for place in found}
    tally = Tally(encoder, kind, report.path, wanted, progress)
    tally.add_all(dataset.samples)
    places = {name: tuple(_indexed(place, tally, kind) for place in found) for name, found in places.items()}
    places |= {name: tuple(found) for name, found in tally.places.items()}
    too_long = {row_of(where) for where in report.places.get("dropped", ())}
    again = reread(
        sources_of(config, split.name),
        config,
        encoder,
        kind,
        raw={place.where for found in places.values() for place in found},
        measured=tally.truncated | too_long,
    )
    return Facts(
        split=split.name,
        path=report.path,
        kind=kind,
        **_told(dataset, encoder, config, report.format),
        **tally.counts(),
        **_counted_again(again),
        asked_max_length=split.asked_max_length or config.max_length,
        context=split.context,
        packed=_packed(loader, config, 2 if kind == "pair" else 1, split.accumulation),
        places=places,
        chosen=tally.chosen(),
        error=split.error,
        error_fix=split.error_fix,
    )


def sources_of(config: DataConfig, split: str) -> list[tuple[str, str]]:
    """The files of a split, each with the split that is read from it."""
    if split == "evaluation" and config.eval is not None:
        return [(config.eval, "eval")]
    return [(path, "train") for path in (config.mix or [str(config.train)])]


def _told_places(report: Report, split: Split) -> dict[str, tuple[Place, ...]]:
    """The first places of the kinds that a report tells of."""
    found = {"rejected": tuple(Place(where, why) for where, why in report.rejected[:MOST_PLACES])}
    for kind, name in TOLD.items():
        pairs = [pair.partition(" = ") for pair in report.places.get(kind, ())[:MOST_PLACES]]
        found[name] = tuple(Place(where, _like(other) if other else name) for where, _, other in pairs)
    if split.name == "evaluation" and split.against is not None:
        pairs = [pair.partition(" = ") for pair in split.against.report.places.get("overlap", ())]
        earlier: dict[str, str] = {}
        for other, _, where in pairs:
            earlier.setdefault(where, other)
        found["overlap"] = tuple(
            Place(where, _like(other)) for where, other in [*earlier.items()][:MOST_PLACES]
        )
    return {name: places for name, places in found.items() if places}


def _like(where: str) -> str:
    return f"as {where.rpartition('/')[2]}"


def _indexed(place: Place, tally: Tally, kind: Kind) -> Place:
    """A place with its sample, where it is certain which that is: rows of one line have one place."""
    indexes = tally.indexes[place.where]
    one = len(indexes) == (2 if kind == "pair" else 1)
    return replace(place, index=indexes[0]) if one else place


def _told(dataset: Dataset, encoder: Encoder, config: DataConfig, format: str) -> dict[str, Any]:
    """What the report says."""
    report = dataset.report
    templated = format in CHAT_FORMATS and encoder.has_template
    unknown = next((note for note in report.notes if note.startswith(UNKNOWN_NOTE)), "")
    counts = Counter(sample.labels[-1] for sample in dataset.samples) if dataset.labels else Counter()
    return {
        "format": report.format,
        "reason": report.reason,
        "template": (config.chat_template or "the tokenizer's own") if templated else "",
        "has_template": encoder.has_template,
        "loss_on": config.loss_on,
        "on_overlong": config.on_overlong,
        "max_length": config.max_length,
        "num_rows": report.num_rows,
        "num_used": report.num_used,
        "num_rejected": report.num_rejected,
        "num_dropped": report.num_dropped,
        "removed": tuple(report.removed.items()),
        "odd": tuple((name, len(report.places[name])) for name in FINDINGS if report.places.get(name)),
        "num_truncated": report.num_truncated,
        "num_split": report.num_split,
        "num_duplicates": report.num_duplicates,
        "num_near": _near(report, config),
        "num_overlap": report.num_overlap,
        "unknown": unknown.removeprefix(UNKNOWN_NOTE),
        "classes": tuple((name, counts[number]) for number, name in enumerate(dataset.labels)),
        "notes": tuple(report.notes),
    }


def _near(report: Report, config: DataConfig) -> int | None:
    """Near duplicates that stayed; None where nothing looked for them."""
    if config.deduplicate != "near":
        return None
    return max(len(report.places.get("near_duplicate", ())) - report.removed.get("near_duplicate", 0), 0)


def _counted_again(again: Reread) -> dict[str, Any]:
    return {
        "raw": again.raw,
        "needed": again.needed,
        "num_looked_at": again.num_looked_at,
        "num_templated": again.num_templated,
        "unused": again.unused,
    }


def _packed(loader: Loader, config: DataConfig, size: int, accumulation: int) -> Packed:
    rows = loader.rows(0)
    return Packed(
        num_rows=len(rows),
        num_steps=-(-loader.num_batches() // accumulation),
        utilisation=loader.utilisation(),
        packing=config.packing,
        first=tuple(tuple(map(int, row)) for row in rows[:MOST_CHOSEN]),
        row_tokens=config.max_length * (size if config.packing else 1),
    )
