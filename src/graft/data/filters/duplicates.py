"""Examples that say what an earlier one says, or nearly: found while they stream by, in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from graft.data.examples import Example
from graft.data.filters.content import Content, content_of
from graft.data.filters.near_duplicates import NearIndex
from graft.data.filters.sorted_index import DigestIndex, Places, as_numbers
from graft.data.report import MAX_PLACES

BATCH = 2048
"""Examples at a time; more save nothing and hold more memory."""


class Twin(NamedTuple):
    """The row that an example repeats.

    Attributes:
        where: Its place.
        similarity: Jaccard similarity, 1.0 where they are equal.
        exact: Whether they are equal.
    """

    where: str
    similarity: float
    exact: bool


class Duplicates:
    """Remembers examples and finds those that repeat an earlier one.

    Equal are examples whose prompt, answer, roles and tools are the same in Unicode's composed form with
    white space of any length counted as one space. Near duplicates are alike to a threshold (see
    `near_duplicates`). An example that repeats another is not remembered: each is compared with the rows
    that stay.

    Args:
        kind: "exact", or "near" for near duplicates too.
        threshold: Jaccard similarity of near duplicates.

    Attributes:
        num_exact: Examples that are equal to an earlier one.
        num_near: Examples that are nearly so.
        num_contradictions: Examples that stay whose prompt an earlier one has too, with another answer.
        contradictions: The first thousand of these, "file:line = file:line" with the first row of that
            prompt.

    Cost: 20 microseconds and 90 bytes a row; for near duplicates 60 microseconds, and 550 bytes of a row of
        50 words.
    """

    def __init__(self, kind: Literal["exact", "near"], threshold: float = 0.8) -> None:
        self._near = NearIndex(threshold) if kind == "near" else None
        self._exact, self._places = DigestIndex(), Places()
        self._prompts, self._prompt_places = DigestIndex(), Places()
        self.num_exact = self.num_near = self.num_contradictions = 0
        self.contradictions: list[str] = []

    def find(self, example: Example) -> str | None:
        """The place of the row that an example repeats; None, and it is remembered, where there is none.

        Cost: 0.4 ms; `find_all` is far cheaper for many.
        """
        return self.find_all([example])[0]

    def find_all(self, examples: Sequence[Example]) -> list[str | None]:
        """The same for many examples, which may repeat each other."""
        return [twin.where if twin else None for twin in self.twins(list(map(content_of, examples)))]

    def twins(self, contents: Sequence[Content]) -> list[Twin | None]:
        """What each example repeats, or None, and it is remembered."""
        found: list[Twin | None] = []
        for begin in range(0, len(contents), BATCH):
            found += self._twins(contents[begin : begin + BATCH])
        return found

    def _twins(self, contents: Sequence[Content]) -> list[Twin | None]:
        found: list[Twin | None] = [None] * len(contents)
        digests = as_numbers([content.digest for content in contents])
        known = self._exact.find(digests).tolist()
        first: dict[bytes, int] = {}
        repeats: list[tuple[int, int]] = []  # of rows in this batch, which may turn out near duplicates
        for row, content in enumerate(contents):
            if known[row] >= 0:
                found[row] = Twin(self._places[known[row]], 1.0, exact=True)
            elif (earlier := first.setdefault(content.digest, row)) != row:
                repeats.append((row, earlier))
        different = list(first.values())
        self._find_near(contents, different, found)
        for row, earlier in repeats:
            found[row] = found[earlier] or Twin(contents[earlier].where, 1.0, exact=True)
        stay = [row for row in different if found[row] is None]
        self._exact.add(digests[stay])
        self._places.extend([contents[row].where for row in stay])
        self._compare_prompts([contents[row] for row in stay])
        self.num_exact += sum(twin is not None and twin.exact for twin in found)
        self.num_near += sum(twin is not None and not twin.exact for twin in found)
        return found

    def _find_near(self, contents: Sequence[Content], rows: list[int], found: list[Twin | None]) -> None:
        if self._near is None or not rows:
            return
        start = len(self._near)
        numbers, similarity = self._near.admit(self._near.sketch([contents[row] for row in rows]))
        stay = [row for row, number in zip(rows, numbers, strict=True) if number < 0]
        for row, number, alike in zip(rows, numbers.tolist(), similarity.tolist(), strict=True):
            if number >= 0:
                where = self._places[number] if number < start else contents[stay[number - start]].where
                found[row] = Twin(where, alike, exact=False)

    def _compare_prompts(self, contents: Sequence[Content]) -> None:
        asked = [content for content in contents if content.prompt_digest is not None]
        digests = as_numbers([content.prompt_digest or b"" for content in asked])
        known = self._prompts.find(digests).tolist()
        first: dict[bytes | None, int] = {}
        for row, content in enumerate(asked):
            earlier = row if known[row] >= 0 else first.setdefault(content.prompt_digest, row)
            if known[row] < 0 and earlier == row:
                continue
            self.num_contradictions += 1
            if len(self.contradictions) < MAX_PLACES:
                where = self._prompt_places[known[row]] if known[row] >= 0 else asked[earlier].where
                self.contradictions.append(f"{content.where} = {where}")
        fresh = np.fromiter(first.values(), dtype=np.int64, count=len(first))
        self._prompts.add(digests[fresh])
        self._prompt_places.extend([asked[row].where for row in fresh])
