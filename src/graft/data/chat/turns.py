"""Where in a rendered conversation each answer stands, whatever the template.

An answer begins where the rendering of all messages before it, asking for an answer, ends; it ends where
the rendering up to it ends, without the white space there. Where the template marks answers with {%
generation %} only what is marked is learned, and the closing of the turn. A turn of another role that is to
be learned begins with its content, since nothing asks for it, and ends as an answer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graft.data.chat.templates import ChatTemplate
from graft.data.examples import Conversation, Message
from graft.errors import DataError

Span = tuple[int, int]

_BEFORE, _AFTER = "\U0010fffc", "\U0010fffd"
_FEW = 4
"""Answers that are each found by rendering up to them; of more, only the first and the last are."""
_CONTEXT = 64
"""Characters before an answer that are compared with those before other answers."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it.

    Attributes:
        text: The whole text.
        turns: Of each message that is learned: where it begins and ends in the text.
        prompts: Where each answer of the conversation begins, learned or not.
    """

    text: str
    turns: list[Span]
    prompts: list[int]


@dataclass(frozen=True)
class Choice:
    """Which messages are learned where the rows themselves do not say.

    Attributes:
        roles: The roles; "assistant" is every kind of answer.
        last: Whether of these only the last of each conversation is.
    """

    roles: tuple[str, ...] = ("assistant",)
    last: bool = False

    def of(self, conversation: Conversation) -> list[int]:
        """The messages of a conversation that are learned; those without content never are.

        A row's own flags (`Conversation.flags`) come before the choice.
        """
        messages, flags = conversation.messages, conversation.flags
        chosen = [
            index
            for index in range(conversation.trained_from, len(messages))
            if self._has(messages[index]) and _holds_text(messages[index])
        ]
        if self.last:
            chosen = chosen[-1:]
        if not flags:
            return chosen
        return [
            index
            for index in range(conversation.trained_from, len(messages))
            if _holds_text(messages[index]) and flags.get(index, index in chosen)
        ]

    def _has(self, message: Message) -> bool:
        return message["role"] in self.roles or ("assistant" in self.roles and is_answer(message))


def find_turns(template: ChatTemplate, conversation: Conversation, choice: Choice | None = None) -> Rendered:
    """Render a conversation and find in it what is learned.

    Args:
        template: The chat template.
        conversation: Its messages.
        choice: Which of them are learned: the answers, unless something else is chosen.

    Raises:
        DataError: The template refuses the conversation, or writes the messages before an answer differently
            once the answer is there and marks nothing; or a turn of another role cannot be found.

    Cost: two renderings of the conversation for one answer, eight at most for many that are written alike.
    """
    messages = conversation.messages
    text = template.render(messages, conversation.tools, where=conversation.where)
    answers = [index for index, message in enumerate(messages) if is_answer(message)]
    marks = template.marks(conversation) if template.has_marks else None
    wanted = (choice or Choice()).of(conversation)
    try:
        spans = _spans(template, text, conversation, answers, wanted)
    except DataError:
        if marks is None or len(marks) != len(answers):
            raise
        spans = marks
    turns = dict(zip(answers, spans, strict=True))
    others = [index for index in wanted if index not in turns]
    learned = {index: _within(turns[index], marks) for index in wanted if index in turns}
    learned |= {index: [_other(template, text, conversation, index)] for index in others}
    inside = [span for index in wanted for span in learned[index]]
    return Rendered(text, inside, [begin for begin, _ in spans])


def is_answer(message: Message) -> bool:
    """Whether a message is the assistant's."""
    return str(message["role"]).startswith("assistant")


