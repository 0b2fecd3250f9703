"""Chat templates: messages to text, and where in the text each answer stands.

A template is a program from the internet. It runs in the sandbox of transformers, which refuses whatever
reaches for Python's insides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes

from graft.data.formats import Conversation, Message
from graft.errors import DataError, StorageError

MAX_TEMPLATE_BYTES = 1 << 20
"""Largest template file."""

_INDENTED = re.compile(r"(^|\n)[ \t]{2,}")
_MARK = re.compile(r"\{%-?\s*generation\b")
_SENTINEL = "\U0010fffe"
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it.

    Attributes:
        text: The whole text.
        turns: Of each answer that is learned: where it begins and ends in the text. It begins where the
            prompt ends that a model would be given, and ends after the mark that closes the turn.
        prompts: Where each answer of the conversation begins, learned or not.
    """

    text: str
    turns: list[tuple[int, int]]
    prompts: list[int]


def read_template(path: str | Path) -> str:
    """Read a template from a Jinja file.

    A file whose tags are indented for the reader, with all its words inside the tags, is read without those
    spaces and line ends: no model was trained on them.

    Raises:
        StorageError: The file cannot be read.
        DataError: The file is too large, or is no template.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise DataError(f"the template is larger than {MAX_TEMPLATE_BYTES:,} bytes", where=str(path))
        source = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StorageError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not a text file: {error}", where=str(path), fix="save it as UTF-8") from error
    _check_syntax(source, str(path))
    return _without_indentation(source)


class ChatTemplate:
    """A chat template bound to a tokenizer.

    Args:
        tokenizer: Renders; its own template is used unless another is given.
        source: The template's text, to use instead.

    Raises:
        DataError: There is no template, or it is not a valid one.
    """

    def __init__(self, tokenizer: Any, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        if source is None and not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be rendered",
                where=str(getattr(tokenizer, "name_or_path", "")),
                fix="set data.chat_template to a .jinja file, or give rows of 'prompt' and 'completion'",
            )
        self.source: str = source if source is not None else tokenizer.get_chat_template()
        _check_syntax(
            self.source, "the tokenizer's chat template" if source is None else "data.chat_template"
        )
        self.has_marks = _MARK.search(self.source) is not None

    def render(
        self, messages: Sequence[Message], tools: Any = None, *, ask: bool = False, where: str = ""
    ) -> str:
        """Write messages as text.

        Args:
            messages: At least one.
            tools: Tool descriptions for templates that know them.
            ask: Whether to end with what makes the model answer.
            where: The row, for errors.

        Raises:
            DataError: The template refuses these messages, or does something that the sandbox forbids.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=ask,
                tokenize=False,
            )
        except jinja2.exceptions.SecurityError as error:
            raise DataError(
                f"the chat template reaches for something the sandbox forbids: {error}",
                where=where,
                fix="do not use this template; its author may mean harm",
            ) from error
        except _FAILURES as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                where=where,
                fix="change the row to the roles and order the template takes, or set skip_invalid",
            ) from error
        return text

    def find_turns(self, conversation: Conversation) -> Rendered:
        """Render a conversation and find the answers in it.

        An answer begins where the rendering of all messages before it, asking for an answer, ends; it ends
        where the rendering up to it ends, without the white space there. Where the template marks answers
        with {% generation %} only what is marked is learned, and the closing of the turn.

        Raises:
            DataError: The template refuses the conversation, or writes the messages before an answer
                differently once the answer is there and marks nothing.
        """
        messages = conversation.messages
        text = self.render(messages, conversation.tools, where=conversation.where)
        answers = [index for index, message in enumerate(messages) if message["role"].startswith("assistant")]
        marks = self._marks(conversation) if self.has_marks else None
        try:
            turns = {index: self._turn(text, conversation, index) for index in answers}
        except DataError:
            if not marks or len(marks) != len(answers):
                raise
            turns = dict(zip(answers, marks, strict=True))
        wanted = [i for i in answers if i >= conversation.trained_from and not _is_empty(messages[i])]
        learned = [span for i in wanted for span in _within(turns[i], marks)]
        return Rendered(text, learned, [begin for begin, _ in turns.values()])

    def _turn(self, text: str, conversation: Conversation, index: int) -> tuple[int, int]:
        begin = self._begin(text, conversation, index)
        return begin, max(begin, self._end(text, conversation, index))

    def _begin(self, text: str, conversation: Conversation, index: int) -> int:
        where = f"{conversation.where}, message {index + 1}"
        if index == 0:
            raise DataError(
                "an answer stands first, with nothing to answer", where=where, fix="begin with the user"
            )
        prompt = self.render(conversation.messages[:index], conversation.tools, ask=True, where=where)
        if not text.startswith(prompt):
            raise DataError(
                "the chat template writes the prompt differently once the answer is there",
                where=where,
                fix="use a template that marks answers with {% generation %}",
            )
        return len(prompt)

    def _end(self, text: str, conversation: Conversation, index: int) -> int:
        messages, where = conversation.messages, conversation.where
        last = index == len(messages) - 1
        so_far = text if last else self.render(messages[: index + 1], conversation.tools, where=where)
        if text.startswith(so_far):
            return len(so_far.rstrip())
        return self._end_by_content(text, conversation, index)

    def _end_by_content(self, text: str, conversation: Conversation, index: int) -> int:
        """Where templates write a later history differently: after the content and its closing mark.

        Raises:
            DataError: The content does not come through the template as it is.
        """
        changed = list(conversation.messages)
        changed[index] = {**changed[index], "content": changed[index]["content"] + _SENTINEL}
        whole = self.render(changed, conversation.tools, where=conversation.where)
        alone = self.render(changed[: index + 1], conversation.tools, where=conversation.where)
        closing = alone.partition(_SENTINEL)[2].rstrip()
        at = whole.find(_SENTINEL)
        if at < 0 or whole.replace(_SENTINEL, "") != text or not text.startswith(closing, at):
            raise DataError(
                "the end of an answer cannot be found in the rendered conversation",
                where=f"{conversation.where}, message {index + 1}",
                fix="use a template that marks answers with {% generation %}",
            )
        return at + len(closing)

    def _marks(self, conversation: Conversation) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(begin, end) for begin, end in spans[0] if end > begin]


def _within(turn: tuple[int, int], marks: list[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """What is learned of a turn: all of it, or what is marked; the last mark reaches to the turn's end."""
    if marks is None:
        return [turn]
    inside = [mark for mark in marks if turn[0] <= mark[0] < turn[1]]
    return [*inside[:-1], (inside[-1][0], max(inside[-1][1], turn[1]))] if inside else []


def _without_indentation(source: str) -> str:
    joined = "".join(line.strip() for line in source.splitlines())
    parsed = _parse(source)
    words = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
    indented = all(not text.strip() for text in words) and any(_INDENTED.search(text) for text in words)
    return joined if indented and _strings(_parse(joined)) == _strings(parsed) else source


def _strings(parsed: jinja2.nodes.Template) -> list[Any]:
    return [node.value for node in parsed.find_all(jinja2.nodes.Const)]


def _is_empty(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _parse(source: str) -> jinja2.nodes.Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    parsed: jinja2.nodes.Template = _compile_jinja_template(source).environment.parse(source)
    return parsed


def _check_syntax(source: str, where: str) -> None:
    try:
        _parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"not a template: {error}", where=f"{where}:{error.lineno}", fix="correct the file"
        ) from error
