"""What the model is trained on: token ids with a label for each token that is learned, cut to length.

`labels[i]` is `input_ids[i]` where that token is learned and -100 elsewhere. The first label is always -100:
nothing stands before it to predict it from, and samples packed into one row must not predict each other.
"""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100
"""The label of a token that is not learned."""

TRUNCATED = "cut at max_length, so that the end of the answer is missing"
SPLIT = "split into consecutive samples of max_length tokens, being plain text"
END_ADDED = "ended with the end-of-text token, because the chat template closes answers with no control token"
CONTROL_AS_TEXT = "spelling a control token, which was read as plain text"


@dataclass(frozen=True)
class Sample:
    """One document as the model sees it.

    Attributes:
        input_ids: Token ids.
        labels: As long as input_ids: the id where it is learned, -100 elsewhere.
        where: The row it came from.
        remarks: What was done to the row that the user should know, of the constants above.
    """

    input_ids: list[int]
    labels: list[int]
    where: str = ""
    remarks: tuple[str, ...] = ()


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
        learned: Ranges of tokens that are learned.
        remarks: As of a sample.
    """

    ids: list[int]
    learned: list[tuple[int, int]]
    remarks: tuple[str, ...] = ()

    def labels(self) -> list[int]:
        """The label of each token."""
        labels = [IGNORED] * len(self.ids)
        for begin, end in self.learned:
            labels[begin:end] = self.ids[begin:end]
        labels[0] = IGNORED
        return labels


def split(draft: Draft, where: str, max_length: int) -> list[Sample]:
    """Cut a plain text into consecutive samples that together have all its tokens.

    The last sample has at least two tokens where max_length allows it: one alone has nothing to learn.
    """
    ids, labels = draft.ids, draft.labels()
    if len(ids) <= max_length:
        return [Sample(ids, labels, where, draft.remarks)]
    cuts = [*range(0, len(ids), max_length), len(ids)]
    if cuts[-1] - cuts[-2] == 1 and max_length > 2:
        cuts[-2] -= 1
    remarks = (*draft.remarks, SPLIT)
    pieces = zip(cuts[:-1], cuts[1:], strict=True)
    return [Sample(ids[a:b], [IGNORED, *labels[a + 1 : b]], where, remarks) for a, b in pieces if b - a > 1]


def fit(draft: Draft, where: str, max_length: int, on_overlong: str) -> list[Sample] | Rejected:
    """Make one sample of an example, cutting its end away where it is too long and that is wanted."""
    ids, labels = draft.ids, draft.labels()
    if len(ids) <= max_length:
        return [Sample(ids, labels, where, draft.remarks)]
    if on_overlong != "truncate":
        reason = f"{len(ids):,} tokens, more than max_length {max_length:,}"
        return Rejected(
            where, reason, "raise data.max_length, or set data.on_overlong to drop", overlong=True
        )
    labels = labels[:max_length]
    if all(label == IGNORED for label in labels):
        reason = f"answer cut away by max_length {max_length:,}; the row has {len(ids):,} tokens"
        return Rejected(where, reason, "raise data.max_length", overlong=True)
    return [Sample(ids[:max_length], labels, where, (*draft.remarks, TRUNCATED))]
