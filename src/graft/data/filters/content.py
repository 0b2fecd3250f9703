"""What an example says, apart from where it stands: by this, examples are compared."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from graft.data.examples import Conversation, Example, Message, Pair

DIGEST_BYTES = 16
"""Two different contents share a digest of 128 bits with a chance of n**2 / 2**129 among n."""


@dataclass(frozen=True, slots=True)
class Content:
    """One example as comparisons see it.

    Attributes:
        where: The row.
        digest: Of all that the example says: prompt, answer, roles, tools; not of where it stands.
        prompt_digest: Of all that stands before the last answer; None for a plain text.
        prompt: The text that is given: the prompt, or all messages that are not the assistant's.
        answer: The text that is learned: the completion, the assistant's messages with their tool calls, or a
            plain text.
    """

    where: str
    digest: bytes
    prompt_digest: bytes | None
    prompt: str
    answer: str


def content_of(example: Example) -> Content:
    """What an example says.

    Cost: 10 microseconds for a short row.
    """
    kind: Any = type(example)
    digest = _digest([kind.__name__, *(getattr(example, name) for name in _said(kind))])
    if isinstance(example, Pair):
        prompt = _digest(["prompt", example.prompt])
        return Content(example.where, digest, prompt, example.prompt, example.completion)
    if isinstance(example, Conversation):
        return _conversation(example, digest)
    return Content(example.where, digest, None, "", example.text)


def normalized(text: str) -> str:
    """A text in Unicode's composed form (NFC), each stretch of white space one space, none at its ends."""
    text = " ".join(text.split())
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _conversation(example: Conversation, digest: bytes) -> Content:
    messages = example.messages
    answered = messages[-1]["role"].startswith("assistant")
    before = ["prompt", messages[:-1], example.tools]
    return Content(
        example.where,
        digest,
        _digest(before) if answered else None,
        _joined(messages, learned=False),
        _joined(messages, learned=True),
    )


def _joined(messages: Sequence[Message], *, learned: bool) -> str:
    texts: list[str] = []
    for message in messages:
        if message["role"].startswith("assistant") == learned:
            texts.append(str(message["content"]))
            if message.get("tool_calls"):
                texts.append(json.dumps(message["tool_calls"], ensure_ascii=False, default=repr))
    return "\n".join(texts)


@cache
def _said(kind: Any) -> tuple[str, ...]:
    """The fields of an example but for the place."""
    return tuple(field.name for field in fields(kind) if field.name != "where")


def _digest(parts: Sequence[Any]) -> bytes:
    """The digest of texts and structures; each with its length before it, so that no two lists look alike."""
    texts = [normalized(part) if isinstance(part, str) else _json(part) for part in parts]
    data = "".join(f"{len(text)}:{text}" for text in texts)
    return hashlib.blake2b(data.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _json(value: Any) -> str:
    # Anything that JSON does not know (an image, a path) counts as what it shows of itself. The sign before
    # it keeps a structure from being taken for the text of the same spelling.
    data = json.dumps(_normalized(value), sort_keys=True, ensure_ascii=False, default=repr)
    return f"\0{data}"


def _normalized(value: Any) -> Any:
    if isinstance(value, str):
        return normalized(value)
    if isinstance(value, dict):
        return {name: _normalized(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_normalized(part) for part in value]
    return value