def _holds_text(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _other(template: ChatTemplate, text: str, conversation: Conversation, index: int) -> Span:
    """Content and closing of a turn that nothing asks for.

    Raises:
        DataError: The content does not come through the template as it is, or its end is not to be seen.
    """
    found = find_contents(template, text, conversation, [index])
    if not found:
        raise DataError(
            f"the turn of {conversation.messages[index]['role']!r} cannot be found in the rendered "
            f"conversation",
            where=f"{conversation.where}, message {index + 1}",
            fix=(
                "take the role out of data.train_on_roles, or use a template that writes its content as it is"
            ),
        )
    content, begin = conversation.messages[index]["content"], found[0][0]
    space = content[: len(content) - len(content.lstrip())]
    begin -= len(space) if text.endswith(space, 0, begin) else 0
    return begin, max(found[0][1], _end(template, text, conversation, index))


def _within(turn: Span, marks: list[Span] | None) -> list[Span]:
    """What is learned of a turn: all of it, or what is marked; the last mark reaches to the turn's end."""
    if marks is None:
        return [turn]
    inside = [mark for mark in marks if turn[0] <= mark[0] < turn[1]]
    return [*inside[:-1], (inside[-1][0], max(inside[-1][1], turn[1]))] if inside else []


def _spans(
    template: ChatTemplate,
    text: str,
    conversation: Conversation,
    answers: Sequence[int],
    wanted: Sequence[int],
) -> list[Span]:
    if len(answers) > _FEW:
        try:
            alike = _alike(template, text, conversation, answers)
        except DataError:
            alike = None  # perhaps only where nobody asks; each alone says which
        if alike:
            return alike
    return [_span(template, text, conversation, index, index in wanted) for index in answers]


def _span(template: ChatTemplate, text: str, conversation: Conversation, index: int, wanted: bool) -> Span:
    begin = _begin(template, text, conversation, index)
    return begin, max(begin, _end(template, text, conversation, index)) if wanted else begin


def _begin(template: ChatTemplate, text: str, conversation: Conversation, index: int) -> int:
    where = f"{conversation.where}, message {index + 1}"
    if index == 0:
        raise DataError(
            "an answer stands first, with nothing to answer", where=where, fix="begin with the user"
        )
    prompt = template.render(conversation.messages[:index], conversation.tools, ask=True, where=where)
    if not text.startswith(prompt):
        raise DataError(
            "the chat template writes the prompt differently once the answer is there",
            where=where,
            fix="set data.chat_template to one that does not, or that marks answers with {% generation %}",
        )
    return len(prompt)


def _end(template: ChatTemplate, text: str, conversation: Conversation, index: int) -> int:
    messages = conversation.messages
    if index == len(messages) - 1:
        return len(text.rstrip())
    so_far = template.render(messages[: index + 1], conversation.tools, where=conversation.where)
    if text.startswith(so_far):
        return len(so_far.rstrip())
    return _end_by_content(template, text, conversation, index)


def _end_by_content(template: ChatTemplate, text: str, conversation: Conversation, index: int) -> int:
    """Where templates write a later history differently: after the content and its closing mark.

    Raises:
        DataError: The content does not come through the template as it is.
    """
    found = find_contents(template, text, conversation, [index])
    alone = replace(conversation, messages=conversation.messages[: index + 1])
    text_alone = template.render(alone.messages, alone.tools, where=alone.where)
    found_alone = find_contents(template, text_alone, alone, [index])
    if found and found_alone:
        closing = text_alone[found_alone[0][1] :].rstrip()
        if text.startswith(closing, found[0][1]):
            return found[0][1] + len(closing)
    raise DataError(
        "the end of an answer cannot be found in the rendered conversation",
        where=f"{conversation.where}, message {index + 1}",
        fix="use a template that marks answers with {% generation %}",
    )


def _alike(
    template: ChatTemplate, text: str, conversation: Conversation, answers: Sequence[int]
) -> list[Span] | None:
    """The spans of many answers from those of the first and the last, if all are written alike."""
    contents = find_contents(template, text, conversation, answers)
    if contents is None:
        return None
    first, last = (_span(template, text, conversation, answers[at], True) for at in (0, -1))
    lead, closing = text[first[0] : contents[0][0]], text[contents[0][1] : first[1]]
    if lead != text[last[0] : contents[-1][0]] or closing != text[contents[-1][1] : last[1]]:
        return None
    context = _common_end(text[: first[0]][-_CONTEXT:], text[: last[0]][-_CONTEXT:]) + lead
    spans = []
    for begin, end in contents:
        if not context or not text.endswith(context, 0, begin) or not text.startswith(closing, end):
            return None
        spans.append((begin - len(lead), end + len(closing)))
    return spans


def find_contents(
    template: ChatTemplate, text: str, conversation: Conversation, answers: Sequence[int]
) -> list[Span] | None:
    """Where the contents of messages stand in the text, without the white space around each.

    None where they do not come through as they are.
    """
    messages = list(conversation.messages)
    for index in answers:
        content = messages[index]["content"]
        bare = content.strip()
        if not bare:
            return None
        messages[index] = {**messages[index], "content": content.replace(bare, _BEFORE + bare + _AFTER, 1)}
    framed = template.render(messages, conversation.tools, where=conversation.where)
    if framed.replace(_BEFORE, "").replace(_AFTER, "") != text:
        return None
    pieces = framed.replace(_AFTER, _BEFORE).split(_BEFORE)
    if len(pieces) != 2 * len(answers) + 1:
        return None
    places = [0]
    for piece in pieces:
        places.append(places[-1] + len(piece))
    return [(places[i], places[i + 1]) for i in range(1, len(pieces), 2)]


def _common_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-1 - size] == other[-1 - size]:
        size += 1
    return one[len(one) - size :]
