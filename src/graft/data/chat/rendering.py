"""Conversations to text: what is learned in it, its control tokens marked, those in contents quoted."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from itertools import accumulate, pairwise
from typing import Any

from graft.data.chat.frames import Frames
from graft.data.chat.templates import ChatTemplate
from graft.data.chat.turns import Choice, Rendered, find_turns
from graft.data.examples import Conversation
from graft.data.samples import Rejected
from graft.data.tokens import TextEncoder
from graft.errors import DataError


class Renderer:
    """Renders the conversations of one tokenizer.

    Args:
        text: Knows the control tokens.
        source: Text of a template to use instead of the tokenizer's.
        choice: Which messages are learned.
        day: What templates take for today; the day of each rendering if left out.
    """

    def __init__(self, text: TextEncoder, source: str | None, choice: Choice, day: date | None) -> None:
        self._text = text
        self._source = source
        self._choice = choice
        self._day = day
        self._template: ChatTemplate | None = None
        self._frames: Frames | None = None

    @property
    def source(self) -> Any:
        """The template, or whatever the tokenizer has for one."""
        return self._source or self._text.tokenizer.chat_template

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: There is none, or it is not a valid one.
        """
        if self._template is None:
            self._template = ChatTemplate(self._text.tokenizer, self._source, self._day)
        return self._template

    def render(self, conversation: Conversation, *, quoting: bool) -> Rendered | Rejected:
        """A conversation with control tokens marked.

        Args:
            conversation: The conversation.
            quoting: Whether its contents spell control tokens, which stay text.
        """
        where = conversation.where
        try:
            if quoting:
                found = self.marked(self.exact(self.quoted(conversation)))
            else:
                found = self._frames_of_template().find(conversation)
        except DataError as error:
            return Rejected(error.where or where, error.what, error.fix, invalid=True)
        if not found.turns:
            return Rejected(where, self._nothing())
        return found

    def exact(self, conversation: Conversation) -> Rendered:
        """A conversation as the template writes it.

        Raises:
            DataError: As `turns.find_turns`.
        """
        return find_turns(self.template, conversation, self._choice)

    def quoted(self, conversation: Conversation) -> Conversation:
        """The same, the control tokens in its contents hidden from `marked`."""
        messages, tools = self._text.quote_controls([conversation.messages, conversation.tools])
        return replace(conversation, messages=messages, tools=tools)

    def marked(self, found: Rendered) -> Rendered:
        """The same places in the text whose control tokens count."""
        places = {0, len(found.text), *found.prompts, *(place for turn in found.turns for place in turn)}
        cuts = sorted(places)
        pieces = [self._text.mark_controls(found.text[a:b]) for a, b in pairwise(cuts)]
        ends = accumulate((len(piece) for piece in pieces), initial=0)
        place = dict(zip(cuts, ends, strict=True))
        turns = [(place[begin], place[end]) for begin, end in found.turns]
        return Rendered("".join(pieces), turns, [place[edge] for edge in found.prompts])

    def _frames_of_template(self) -> Frames:
        if self._frames is None:
            self._frames = Frames(self.template, self._text, self.exact, self.marked)
        return self._frames

    def _nothing(self) -> str:
        if self._choice.roles == ("assistant",):
            return "nothing to learn: no answer of the assistant holds text"
        return f"nothing to learn: no message of {', '.join(self._choice.roles)} holds text"
