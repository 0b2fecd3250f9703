"""What a template writes around the messages of conversations of one shape, learned from the first of them.

Finding the answers of a conversation exactly takes several renderings (`turns.py`). Most rows of a file
have one shape: the same roles in the same order. From the first rows of a shape its frame is learned: the
pieces of text before, between and after the contents, and where in them the learned parts begin and end. Of
a later row of the shape one rendering is enough: it must be these pieces and the row's contents, letter for
letter; then its parts are where they were in the others. Whatever is not so goes the exact way.

A template could still write the same text and ask for the answer otherwise, by the words in it. So a row
that has one of the words that the template looks for goes the exact way too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from jinja2 import nodes

from graft.data.chat.templates import ChatTemplate
from graft.data.chat.turns import Rendered, find_contents
from graft.data.examples import Conversation
from graft.data.tokens import TextEncoder
from graft.errors import DataError

_WITNESSES = 3
"""Rows of a shape that must agree before their frame counts."""
_TRIES = 8
"""Rows of a shape from which a frame may be learned, before the shape is given up."""
_MAX_SHAPES = 1024
_MAX_MESSAGES = 64

Place = tuple[int, int]
"""The piece, and the characters from its begin."""


@dataclass(frozen=True)
class Frame:
    """The text around the contents of a shape.

    Attributes:
        pieces: One more than there are messages, as the template writes them.
        marked: The same, control tokens as their private characters.
        turns: Where each learned part begins and ends, in `marked`.
        prompts: Where each answer begins.
    """

    pieces: tuple[str, ...]
    marked: tuple[str, ...]
    turns: tuple[tuple[Place, Place], ...]
    prompts: tuple[Place, ...]

    def around(self, text: str, contents: Sequence[str]) -> Rendered | None:
        """The row of such contents whose rendering is `text`; None where it is not this frame."""
        parts = [""] * (2 * len(contents) + 1)
        parts[::2] = self.pieces
        parts[1::2] = contents
        if "".join(parts) != text:
            return None
        parts[::2] = self.marked
        begins = list(accumulate(map(len, parts), initial=0))
        turns = [(begins[2 * a] + i, begins[2 * b] + j) for (a, i), (b, j) in self.turns]
        return Rendered("".join(parts), turns, [begins[2 * a] + i for a, i in self.prompts])


@dataclass
class _Shape:
    frame: Frame | None = None
    witnesses: set[tuple[str, ...]] = field(default_factory=set)
    tries: int = 0
    given_up: bool = False


class Frames:
    """The frames of a template, learned while rows are rendered.

    Args:
        template: The chat template.
        text: Says what a control token is.
        exact: Renders a conversation the exact way: in the text as it is, and with its control tokens marked.
    """

    def __init__(
        self,
        template: ChatTemplate,
        text: TextEncoder,
        exact: Callable[[Conversation], Rendered],
        marked: Callable[[Rendered], Rendered],
    ) -> None:
        self._template = template
        self._text = text
        self._exact = exact
        self._marked = marked
        self._shapes: dict[Any, _Shape] = {}
        self._words, self._whole = words_of(template.source)

    def find(self, conversation: Conversation) -> Rendered:
        """A conversation without control tokens in its texts, rendered, its control tokens marked.

        Raises:
            DataError: As `turns.find_turns`.
        """
        shape, contents = self._shape(conversation)
        if shape is None or shape.given_up:
            return self._marked(self._exact(conversation))
        if shape.frame is not None and len(shape.witnesses) >= _WITNESSES:
            text = self._template.render(conversation.messages, where=conversation.where)
            return shape.frame.around(text, contents) or self._marked(self._exact(conversation))
        found = self._exact(conversation)
        self._learn(shape, conversation, contents, found)
        return self._marked(found)

    def _shape(self, conversation: Conversation) -> tuple[_Shape | None, list[str]]:
        messages = conversation.messages
        if conversation.tools or len(messages) > _MAX_MESSAGES:
            return None, []
        contents: list[str] = []
        roles = []
        for message in messages:
            content = message["content"]
            # A content with space around it is not to be told from the space of the frame.
            if len(message) != 2 or not content or content[0].isspace() or content[-1].isspace():
                return None, []
            roles.append(message["role"])
            contents.append(content)
        if self._whole.intersection(contents) or any(
            word in each for word in self._words for each in contents
        ):
            return None, []
        key = (tuple(roles), conversation.trained_from, tuple(sorted(conversation.flags.items())))
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= _MAX_SHAPES:
                return None, []
            shape = self._shapes[key] = _Shape()
        return shape, contents

    def _learn(self, shape: _Shape, conversation: Conversation, contents: list[str], found: Rendered) -> None:
        shape.tries += 1
        frame = self._frame(conversation, contents, found)
        if frame is None or (shape.frame is not None and shape.frame != frame):
            shape.given_up = shape.frame is not None or shape.tries >= _TRIES
            shape.frame, shape.witnesses = None, set()
        elif tuple(contents) not in shape.witnesses:
            shape.frame = frame
            shape.witnesses.add(tuple(contents))
        elif shape.tries >= _TRIES and shape.frame is None:
            shape.given_up = True

    def _frame(self, conversation: Conversation, contents: list[str], found: Rendered) -> Frame | None:
        """The frame of one row, None where an edge of it lies within a content."""
        try:
            spans = find_contents(self._template, found.text, conversation, range(len(contents)))
        except DataError:
            return None
        if spans is None:
            return None
        cuts = [0, *(place for span in spans for place in span), len(found.text)]
        pieces = tuple(found.text[cuts[at] : cuts[at + 1]] for at in range(0, len(cuts), 2))
        if any(
            found.text[begin:end] != content for (begin, end), content in zip(spans, contents, strict=True)
        ):
            return None
        if any(piece == "" or self._text.may_join(piece) for piece in pieces[1:-1]):
            return None
        if any(piece and self._text.may_join(piece) for piece in (pieces[0], pieces[-1])):
            return None
        places = {place: self._place(place, cuts, pieces) for place in _places(found)}
        if None in places.values():
            return None
        known = {place: at for place, at in places.items() if at is not None}
        return Frame(
            pieces,
            tuple(map(self._text.mark_controls, pieces)),
            tuple((known[begin], known[end]) for begin, end in found.turns),
            tuple(known[begin] for begin in found.prompts),
        )

    def _place(self, place: int, cuts: Sequence[int], pieces: Sequence[str]) -> Place | None:
        for number, piece in enumerate(pieces):
            begin = cuts[2 * number]
            if begin <= place <= begin + len(piece):
                head = piece[: place - begin]
                return number, len(self._text.mark_controls(head))
        return None


def _places(found: Rendered) -> set[int]:
    return {*found.prompts, *(place for turn in found.turns for place in turn)}


def words_of(source: str) -> tuple[list[str], frozenset[str]]:
    """What a template may look for in a content.

    Returns:
        Texts that it searches for, and all texts that a content could be compared with.
    """
    from graft.data.chat.sandbox import Environment

    parsed = Environment().parse(source)
    searched: set[str] = set()
    for compare in parsed.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            searched.update(_texts(compare.expr))
    for call in parsed.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr not in _TRIMMING:
            searched.update(text for argument in call.args for text in _texts(argument))
    for test in parsed.find_all(nodes.Test):
        searched.update(text for argument in test.args or [] for text in _texts(argument))
    return sorted(text for text in searched if text), frozenset(_texts(parsed))


_TRIMMING = ("strip", "lstrip", "rstrip", "append", "get", "items")


def _texts(node: nodes.Node) -> list[str]:
    found = [node] if isinstance(node, nodes.Const) else [*node.find_all(nodes.Const)]
    return [const.value for const in found if isinstance(const.value, str)]
