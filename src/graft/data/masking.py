"""Examples to samples: which ids a row becomes, and which of them are learned.

The ids of a conversation are those of its whole rendered text. What a model is asked with later, through
`Encoder.prompt`, has exactly the ids that a training sample begins with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal

from graft.data.ahead import in_order
from graft.data.batches import batches_of, refusal, texts_of
from graft.data.chat.rendering import Renderer
from graft.data.chat.templates import ChatTemplate, writes_date
from graft.data.chat.turns import Choice, Rendered, find_contents, find_turns, is_answer
from graft.data.examples import Conversation, Example, Message, Pair, Text
from graft.data.samples import (
    CONTROL_AS_TEXT,
    END_ADDED,
    IGNORED,
    Draft,
    Rejected,
    Sample,
    fit,
    split,
    without,
)
from graft.data.shortening import Shortener
from graft.data.tokens import Apart, TextEncoder
from graft.errors import DataError

__all__ = ["IGNORED", "Encoder", "Rejected", "Sample", "encode", "prompt_ids"]

LossOn = Literal["auto", "completion", "all"]


@dataclass
class _Begun:
    """Examples on their way to the tokenizer, by their places.

    Attributes:
        examples: All.
        rejected: Those that give nothing.
        chats: Conversations as they are rendered.
        plain: Texts, and prompts with completions.
        spelling: Those whose texts spell a control token.
        texts: What the tokenizer reads: the chats, then the texts of the plain ones.
    """

    examples: Sequence[Example]
    rejected: dict[int, Rejected] = field(default_factory=dict)
    chats: dict[int, Rendered] = field(default_factory=dict)
    plain: dict[int, Pair | Text] = field(default_factory=dict)
    spelling: set[int] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)


class Encoder:
    """Turns examples into samples, and prompts into exactly the ids that begin such a sample.

    Args:
        tokenizer: A fast tokenizer of transformers, or a `TextEncoder` of one.
        chat_template: Text of a template to use instead of the tokenizer's.
        loss_on: "completion" learns completions and answers, "all" every token; "auto" is completion
            where there is one and all for plain texts.
        choice: Which messages of a conversation are learned; the assistant's unless something is chosen.
        day: What templates take for today; the day of each rendering if left out.

    Raises:
        DataError: The tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        loss_on: LossOn = "auto",
        choice: Choice | None = None,
        day: date | None = None,
    ) -> None:
        self.text = tokenizer if isinstance(tokenizer, TextEncoder) else TextEncoder(tokenizer)
        self.tokenizer = self.text.tokenizer
        self._loss_on = loss_on
        self._choice = choice or Choice()
        self._day = day
        self._renderer = Renderer(self.text, chat_template, self._choice, day)

    def digest(self) -> str:
        """SHA-256 over the tokenizer, the ids it puts around texts, the template, its words and its day."""
        text = self.text
        words = {name: str(word) for name, word in self.tokenizer.special_tokens_map.items()}
        template = self._renderer.source
        day = str(self._day or date.today()) if writes_date(template) else None
        parts = [text.digest, text.bos_ids, text.eos_id, template, words, day]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self._renderer.source)

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: There is none, or it is not a valid one.
        """
        return self._renderer.template

    def prompt(self, prompt: str | Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The ids to generate from: a plain prompt, or messages that ask for an answer.

        They are the ids that a training sample with the same beginning has before its first learned token.

        Raises:
            DataError: The template refuses the messages, or there is none.
        """
        if isinstance(prompt, str):
            return [*self.text.bos_ids, *self.text.ids(prompt)]
        messages, tools = self.text.quote_controls([list(prompt), tools])
        text = self.template.render(messages, tools, ask=True)
        history = Conversation(messages, "", tools)
        edges = find_turns(self.template, history).prompts if any(map(is_answer, messages)) else []
        marked = self._renderer.marked(Rendered(text, [], edges))
        return self.text.encode_apart([(marked.text, marked.prompts)])[0].ids

    def end_of_turn_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and what the template closes a turn with."""
        ends = [] if self.text.eos_id is None else [self.text.eos_id]
        if self.has_template:
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            found = next(self.encode([Conversation(messages, "")], 1 << 30))
            learned = [] if isinstance(found, Rejected) else [id for id in found[0].labels if id != IGNORED]
            ends += [id for id in learned[-1:] if id in self.text.control_ids and id not in ends]
        return ends

    def encode(
        self,
        examples: Iterable[Example],
        max_length: int,
        on_overlong: str = "truncate",
        *,
        workers: int = 0,
    ) -> Iterator[list[Sample] | Rejected]:
        """Encode examples, many at a time.

        Args:
            examples: Any mixture.
            max_length: Longest sample in tokens. Longer plain texts are cut into consecutive samples.
            on_overlong: What becomes of longer rows: "truncate" cuts their end away, "truncate_left" the
                begin of the prompt and the oldest exchanges, "split" makes several of a conversation, "drop"
                and "error" reject them.
            workers: Threads in which the tokenizer works ahead; examples are then drawn before what stands
                before them is used. All else is done in the caller's thread.

        Yields:
            For each example its samples, more than one only where it was split, or why there are none.

        Raises:
            DataError: The tokenizer has no end-of-text token, or no chat template where one is needed.
        """
        batches = map(self._begun, batches_of(examples))
        for begun, encodings in in_order(self._tokenized, batches, workers):
            for example, draft in zip(begun.examples, self._finished(begun, encodings), strict=True):
                if isinstance(draft, Rejected):
                    yield draft
                elif isinstance(example, Text):
                    yield split(draft, example.where, max_length)
                elif (
                    len(draft.ids) > max_length
                    and isinstance(example, Conversation)
                    and on_overlong in ("truncate_left", "split")
                ):
                    shorter = Shortener(self._drafts, self._cut, max_length)
                    yield (shorter.parts if on_overlong == "split" else shorter.newest)(example)
                else:
                    yield fit(draft, example.where, max_length, on_overlong)

    def _cut(self, conversation: Conversation, index: int, max_length: int) -> Draft | None:
        """A conversation without the begin of one message, as short as asked; None where that cannot be."""
        if any(map(self.text.spells_control, texts_of(conversation))):
            conversation = self._renderer.quoted(conversation)
        found = self._renderer.exact(conversation)
        if is_answer(conversation.messages[index]):
            return None
        spans = find_contents(self.template, found.text, conversation, [index])
        if not spans:
            return None
        chat = self._renderer.marked(Rendered(found.text, [*spans, *found.turns], found.prompts))
        (begin, end), turns = chat.turns[0], chat.turns[1:]
        (apart,) = self.text.encode_apart([(chat.text, self._edges(replace(chat, turns=turns)))])
        first, last = apart.before(begin), apart.before(end)
        draft = self._closed(apart.ids, self._learned(apart, turns))
        count = len(draft.ids) - max_length
        # A character may have several tokens; none is cut in two.
        while 0 < first + count < last and apart.starts[first + count] == apart.starts[first + count - 1]:
            count += 1
        return without(draft, first, count) if 0 < count < last - first else None

    def _drafts(self, examples: Sequence[Example]) -> list[Draft | Rejected]:
        return self._finished(*self._tokenized(self._begun(examples)))

    def _tokenized(self, begun: _Begun) -> tuple[_Begun, list[Any]]:
        return begun, self.text.encode(begun.texts)

    def _begun(self, examples: Sequence[Example]) -> _Begun:
        """Render examples, and say which texts of them the tokenizer has to read."""
        begun = _Begun(examples)
        for index, example in enumerate(examples):
            texts = texts_of(example)
            rejected = refusal(example, texts) or self._check_flags(example)
            if rejected is not None:
                begun.rejected[index] = rejected
                continue
            if any(map(self.text.spells_control, texts)):
                begun.spelling.add(index)
            if not isinstance(example, Conversation):
                begun.plain[index] = example
                continue
            found = self._renderer.render(example, quoting=index in begun.spelling)
            if isinstance(found, Rejected):
                begun.rejected[index] = found
            else:
                begun.chats[index] = found
        self._check_plain(list(begun.plain.values()))
        begun.texts = [chat.text for chat in begun.chats.values()]
        begun.texts += [text for example in begun.plain.values() for text in texts_of(example)]
        return begun

    def _finished(self, begun: _Begun, encodings: Sequence[Any]) -> list[Draft | Rejected]:
        drafts: dict[int, Draft | Rejected] = dict(begun.rejected)
        count = len(begun.chats)
        chats = self._chat_drafts(list(begun.chats.values()), encodings[:count])
        drafts.update(zip(begun.chats, chats, strict=True))
        plain = self._plain_drafts(list(begun.plain.values()), encodings[count:])
        drafts.update(zip(begun.plain, plain, strict=True))
        for index in begun.spelling:
            draft = drafts[index]
            if isinstance(draft, Draft):
                drafts[index] = replace(draft, remarks=(*draft.remarks, CONTROL_AS_TEXT))
        return [drafts[index] for index in range(len(begun.examples))]

    def _check_flags(self, example: Example) -> Rejected | None:
        """Refuse a message that is not to be learned where all tokens are."""
        if self._loss_on != "all" or not isinstance(example, Conversation) or all(example.flags.values()):
            return None
        message = next(index for index, learned in example.flags.items() if not learned)
        reason = f"message {message + 1} is not to be learned, and data.loss_on is all"
        return Rejected(example.where, reason, "leave out one of them", invalid=True)

    def _chat_drafts(self, chats: Sequence[Rendered], encodings: Sequence[Any]) -> Iterator[Draft]:
        texts = [(chat.text, self._edges(chat)) for chat in chats]
        for chat, apart in zip(chats, self.text.encode_apart(texts, encodings), strict=True):
            yield self._closed(apart.ids, self._learned(apart, chat.turns))

    def _edges(self, chat: Rendered) -> list[int]:
        return sorted({*chat.prompts, *self._begins(chat)})

    def _learned(self, apart: Apart, turns: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(apart.edges.get(begin) or apart.before(begin), apart.before(end)) for begin, end in turns]

    def _begins(self, chat: Rendered) -> list[int]:
        """Where what is learned begins inside an answer that was asked for, or in a part that is marked.

        Turns of other roles are not asked for: nobody meets their beginning apart from what stands before.
        """
        if self._choice.roles != ("assistant",):
            return []
        return [begin for begin, _ in chat.turns]

    def _closed(self, ids: list[int], learned: list[tuple[int, int]]) -> Draft:
        """End the last answer with the end-of-text token if the template closes it with no control token."""
        begin, end = learned[-1]
        remarks: tuple[str, ...] = ()
        if ids[end - 1] not in self.text.control_ids:
            ids, learned = [*ids[:end], self._eos()], [*learned[:-1], (begin, end + 1)]
            remarks = (END_ADDED,)
        return Draft(ids, [(0, len(ids))] if self._loss_on == "all" else learned, remarks)

    def _check_plain(self, examples: Sequence[Pair | Text]) -> None:
        if self._loss_on == "completion" and any(isinstance(example, Text) for example in examples):
            raise DataError(
                "plain texts have no completion", where="data.loss_on", fix="set data.loss_on to auto or all"
            )
        if self._choice != Choice() and examples:
            raise DataError(
                "rows without turns cannot be chosen from by train_on_roles and train_on_last_turn",
                where=examples[0].where,
                fix="leave data.train_on_roles and data.train_on_last_turn out, or give rows of messages",
            )

    def _plain_drafts(self, examples: Sequence[Pair | Text], encodings: Sequence[Any]) -> Iterator[Draft]:
        encoded = iter(encodings)
        for example in examples:
            prompt = list(self.text.bos_ids)
            if isinstance(example, Pair):
                prompt += next(encoded).ids
            ids = [*prompt, *next(encoded).ids, self._eos()]
            everything = self._loss_on == "all" or isinstance(example, Text)
            yield Draft(
                ids, [(0 if everything else len(prompt), len(ids))], (), len(self.text.bos_ids), len(prompt)
            )

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

    Raises:
        DataError: The tokenizer is not a fast one, or lacks an end-of-text token or a chat template.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer, loss_on=loss_on)
    found = next(encoder.encode([example], max_length, on_overlong))
    return found if isinstance(found, Rejected) else found[0]


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message], tools: list[Any] | None = None) -> list[int]:
    """The ids to generate from; see `Encoder.prompt`, which is the quicker way to several of them.

    Raises:
        DataError: The tokenizer is not a fast one, or its chat template is missing or refuses the messages.
    """
    return (tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer)).prompt(prompt, tools)
