"""Chat templates: messages to text.

A template is a program from the internet. It runs in the sandbox of transformers, which refuses whatever
reaches for Python's insides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
                fix="change the row to the roles and order the template takes, or set data.skip_invalid",
            ) from error
        return text

    def marks(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Where the template's {% generation %} marks begin and end in the rendered conversation."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(begin, end) for begin, end in spans[0] if end > begin]


def _without_indentation(source: str) -> str:
    joined = "".join(line.strip() for line in source.splitlines())
    parsed = _parse(source)
    words = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
    indented = all(not text.strip() for text in words) and any(_INDENTED.search(text) for text in words)
    return joined if indented and _strings(_parse(joined)) == _strings(parsed) else source


def _strings(parsed: jinja2.nodes.Template) -> list[Any]:
    return [node.value for node in parsed.find_all(jinja2.nodes.Const)]


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
