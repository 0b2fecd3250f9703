"""What training rows pass through before they become tokens: odd rows, evaluation data, duplicates.

Nothing is left out that the configuration does not name; what is found is counted and told with its places.
The evaluation data is only looked at: what it measures stays what it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from graft.data.config import DataConfig
from graft.data.filters.content import Content
from graft.data.filters.duplicates import BATCH, Duplicates, Twin
from graft.data.filters.overlap import Overlap
from graft.data.filters.sanity import Sanity
from graft.data.report import MAX_PLACES, Report, num_rows
from graft.errors import DataError

T = TypeVar("T")

LOOKED_AT = 10_000
"""Rows of a source that are looked at where nothing is left out."""

_CHECKED = "all rows are looked at"

_TOLD = {
    "overlap": ("is also in the evaluation data", "are also in the evaluation data"),
    "duplicate": ("says what an earlier one says", "say what an earlier one says"),
    "near_duplicate": ("says nearly what an earlier one says", "say nearly what an earlier one says"),
}

_FIELD_OF = {
    "overlap": "overlap",
    "duplicate": "deduplicate",
    "near_duplicate": "deduplicate",
    "other_script": "scripts",
}
"""The field that leaves out rows for a reason; the others are values of `drop`."""


class PassOn(Protocol):
    """Passes rows on, or some of them."""

    def __call__(self, items: Iterable[T], content: Callable[[T], Content], report: Report) -> Iterator[T]:
        """See `Cleaning.keep`."""
        ...


class Cleaning:
    """The filters of one run; files that are mixed share them, so that duplicates are found across files.

    Args:
        config: What is left out.
        thorough: Whether all rows are looked at; else, where nothing is left out, only the first of each
            source, as it would take half as long again as the tokenizer.

    Attributes:
        compares: Whether all rows are compared with those before them and with the evaluation data.
        overlap: The evaluation data; None where there is none yet.
        seen: Split, name and digest of each source that went through: on them hangs what becomes of the next
            one. Evaluation rows and earlier training rows have not the same say.
        num_eval: Evaluation rows that were found in the training data.
    """

    def __init__(self, config: DataConfig, *, thorough: bool = False) -> None:
        self._config = config
        self.compares = thorough or (
            config.deduplicate != "no" or config.overlap != "tell" or config.overlap_by != "exact"
        )
        self._num_looked_at = None if self.compares or config.drop or config.scripts else LOOKED_AT
        self._duplicates = Duplicates(
            "near" if config.deduplicate == "near" else "exact", config.near_threshold
        )
        self.overlap: Overlap | None = None
        self.seen: list[str] = []
        self._thorough = thorough
        self.num_eval = 0
        self._passed_by: list[Callable[[], None]] = []

    def comparisons(self) -> list[list[str]]:
        """What the next source is compared with, as its kept tokens are named after it.

        A check that looks at all rows comes first: it tells more, and of the tokens it leaves out as many.
        """
        checked = [_CHECKED, *self.seen]
        return [checked] if self._thorough else [checked, self.seen]

    def pass_by(self, again: Callable[[], None], num_eval: int) -> None:
        """A source did not go through, its tokens being kept from an earlier run.

        Args:
            again: Sends its rows through, where a later source has to be compared with them.
            num_eval: What `num_eval` was after it then.
        """
        self._passed_by.append(again)
        self.num_eval = num_eval

    def catch_up(self) -> None:
        """Send through what was passed by."""
        passed_by, self._passed_by = self._passed_by, []
        for again in passed_by:
            again()

    def pass_on(self, split: str) -> PassOn:
        """What rows of a split go through: `keep` or `index`."""
        return self.keep if split == "train" else self.index

    def index(self, items: Iterable[T], content: Callable[[T], Content], report: Report) -> Iterator[T]:
        """Pass evaluation rows on and remember them; what is odd is told in the report.

        Args:
            items: The rows.
            content: What one says.
            report: Gets places and notes after the last row.
        """
        overlap = self.overlap = Overlap(self._config.overlap_by, self._config.near_threshold)
        sanity = Sanity(self._config.scripts)
        num_items = 0
        for batch in _batches(items):
            num_items += len(batch)
            if self._past(num_items):
                yield from batch
                continue
            contents = list(map(content, batch))
            overlap.add_contents(contents)
            sanity.look(contents)
            yield from batch
        report.notes += sanity.told()
        report.places |= {name: places for name, places in sanity.places.items() if places}

    def keep(self, items: Iterable[T], content: Callable[[T], Content], report: Report) -> Iterator[T]:
        """Pass on the training rows that stay.

        Args:
            items: The rows.
            content: What one says.
            report: Gets counts, places and notes after the last row.

        Raises:
            DataError: A row is in the evaluation data and that is an error; or no row stays.
        """
        sanity, found = Sanity(self._config.scripts), _Found()
        before = self._duplicates.num_contradictions, len(self._duplicates.contradictions)
        num_items = num_looked_at = num_kept = 0
        for batch in _batches(items):
            num_items += len(batch)
            past = self._past(num_items)
            stay = batch if past else self._stay(batch, list(map(content, batch)), sanity, found)
            num_looked_at = num_looked_at if past else num_items
            num_kept += len(stay)
            yield from stay
        if self.overlap is not None:
            self.num_eval = self.overlap.num_eval
        if num_looked_at < num_items:
            report.notes.append(
                f"only the first {num_looked_at:,} rows were looked at; graft data check looks at all"
            )
        self._tell(report, sanity, found)
        self._tell_contradictions(report, *before)
        if num_items and not num_kept and found.removed:
            told = ", ".join(f"{count:,} {name}" for name, count in found.removed.items())
            fields = {f"data.{_FIELD_OF.get(name, 'drop')}" for name in found.removed}
            raise DataError(
                f"no row is left after cleaning ({told})",
                where=report.path,
                fix=f"loosen {' or '.join(sorted(fields))}, or leave the file out",
            )

    def _past(self, num_items: int) -> bool:
        """Whether enough rows were looked at."""
        return self._num_looked_at is not None and num_items > self._num_looked_at

    def _stay(self, batch: list[T], contents: list[Content], sanity: Sanity, found: _Found) -> list[T]:
        config = self._config
        dropped = {*config.drop, *(["other_script"] if config.scripts else [])}
        rows = []
        for row, names in enumerate(sanity.look(contents)):
            odd = [name for name in names if name in dropped]
            if odd:
                found.removed[odd[0]] += 1
            else:
                rows.append(row)
        if self.overlap is not None:
            twins = self.overlap.twins([contents[row] for row in rows])
            rows = self._judge(rows, twins, contents, found, "overlap", drop=config.overlap == "drop")
        twins = self._duplicates.twins([contents[row] for row in rows])
        rows = self._judge(rows, twins, contents, found, "duplicate", drop=config.deduplicate != "no")
        return [batch[row] for row in rows]

    def _judge(
        self,
        rows: Sequence[int],
        twins: Sequence[Twin | None],
        contents: Sequence[Content],
        found: _Found,
        kind: str,
        *,
        drop: bool,
    ) -> list[int]:
        """Count rows that repeat others; those that stay.

        Raises:
            DataError: One is in the evaluation data and that is an error.
        """
        stay = []
        for row, twin in zip(rows, twins, strict=True):
            if twin is None:
                stay.append(row)
                continue
            where = contents[row].where
            if kind == "overlap" and self._config.overlap == "error":
                raise DataError(
                    f"the row is also in the evaluation data ({twin.where})",
                    where=where,
                    fix="remove it from one of them, or set data.overlap to drop",
                )
            name = "near_duplicate" if kind == "duplicate" and not twin.exact else kind
            found.count(name, f"{where} = {twin.where}")
            if drop:
                found.removed[name] += 1
            else:
                stay.append(row)
        return stay

    def _tell(self, report: Report, sanity: Sanity, found: _Found) -> None:
        config = self._config
        report.removed |= dict(found.removed)
        report.places |= found.places
        report.places |= {name: places for name, places in sanity.places.items() if places}
        report.notes += sanity.told({*config.drop, "other_script"})
        for name, (one, several) in _TOLD.items():
            if count := found.counts[name]:
                told = f"{num_rows(count)} {one if count == 1 else several}"
                done = "left out" if found.removed[name] else "not left out"
                report.notes.append(f"{told}: {done} (the first: {found.places[name][0]})")

    def _tell_contradictions(self, report: Report, num_before: int, num_places: int) -> None:
        if count := self._duplicates.num_contradictions - num_before:
            places = self._duplicates.contradictions[num_places:]
            report.places["contradiction"] = places
            first = f" (the first: {places[0]})" if places else ""
            have = "has" if count == 1 else "have"
            report.notes.append(
                f"{num_rows(count)} {have} the prompt of an earlier one and another answer{first}"
            )


class _Found:
    """Rows that repeat others, by kind; and those that were left out, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def count(self, kind: str, places: str) -> None:
        self.counts[kind] += 1
        kept = self.places.setdefault(kind, [])
        if len(kept) < MAX_PLACES:
            kept.append(places)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
