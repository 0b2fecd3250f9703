"""Examples to samples: token ids, and a label for each token that is learned.

`labels[i]` is `input_ids[i]` where that token is learned and -100 elsewhere; the first label is always -100,
because nothing stands before it to predict it from, and because samples packed into one row must not predict
each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, Literal

from graft.data.formats import Conversation, Example, Message, Pair, Text
from graft.data.templates import ChatTemplate, Rendered
from graft.data.tokens import TextEncoder, private_character
from graft.errors import DataError

IGNORED = -100
"""The label of a token that is not learned."""

LossOn = Literal["auto", "completion", "all"]
_BATCH = 512


@dataclass(frozen=True)
class Sample:
    """One document as the model sees it.

    Attributes:
        input_ids: Token ids.
        labels: As long as input_ids: the id where it is learned, -100 elsewhere.
        where: The row it came from.
        truncated: Whether its end was cut away.
    """

    input_ids: list[int]
    labels: list[int]
    where: str = ""
    truncated: bool = False


@dataclass(frozen=True)
class Rejected:
    """A row that gives no sample.

    Attributes:
        where: The row.
        reason: Why.
        invalid: Whether the row itself is wrong.
        overlong: Whether it is left out only because it is too long.
    """

    where: str
    reason: str
    invalid: bool = False
    overlong: bool = False


@dataclass(frozen=True)
class _Draft:
    """Ids of a whole example, with the ranges of tokens that are learned."""

    ids: list[int]
    learned: list[tuple[int, int]]


class Encoder:
    """Turns examples into samples, and prompts into exactly the ids that begin such a sample.

    Args:
        tokenizer: A fast tokenizer of transformers.
        chat_template: Text of a template to use instead of the tokenizer's.
        loss_on: "completion" learns completions and answers, "all" every token; "auto" is completion
            where there is one and all for plain texts.

    Raises:
        DataError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None, loss_on: LossOn = "auto") -> None:
        self.tokenizer = tokenizer
        self.text = TextEncoder(tokenizer)
        self._source = chat_template
        self._loss_on = loss_on
        self._template: ChatTemplate | None = None

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self._source or self.tokenizer.chat_template)

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: There is none.
        """
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self._source)
        return self._template

    def prompt(self, prompt: str | Sequence[Message], tools: Any = None) -> list[int]:
        """The ids to generate from: a plain prompt, or messages that ask for an answer.

        They are the ids that a training sample with the same beginning has before its first learned token.

        Raises:
            DataError: The template refuses the messages, or there is none.
        """
        if isinstance(prompt, str):
            return [*self.text.bos_ids, *self.text.ids(prompt)]
        messages, tools = self.text.quote_controls([list(prompt), tools])
        text = self.template.render(messages, tools, ask=True)
        edges = (
            self.template.find_turns(Conversation(messages, "", tools)).prompts
            if _has_answer(messages)
            else []
        )
        marked = self._marked(Rendered(text, [], [edge for edge in edges if edge < len(text)]))
        return encode_apart(self.text, [(marked.text, marked.prompts)])[0].ids

    def end_of_turn_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and what the template closes a turn with."""
        ends = [] if self.text.eos_id is None else [self.text.eos_id]
        if self.has_template:
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            draft = self._drafts([Conversation(messages, "")])[0]
            if isinstance(draft, _Draft) and draft.learned:
                last = draft.ids[draft.learned[-1][1] - 1]
                ends += [last] if last in self.text.control_ids and last not in ends else []
        return ends

    def encode(
        self, examples: Iterable[Example], max_length: int, on_overlong: str = "truncate"
    ) -> Iterator[list[Sample] | Rejected]:
        """Encode examples, many at a time.

        Args:
            examples: Any mixture.
            max_length: Longest sample in tokens. Longer plain texts are cut into consecutive samples.
            on_overlong: "truncate" cuts longer rows at the right, "drop" and "error" reject them.

        Yields:
            For each example its samples, more than one only for long texts, or why there are none.

        Raises:
            DataError: The tokenizer has no end-of-text token, or no chat template where one is needed.
        """
        iterator = iter(examples)
        while batch := list(islice(iterator, _BATCH)):
            for example, draft in zip(batch, self._drafts(batch), strict=True):
                if isinstance(draft, Rejected):
                    yield draft
                elif isinstance(example, Text):
                    yield _split(draft, example.where, max_length)
                else:
                    yield _fit(draft, example.where, max_length, on_overlong)

    def _drafts(self, examples: Sequence[Example]) -> list[_Draft | Rejected]:
        drafts: dict[int, _Draft | Rejected] = {}
        chats: dict[int, Rendered] = {}
        plain: dict[int, Pair | Text] = {}
        for index, example in enumerate(examples):
            if isinstance(example, Conversation):
                found: Rendered | Rejected | Pair | Text = self._render(example)
            else:
                found = _check_plain(example) or example
            if isinstance(found, Rejected):
                drafts[index] = found
            elif isinstance(found, Rendered):
                chats[index] = found
            else:
                plain[index] = found
        drafts.update(zip(chats, self._encode_chats(list(chats.values())), strict=True))
        drafts.update(zip(plain, self._encode_plain(list(plain.values())), strict=True))
        return [drafts[index] for index in range(len(examples))]

    def _render(self, conversation: Conversation) -> Rendered | Rejected:
        template = self.template
        where = conversation.where
        contents = [message["content"] for message in conversation.messages]
        if char := next((char for text in contents if (char := private_character(text))), ""):
            return Rejected(where, _private_reason(char), invalid=True)
        if any(self.text.spells_control(text) for text in contents) or conversation.tools:
            messages, tools = self.text.quote_controls([conversation.messages, conversation.tools])
            conversation = Conversation(messages, where, tools, conversation.trained_from)
        try:
            found = template.find_turns(conversation)
        except DataError as error:
            return Rejected(error.where or where, error.what, invalid=True)
        if not found.turns:
            return Rejected(where, "nothing to learn: no answer of the assistant holds text")
        return self._marked(found)

    def _marked(self, found: Rendered) -> Rendered:
        """The same places in the text whose control tokens count."""
        cuts = sorted(
            {0, *found.prompts, *(place for turn in found.turns for place in turn), len(found.text)}
        )
        pieces = [self.text.mark_controls(found.text[a:b]) for a, b in pairwise(cuts)]
        ends = accumulate((len(piece) for piece in pieces), initial=0)
        place = dict(zip(cuts, ends, strict=True))
        turns = [(place[begin], place[end]) for begin, end in found.turns]
        return Rendered("".join(pieces), turns, [place[edge] for edge in found.prompts])

    def _encode_chats(self, chats: Sequence[Rendered]) -> Iterator[_Draft]:
        edges = [sorted({*chat.prompts, *(begin for begin, _ in chat.turns)}) for chat in chats]
        encoded = encode_apart(
            self.text, [(chat.text, cuts) for chat, cuts in zip(chats, edges, strict=True)]
        )
        for chat, apart in zip(chats, encoded, strict=True):
            learned = [(apart.edges[begin], bisect_left(apart.starts, end)) for begin, end in chat.turns]
            yield self._closed(apart.ids, learned)

    def _closed(self, ids: list[int], learned: list[tuple[int, int]]) -> _Draft:
        """End the last answer with the end-of-text token where the template closes it with no control token."""
        begin, end = learned[-1]
        if end > 0 and ids[end - 1] not in self.text.control_ids:
            ids, learned = [*ids[:end], self._eos()], [*learned[:-1], (begin, end + 1)]
        return _Draft(ids, [(0, len(ids))] if self._loss_on == "all" else learned)

    def _encode_plain(self, examples: Sequence[Pair | Text]) -> Iterator[_Draft]:
        if not examples:
            return
        if self._loss_on == "completion" and any(isinstance(example, Text) for example in examples):
            raise DataError(
                "plain texts have no completion", where="data.loss_on", fix="set data.loss_on to auto or all"
            )
        texts = [part for example in examples for part in _parts(example)]
        encoded = iter(self.text.encode(texts))
        for example in examples:
            prompt = list(self.text.bos_ids)
            if isinstance(example, Pair):
                prompt += next(encoded).ids
            ids = [*prompt, *next(encoded).ids, self._eos()]
            everything = self._loss_on == "all" or isinstance(example, Text)
            yield _Draft(ids, [(0 if everything else len(prompt), len(ids))])

    def _eos(self) -> int:
        if self.text.eos_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so a model could not learn to stop",
                where=str(self.tokenizer.name_or_path),
                fix="name it in tokenizer_config.json (eos_token)",
            )
        return self.text.eos_id


