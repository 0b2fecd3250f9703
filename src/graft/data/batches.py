"""Examples on their way to the tokenizer: in batches, their texts, and which of them give nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from graft.data.examples import Conversation, Example, Pair
from graft.data.samples import Rejected
from graft.data.tokens import private_character

MAX_ROWS, MAX_CHARACTERS = 2_048, 1 << 19
"""Of a batch; the tokenizer needs some hundred bytes for each character of it meanwhile."""


def batches_of(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Some thousand examples at a time, fewer of long ones; few at first, so that nothing waits long."""
    batch: list[Example] = []
    size, most = 0, MAX_ROWS // 8
    for example in examples:
        batch.append(example)
        size += sum(map(len, texts_of(example)))
        if len(batch) == most or size >= MAX_CHARACTERS:
            yield batch
            batch, size, most = [], 0, min(2 * most, MAX_ROWS)
    if batch:
        yield batch


def refusal(example: Example, texts: Sequence[str]) -> Rejected | None:
    """Why an example with these texts gives no sample, whatever the tokenizer; None where it may."""
    for text in texts:
        # Asking whether a text is ASCII costs nothing; most are.
        if not text.isascii() and (char := private_character(text)):
            reason = f"the text holds the private character U+{ord(char):X}, which graft needs for itself"
            return Rejected(example.where, reason, "remove the character", invalid=True)
    if isinstance(example, Conversation):
        return _check_images(example) if example.images else None
    if texts[-1].strip():
        return None
    what = "the completion is empty" if isinstance(example, Pair) else "the text is empty"
    return Rejected(example.where, f"nothing to learn: {what}")


def _check_images(example: Conversation) -> Rejected:
    assert example.images is not None
    count = len(example.images.paths)
    return Rejected(
        example.where,
        f"the row has {count} {'image' if count == 1 else 'images'}: only a multimodal base could "
        f"learn from it, "
        "and graft trains on text alone",
        "leave out the column of images and the <image> marks, or the row (data.skip_invalid)",
        invalid=True,
    )


def texts_of(example: Example) -> Sequence[str]:
    """All texts of an example, of a pair or a plain text those that are encoded, in their order."""
    if isinstance(example, Conversation):
        if not example.tools and all(len(message) == 2 for message in example.messages):
            return [message["content"] for message in example.messages]
        return list(_strings([example.messages, example.tools]))
    return (example.prompt, example.completion) if isinstance(example, Pair) else (example.text,)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _strings(part)
