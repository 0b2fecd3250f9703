"""What is learned from: conversations, pairs of prompt and completion, texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.config import closest
from graft.data.sources import Row
from graft.errors import DataError

IMAGE_MARK = "<image>"
"""What stands for a picture in the text of a row."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """Pictures of a row.

    Attributes:
        paths: The files, in the order in which the messages speak of them.
        places: The message that each belongs to.
    """

    paths: tuple[str, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages with roles; the assistant's are learned from `trained_from` on.

    Attributes:
        messages: Each with role and content, and whatever else the row has for the template.
        where: The row.
        tools: Descriptions of tools.
        trained_from: No message before this one is learned.
        flags: Messages of which the row itself says whether they are learned.
        images: Files of pictures that belong to it, in the order of their marks.
    """

    messages: list[Message]
    where: str
    tools: list[Any] | None = None
    trained_from: int = 0
    flags: Mapping[int, bool] = field(default_factory=dict)
    images: Images | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion that is learned."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Text:
    """A plain text, all of which is learned."""

    text: str
    where: str


Example = Conversation | Pair | Text


def column_text(row: Row, name: str) -> str:
    """The text in a column.

    Raises:
        DataError: The column is missing or holds something else.
    """
    assert isinstance(row.value, dict)
    if name not in row.value:
        near = closest(name, row.value)
        raise DataError(
            f"the row has no column {name!r}; it has {', '.join(map(repr, row.value)) or 'none'}",
            where=row.where,
            fix=f"rename {near!r} to {name!r}"
            if near
            else "give every row the same columns, or set skip_invalid",
        )
    value = row.value[name]
    if not isinstance(value, str):
        raise DataError(
            f"column {name!r} must hold text, not {type(value).__name__} ({value!r:.60})",
            where=row.where,
            fix=f'write it as text: "{name}": "..."',
        )
    return value


def plain_pair(conversation: Conversation) -> Pair:
    """A conversation as headed plain text, its last answer as the completion.

    Raises:
        DataError: The conversation does not end with an answer.
    """
    *history, last = conversation.messages
    if last["role"] != "assistant":
        raise DataError("the conversation does not end with an answer", where=conversation.where)
    if not conversation.flags.get(len(history), True):
        raise DataError(
            "the last answer is not to be learned, and without a chat template only that one can be",
            where=conversation.where,
            fix="remove the row, or set data.chat_template",
        )
    return Pair(plain_prompt(history), last["content"], conversation.where)


def plain_prompt(messages: Sequence[Message]) -> str:
    """Messages as headed plain text, ready for the answer; for tokenizers without a chat template."""
    headings = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Input:\n"}
    parts = [headings.get(message["role"], "") + message["content"] + "\n\n" for message in messages]
    return "".join(parts) + "### Response:\n"
