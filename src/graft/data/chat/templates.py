"""Chat templates: messages to text.

A template is a program from the internet. It runs in a sandbox that refuses whatever reaches for Python's
insides, and with a budget for its work (`sandbox.py`, `budget.py`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes

from graft.data.chat import sandbox
from graft.data.chat.budget import SpentError
from graft.data.examples import Conversation, Message
from graft.errors import DataError, StorageError

MAX_TEMPLATE_BYTES = 1 << 20
"""Largest template file."""

_INDENTED = re.compile(r"(^|\n)[ \t]{2,}")
_MARK = re.compile(r"\{%-?\s*generation\b")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
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


def writes_date(source: Any) -> bool:
    """Whether a chat template asks what day it is.

    Args:
        source: Its text, or what a tokenizer has: several texts by their names, or None.
    """
    sources = source.values() if isinstance(source, dict) else [source]
    return any("strftime_now" in each for each in sources if each)


class ChatTemplate:
    """A chat template bound to a tokenizer.

    Args:
        tokenizer: Renders; its own template is used unless another is given.
        source: The template's text, to use instead.
        day: What it takes for today; the day of each rendering if left out.

    Raises:
        DataError: There is no template, or it is not a valid one.
    """

    def __init__(self, tokenizer: Any, source: str | None = None, day: date | None = None) -> None:
        if source is None and not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be rendered",
                where=str(getattr(tokenizer, "name_or_path", "")),
                fix="set data.chat_template to a .jinja file, or give rows of 'prompt' and 'completion'",
            )
        where = "the tokenizer's chat template" if source is None else "data.chat_template"
        self._choose = None if source is not None else tokenizer.get_chat_template
        self.source: str = source if source is not None else tokenizer.get_chat_template()
        self._words: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._day = day
        self._compiled = {self.source: _compiled(self.source, where, day)}
        self._lock = threading.RLock()
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
            DataError: The template refuses these messages, does something that the sandbox forbids, or more
                work than it may (`budget.BUDGET`).
        """
        return self._rendered(messages, tools, ask, where, None)

    def marks(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Where the template's {% generation %} marks begin and end in the rendered conversation.

        Raises:
            DataError: As `render`.
        """
        spans: list[tuple[int, int]] = []
        self._rendered(conversation.messages, conversation.tools, False, conversation.where, spans)
        return [(begin, end) for begin, end in spans if end > begin]

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Any,
        ask: bool,
        where: str,
        spans: list[tuple[int, int]] | None,
    ) -> str:
        values = {
            "messages": [_plain_message(message) for message in messages],
            "tools": tools and _plain(tools),
            "documents": None,
            "add_generation_prompt": ask,
            **self._words,
        }
        try:
            with self._lock:
                return sandbox.render(self._template(tools), values, spans)
        except jinja2.exceptions.SecurityError as error:
            raise DataError(
                f"the chat template reaches for something the sandbox forbids: {error}",
                where=where,
                fix="do not use this template; its author may mean harm",
            ) from error
        except SpentError as error:
            raise DataError(
                f"the chat template was stopped: {error}",
                where=where,
                fix="do not use this template; its author may mean harm",
            ) from error
        except _FAILURES as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                where=where,
                fix="change the row to the roles and order the template takes, or set data.skip_invalid",
            ) from error

    def _template(self, tools: Any) -> jinja2.Template:
        """The compiled template; a tokenizer may have another one for conversations with tools."""
        source = self._choose(None, tools) if self._choose is not None and tools else self.source
        if source not in self._compiled:
            self._compiled[source] = _compiled(source, "the tokenizer's chat template", self._day)
        return self._compiled[source]


def _plain_message(message: Message) -> Message:
    """A message as templates expect it: without what is null, and a thought under each of its names."""
    kept = {name: _plain(value) for name, value in message.items() if value is not None}
    if len(kept) > 2:
        thought = next((kept[name] for name in _THOUGHTS if name in kept), None)
        if thought is not None:
            kept = {"thinking": thought, **kept, "reasoning_content": thought}
    return kept


def _plain(value: Any) -> Any:
    """A value made of nothing but what JSON knows; methods of anything else could be harmful.

    Raises:
        TypeError: It holds something else.
    """
    kind = type(value)
    if kind is str or value is None or kind in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {_plain(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    for known in (str, bool, int, float):
        if isinstance(value, known):
            return known(value)
    raise TypeError(f"a template is given {kind.__name__}, not a value of JSON")


def _without_indentation(source: str) -> str:
    joined = "".join(line.strip() for line in source.splitlines())
    parsed = _parse(source)
    words = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
    indented = all(not text.strip() for text in words) and any(_INDENTED.search(text) for text in words)
    return joined if indented and _strings(_parse(joined)) == _strings(parsed) else source


def _strings(parsed: jinja2.nodes.Template) -> list[Any]:
    return [node.value for node in parsed.find_all(jinja2.nodes.Const)]


def _parse(source: str) -> jinja2.nodes.Template:
    return sandbox.Environment().parse(source)


def _check_syntax(source: str, where: str) -> None:
    with _refusing(where):
        _parse(source)


def _compiled(source: str, where: str, day: date | None) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE_BYTES:
        raise DataError(f"the template is larger than {MAX_TEMPLATE_BYTES:,} bytes", where=where)
    with _refusing(where):
        return sandbox.Environment(day).compiled(source)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"not a template: {error}", where=f"{where}:{error.lineno}", fix="correct the file"
        ) from error
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(
            f"the template cannot be compiled: {error}", where=where, fix="use a simpler one"
        ) from error
