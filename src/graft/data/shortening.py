"""Conversations that are longer than a sample may be: without their oldest part, or as several.

A conversation is parted only where a user begins to speak: system messages, then exchanges, each from a
question to before the next. Every part is a conversation of its own, with the system messages at its head,
and is rendered and encoded as such; so it is what a model would meet, whatever the template writes at a
begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from graft.data.examples import Conversation
from graft.data.samples import OLDER_CUT, PARTED, Draft, Rejected, Sample

_HEAD = ("system", "developer")

Drafts = Callable[[Sequence[Conversation]], "list[Draft | Rejected]"]
Cut = Callable[[Conversation, int, int], "Draft | None"]


@dataclass(frozen=True)
class Shortener:
    """Makes conversations fit.

    Attributes:
        drafts: Encodes conversations, whole.
        cut: Encodes one without the begin of one of its messages, such that it has a number of tokens at
            most; None where that message is too short for it.
        max_length: Most tokens of a sample.
    """

    drafts: Drafts
    cut: Cut
    max_length: int

    def newest(self, conversation: Conversation) -> list[Sample] | Rejected:
        """The end of a conversation: as many whole exchanges as fit, the oldest being left out.

        Where the last one is too long by itself, the begin of its question is cut away; answers stay whole.
        """
        head, starts = exchanges(conversation)
        last = self._last_learned(conversation, starts)
        sizes = self._sizes(conversation, head, starts)
        begin = last
        while begin > 0 and sum(sizes[begin - 1 :]) <= self.max_length:
            begin -= 1
        size = 0
        for first in range(begin, last + 1):
            part = part_of(conversation, head, starts[first], len(conversation.messages))
            draft = self.drafts([part])[0]
            if isinstance(draft, Rejected):
                return draft
            size = len(draft.ids)
            if size <= self.max_length:
                remarks = (OLDER_CUT,) if first else ()
                return [draft.sample(conversation.where, 0, size, *remarks)]
        shorter = self.cut(part, head, self.max_length)
        if shorter is not None:
            return [shorter.sample(conversation.where)]
        reason = f"the last exchange has {size:,} tokens, too many for max_length {self.max_length:,}"
        return Rejected(conversation.where, reason, "raise data.max_length", overlong=True)

    def parts(self, conversation: Conversation) -> list[Sample] | Rejected:
        """The whole conversation as several samples, each of as many whole exchanges as fit.

        An exchange that is too long by itself is left out; where all are, the row is rejected.
        """
        head, starts = exchanges(conversation)
        sizes = self._sizes(conversation, head, starts)
        ends = [*starts[1:], len(conversation.messages)]
        samples: list[Sample] = []
        first = 0
        while first < len(starts):
            count = 1
            while first + count < len(starts) and sum(sizes[first : first + count + 1]) <= self.max_length:
                count += 1
            draft: Draft | Rejected | None = None
            while count:
                part = part_of(conversation, head, starts[first], ends[first + count - 1])
                draft = self.drafts([part])[0]
                if isinstance(draft, Rejected) or len(draft.ids) <= self.max_length:
                    break
                count -= 1
            if isinstance(draft, Rejected) and draft.invalid:
                return draft
            if count and isinstance(draft, Draft):
                samples.append(draft.sample(conversation.where, 0, len(draft.ids), PARTED))
            first += max(count, 1)
        if samples:
            return samples
        reason = f"no exchange fits into max_length {self.max_length:,}"
        return Rejected(conversation.where, reason, "raise data.max_length", overlong=True)

    def _sizes(self, conversation: Conversation, head: int, starts: Sequence[int]) -> list[int]:
        """Tokens of each exchange, about: what they have in common counts for the first alone."""
        ends = [*starts[1:], len(conversation.messages)]
        parts = [part_of(conversation, head, a, b) for a, b in zip(starts, ends, strict=True)]
        drafts = self.drafts([replace(part, flags={}, trained_from=0) for part in parts])
        ids = [draft.ids if isinstance(draft, Draft) else [] for draft in drafts]
        written = [each for each in ids if each]
        common = 0
        if len(written) > 1:
            pairs = zip(written[0], written[1], strict=False)
            common = next((at for at, (a, b) in enumerate(pairs) if a != b), min(map(len, written[:2])))
        return [len(each) - common for each in ids]

    def _last_learned(self, conversation: Conversation, starts: Sequence[int]) -> int:
        answers = [
            index
            for index, message in enumerate(conversation.messages)
            if str(message["role"]).startswith("assistant") and conversation.flags.get(index, True)
        ]
        place = answers[-1] if answers else len(conversation.messages) - 1
        return max((number for number, start in enumerate(starts) if start <= place), default=0)


def exchanges(conversation: Conversation) -> tuple[int, list[int]]:
    """How many system messages a conversation begins with, and where each exchange begins."""
    messages = conversation.messages
    head = next((i for i, message in enumerate(messages) if message["role"] not in _HEAD), len(messages))
    starts = [
        i
        for i in range(head, len(messages))
        if i == head or (messages[i]["role"] == "user" and messages[i - 1]["role"] != "user")
    ]
    return head, starts


def part_of(conversation: Conversation, head: int, begin: int, end: int) -> Conversation:
    """The system messages and the messages from `begin` to before `end`, as a conversation."""
    kept = [*range(head), *range(begin, end)]
    return replace(
        conversation,
        messages=[conversation.messages[index] for index in kept],
        trained_from=sum(index < conversation.trained_from for index in kept),
        flags={new: conversation.flags[old] for new, old in enumerate(kept) if old in conversation.flags},
    )
