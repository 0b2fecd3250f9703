"""What a model will really see of a data set, from one pass over its samples: `graft data check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from graft.data.check_facts import Facts, Packed, Place
from graft.data.check_rows import Reread, reread, row_of
from graft.data.check_tally import MOST_CHOSEN, MOST_MEASURED, MOST_PLACES, Progress, Tally, equal_places
from graft.data.config import DataConfig
from graft.data.formats import CHAT_FORMATS
from graft.data.loader import Kind, Loader
from graft.data.masking import Encoder
from graft.data.prepare import Dataset

UNKNOWN_NOTE = "characters that the tokenizer does not know: "
"""How a report begins to tell of them."""
OVERLONG = "max_length"
"""What stands in the reason of every row that is left out for its length."""


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
    """

    name: str
    kind: Kind = "text"
    against: Dataset | None = None
    accumulation: int = 1
    asked_max_length: int | None = None
    context: int | None = None
    error: str = ""


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
        that is shown, 2,000 rows at least; and once more the samples where equal ones are looked for.
    """
    report, kind = dataset.report, split.kind
    tally = Tally(encoder, kind, report.path, progress)
    tally.add_all(dataset.samples)
    places = _places(dataset, tally, split)
    too_long = {row_of(where) for where, why in report.rejected[:MOST_MEASURED] if OVERLONG in why}
    again = reread(
        report.path,
        "train" if split.name == "training" else "eval",
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
        **_told(dataset, encoder, config, report.format in CHAT_FORMATS and encoder.has_template),
        **tally.counts(),
        **_counted_again(again),
        asked_max_length=split.asked_max_length or config.max_length,
        context=split.context,
        packed=_packed(loader, config, 2 if kind == "pair" else 1, split.accumulation),
        places=places,
        chosen=tally.chosen(),
        error=split.error,
    )


def _places(dataset: Dataset, tally: Tally, split: Split) -> dict[str, tuple[Place, ...]]:
    """The first places of each kind of problem that there is."""
    report, size = dataset.report, 2 if split.kind == "pair" else 1
    places = {"rejected": tuple(Place(where, why) for where, why in report.rejected[:MOST_PLACES])}
    places |= {name: tuple(found) for name, found in tally.places.items()}
    if report.num_duplicates:
        places["duplicate"] = equal_places(dataset.samples, size=size)
    if report.num_overlap and split.against is not None:
        places["overlap"] = equal_places(dataset.samples, split.against.samples, size=size)
    return {name: found for name, found in places.items() if found}


def _told(dataset: Dataset, encoder: Encoder, config: DataConfig, templated: bool) -> dict[str, Any]:
    """What the report says."""
    report = dataset.report
    unknown = next((note for note in report.notes if note.startswith(UNKNOWN_NOTE)), "")
    counts = Counter(sample.labels[-1] for sample in dataset.samples) if dataset.labels else Counter()
    num_rejected = getattr(report, "num_rejected", len(report.rejected))
    return {
        "format": report.format,
        "reason": report.reason,
        "template": (config.chat_template or "the tokenizer's own") if templated else "",
        "has_template": encoder.has_template,
        "loss_on": config.loss_on,
        "on_overlong": config.on_overlong,
        "max_length": config.max_length,
        "num_rows": report.num_rows,
        "num_used": report.num_rows - num_rejected,
        "num_rejected": num_rejected,
        "num_dropped": sum(OVERLONG in why for _, why in report.rejected),
        "num_truncated": report.num_truncated,
        "num_split": report.num_split,
        "num_duplicates": report.num_duplicates,
        "num_near": getattr(report, "num_near_duplicates", None),
        "num_overlap": report.num_overlap,
        "unknown": unknown.removeprefix(UNKNOWN_NOTE),
        "classes": tuple((name, counts[number]) for number, name in enumerate(dataset.labels)),
        "notes": tuple(report.notes),
    }


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