def encode(
    example: Example,
    tokenizer: Any,
    loss_on: LossOn = "auto",
    max_length: int = 1024,
    on_overlong: str = "truncate",
) -> Sample | Rejected:
    """Encode one example; of a long plain text only the first sample. See `Encoder` for many.

    Args:
        example: The example.
        tokenizer: A fast tokenizer, or an `Encoder`, whose own `loss_on` then counts.
        loss_on: Which tokens are learned.
        max_length: Longest sample in tokens.
        on_overlong: "truncate", "drop" or "error".
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer, loss_on=loss_on)
    found = next(encoder.encode([example], max_length, on_overlong))
    return found if isinstance(found, Rejected) else found[0]


@dataclass(frozen=True)
class Apart:
    """A text encoded so that no token spans one of its edges.

    Attributes:
        ids: Token ids.
        starts: Where each token begins in the text.
        edges: How many tokens stand before each edge.
    """

    ids: list[int]
    starts: list[int]
    edges: dict[int, int]


def encode_apart(encoder: TextEncoder, texts: Sequence[tuple[str, Sequence[int]]]) -> list[Apart]:
    """Encode texts such that what stands before each edge has the ids it would have alone.

    Nearly always the whole text's ids already have this property and are kept. Where a token would span the
    edge between a prompt and its answer, the model would meet other ids when it generates than it was trained
    on; there the text is encoded in two parts.

    Args:
        encoder: Encodes.
        texts: Each with its edges, ascending.
    """
    wholes = encoder.encode([text for text, _ in texts])
    befores = iter(encoder.encode([text[:edge] for text, edges in texts for edge in edges]))
    return [
        _apart(encoder, text, whole, {edge: next(befores).ids for edge in edges})
        for (text, edges), whole in zip(texts, wholes, strict=True)
    ]


def _apart(encoder: TextEncoder, text: str, whole: Any, befores: dict[int, list[int]]) -> Apart:
    ids, starts = list(whole.ids), [start for start, _ in whole.offsets]
    counts: dict[int, int] = {}
    base, head = 0, 0  # the ids from `head` on are those of the text from `base` on
    for edge, before in befores.items():
        if base > 0:
            before = encoder.following_ids(text[base:edge])[0]
        count = head + len(before)
        if ids[head:count] != before:
            tail, tail_starts = encoder.following_ids(text[edge:])
            part_starts = encoder.following_ids(text[base:edge])[1] if base else encoder.starts(text[:edge])
            ids = [*ids[:head], *before, *tail]
            starts = [*starts[:head], *(base + at for at in part_starts), *(edge + at for at in tail_starts)]
            base, head = edge, count
        counts[edge] = count
    return Apart(ids, starts, counts)


def _check_plain(example: Pair | Text) -> Rejected | None:
    for text in _parts(example):
        if char := private_character(text):
            return Rejected(example.where, _private_reason(char), invalid=True)
    if not _parts(example)[-1].strip():
        what = "the completion is empty" if isinstance(example, Pair) else "the text is empty"
        return Rejected(example.where, f"nothing to learn: {what}")
    return None


def _parts(example: Pair | Text) -> tuple[str, ...]:
    return (example.prompt, example.completion) if isinstance(example, Pair) else (example.text,)


def _private_reason(char: str) -> str:
    return f"the text holds the private character U+{ord(char):X}, which graft needs for itself"


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(message["role"].startswith("assistant") for message in messages)


def _labels(draft: _Draft) -> list[int]:
    labels = [IGNORED] * len(draft.ids)
    for begin, end in draft.learned:
        labels[begin:end] = draft.ids[begin:end]
    labels[0] = IGNORED
    return labels


def _split(draft: _Draft, where: str, max_length: int) -> list[Sample] | Rejected:
    labels = _labels(draft)
    samples = []
    for begin in range(0, len(draft.ids), max_length):
        end = begin + max_length
        # A piece of one token has nothing to be predicted from.
        if len(draft.ids) - begin > 1:
            piece = [IGNORED, *labels[begin + 1 : end]]
            samples.append(Sample(draft.ids[begin:end], piece, where))
    return samples


def _fit(draft: _Draft, where: str, max_length: int, on_overlong: str) -> list[Sample] | Rejected:
    labels = _labels(draft)
    if len(draft.ids) <= max_length:
        return [Sample(draft.ids, labels, where)]
    if on_overlong != "truncate":
        return Rejected(
            where, f"{len(draft.ids):,} tokens, more than max_length {max_length:,}", overlong=True
        )
    labels = labels[:max_length]
    if all(label == IGNORED for label in labels):
        return Rejected(
            where, f"answer cut away by max_length {max_length:,}: the row has {len(draft.ids):,} tokens"
        )
    return [Sample(draft.ids[:max_length], labels, where, truncated=True)]
