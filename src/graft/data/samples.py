"""What the model is trained on: token ids with a label for each token that is learned, cut to length.

`labels[i]` is `input_ids[i]` where that token is learned and -100 elsewhere. The first label is always -100:
nothing stands before it to predict it from, and samples packed into one row must not predict each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The label of a token that is not learned."""

TRUNCATED = "cut at max_length, so that the end of the answer is missing"
CUT_LEFT = "cut at max_length, so that the begin of the prompt is missing"
OLDER_CUT = "cut at max_length, so that the oldest messages are missing"
PARTED = "split into several conversations at max_length, each with the system message and whole exchanges"
SPLIT = "split into consecutive samples of max_length tokens, being plain text"
END_ADDED = "ended with the end-of-text token, because the chat template closes answers with no control token"
CONTROL_AS_TEXT = "spelling a control token, which was read as plain text"


Kind = Literal["text", "pair", "class"]
"""What samples are: texts, halves of preference pairs, texts with a class."""

Range = tuple[int, int]
"""Tokens from the first to before the second."""


class Sample:
    """One document as the model sees it.

    Args:
        input_ids: Token ids.
        labels: As long as input_ids: the id where it is learned, -100 elsewhere; a class number at the last
            token of a text with a class.
        where: The row it came from.
        remarks: What was done to the row that the user should know, of the constants above.

    Attributes:
        where: As given.
        remarks: As given.
    """

    __slots__ = ("_ids", "_labels", "_learned", "remarks", "where")

    def __init__(
        self,
        input_ids: Sequence[int],
        labels: Sequence[int],
        where: str = "",
        remarks: tuple[str, ...] = (),
    ) -> None:
        self._ids: Any = input_ids
        self._labels: Sequence[int] | None = labels
        self._learned: tuple[Range, ...] | None = None
        self.where = where
        self.remarks = remarks

    @classmethod
    def of(
        cls,
        ids: Sequence[int] | npt.NDArray[Any],
        learned: Iterable[Range],
        where: str = "",
        remarks: tuple[str, ...] = (),
    ) -> Sample:
        """A sample whose learned tokens are given as ascending ranges; the first token never is.

        Args:
            ids: Token ids, a list or an int32 array.
            learned: Which of them are learned.
            where: The row it came from.
            remarks: What was done to the row.
        """
        made = cls.__new__(cls)
        made._ids, made._labels = ids, None
        made._learned = tuple((begin or 1, end) for begin, end in learned if end > (begin or 1))
        made.where, made.remarks = where, remarks
        return made

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def input_ids(self) -> list[int]:
        """Token ids."""
        ids = self._ids
        return ids if type(ids) is list else [int(id) for id in ids]

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Token ids as an array."""
        return np.asarray(self._ids, dtype=np.int32)

    @property
    def learned(self) -> tuple[Range, ...]:
        """Ascending ranges of the tokens that have a label."""
        if self._learned is None:
            assert self._labels is not None
            found, begin = [], 0
            for ignored, run in groupby(self._labels, key=IGNORED.__eq__):
                end = begin + sum(1 for _ in run)
                if not ignored:
                    found.append((begin, end))
                begin = end
            self._learned = tuple(found)
        return self._learned

    @property
    def labels(self) -> list[int]:
        """As long as input_ids: the id where it is learned, -100 elsewhere."""
        if self._labels is not None:
            return self._labels if isinstance(self._labels, list) else list(self._labels)
        assert self._learned is not None
        ids, labels = self.input_ids, [IGNORED] * len(self._ids)
        for begin, end in self._learned:
            labels[begin:end] = ids[begin:end]
        return labels

    def labels_in(self, begin: int, end: int) -> Sequence[int]:
        """The labels of a range of learned tokens."""
        found: Sequence[int] = (self._ids if self._labels is None else self._labels)[begin:end]
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample):
            return NotImplemented
        mine, theirs = ((each.input_ids, each.labels, each.where, each.remarks) for each in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Sample({self.input_ids}, {self.labels}, {self.where!r}, {self.remarks})"


@dataclass(frozen=True)
class Rejected:
    """A row that gives no sample.

    Attributes:
        where: The row.
        reason: Why.
        fix: What to do about it.
        invalid: Whether the row itself is wrong.
        overlong: Whether it is left out only because it is too long.
    """

    where: str
    reason: str
    fix: str = "correct the row, or set data.skip_invalid"
    invalid: bool = False
    overlong: bool = False


@dataclass(frozen=True)
class Draft:
    """A whole example before it is cut to length.

    Attributes:
        ids: Token ids.
        learned: Ascending ranges of tokens that are learned.
        remarks: As of a sample.
        head: Tokens at the begin that a cut from the left keeps, of a prompt and completion.
        answer: Where the completion begins.
    """

    ids: list[int]
    learned: list[Range]
    remarks: tuple[str, ...] = ()
    head: int = 0
    answer: int = 0

    def sample(self, where: str, begin: int = 0, end: int | None = None, *remarks: str) -> Sample:
        """The sample of its tokens from `begin` to before `end`."""
        if not begin and end is None:
            return Sample.of(self.ids, self.learned, where, self.remarks)
        end = len(self.ids) if end is None else end
        learned = [
            (max(a, begin) - begin, min(b, end) - begin) for a, b in self.learned if a < end and b > begin
        ]
        return Sample.of(self.ids[begin:end], learned, where, (*self.remarks, *remarks))


def split(draft: Draft, where: str, max_length: int) -> list[Sample]:
    """Cut a plain text into consecutive samples that together have all its tokens.

    The last sample has at least two tokens where max_length allows it: one alone has nothing to learn.
    """
    size = len(draft.ids)
    if size <= max_length:
        return [draft.sample(where)]
    cuts = [*range(0, size, max_length), size]
    if cuts[-1] - cuts[-2] == 1 and max_length > 2:
        cuts[-2] -= 1
    pieces = zip(cuts[:-1], cuts[1:], strict=True)
    return [draft.sample(where, a, b, SPLIT) for a, b in pieces if b - a > 1]


def fit(draft: Draft, where: str, max_length: int, on_overlong: str) -> list[Sample] | Rejected:
    """Make one sample of an example, cutting it where it is too long and that is wanted.

    "truncate" cuts the end away, "truncate_left" the begin of the prompt, as far as it leaves the answer
    whole and at least one token before it; whatever else is too long is rejected.
    """
    size = len(draft.ids)
    if size <= max_length:
        return [draft.sample(where)]
    if on_overlong == "truncate":
        cut = draft.sample(where, 0, max_length, TRUNCATED)
        if cut.learned:
            return [cut]
        reason = f"answer cut away by max_length {max_length:,}; the row has {size:,} tokens"
        return Rejected(where, reason, "raise data.max_length", overlong=True)
    if on_overlong == "truncate_left":
        return _fit_left(draft, where, max_length)
    reason = f"{size:,} tokens, more than max_length {max_length:,}"
    if on_overlong == "split":
        reason += ", and a prompt with its completion cannot be split"
    return Rejected(where, reason, "raise data.max_length, or set data.on_overlong to drop", overlong=True)


def _fit_left(draft: Draft, where: str, max_length: int) -> list[Sample] | Rejected:
    head, excess, answer = draft.head, len(draft.ids) - max_length, draft.answer
    if head + excess > answer or (head == 0 and excess == answer):
        reason = f"the answer has {len(draft.ids) - answer:,} tokens, too many for max_length {max_length:,}"
        return Rejected(where, reason, "raise data.max_length", overlong=True)
    return [without(draft, head, excess).sample(where)]


def without(draft: Draft, begin: int, count: int) -> Draft:
    """A draft without `count` of its tokens from `begin` on."""
    moved = [
        tuple(place if place <= begin else max(begin, place - count) for place in each)
        for each in draft.learned
    ]
    ids = [*draft.ids[:begin], *draft.ids[begin + count :]]
    return Draft(ids, [(a, b) for a, b in moved], (*draft.remarks, CUT_LEFT), draft.head)
