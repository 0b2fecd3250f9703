"""What the columns of a row mean: text, prompt and completion, messages, alpaca or sharegpt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from graft.data.conversations import read_alpaca, read_messages, read_sharegpt
from graft.data.examples import (
    Conversation,
    Example,
    Message,
    Pair,
    Text,
    column_text,
    plain_pair,
    plain_prompt,
)
from graft.data.prompts import PromptTemplate, completion_of
from graft.data.sources import Row
from graft.errors import DataError

__all__ = [
    "CHAT_FORMATS",
    "Conversation",
    "Detected",
    "Example",
    "Message",
    "Pair",
    "Text",
    "detect",
    "plain_prompt",
    "to_example",
]

PROMPTS = ("prompt", "question", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
CHAT_FORMATS = ("messages", "alpaca", "sharegpt", "mixed", "preference_chat")
"""Data formats that are rendered with the chat template where there is one."""

_LOOKED_AT = 100
_IMAGES = ("images", "image")
_USED = {
    "text": ("text",),
    "prompt_completion": (),
    "messages": ("messages", "conversations", "conversation", "system", "tools", *_IMAGES),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools", *_IMAGES),
    "sharegpt": ("conversations", "conversation", "system", "tools", *_IMAGES),
}


@dataclass(frozen=True)
class Detected:
    """What a file's rows are.

    Attributes:
        format: "text", "prompt_completion", "messages", "alpaca", "sharegpt"; or "mixed": each row its own.
        reason: Why, for the user.
        columns: The column that plays each part, where its name is free ("prompt" -> "question").
        template: What writes the prompts, where the user gave it.
    """

    format: str
    reason: str
    columns: Mapping[str, str] = field(default_factory=dict)
    template: PromptTemplate | None = None

    def unused(self, row: Row) -> list[str]:
        """The columns of a row that this format has no part for."""
        if isinstance(row.value, str):
            return []
        own = detect([row]) if self.format == "mixed" else self
        used = {*own.columns.values(), *_USED[own.format]}
        return [name for name in row.value if name not in used]


def detect(rows: Sequence[Row], wanted: str = "auto", prompt_template: str | None = None) -> Detected:
    """Say what the rows are from the names and kinds of their columns.

    Args:
        rows: At least one row; the first hundred are looked at.
        wanted: A format that the user named, or "auto".
        prompt_template: What writes the prompts, so that only the answer's column has to be found.

    Raises:
        ConfigError: The template is none.
        DataError: The columns fit no format that can be trained on.
    """
    if prompt_template is not None:
        template = PromptTemplate.parse(prompt_template)
        template.fill(rows[0])
        columns = {"completion": completion_of(rows[0]), **{name: name for name in template.columns}}
        return Detected("prompt_completion", "data.prompt_template writes the prompts", columns, template)
    if wanted != "auto":
        return Detected(wanted, "named by data.format", _columns_for(wanted, rows))
    looked = rows[:_LOOKED_AT]
    if all(_is_labelled(row) for row in looked):
        _refuse_labels(looked[0])
    if any(_is_rated(row) for row in looked):
        _refuse_ratings(next(row for row in looked if _is_rated(row)))
    fits = [fit for row in looked if (fit := _fit(row)) is not None]
    if not fits:
        _refuse_columns(rows[0])
    (name, _), count = Counter((fit.format, fit.reason) for fit in fits).most_common(1)[0]
    best = next(fit for fit in fits if fit.format == name)
    looked_at = min(len(rows), _LOOKED_AT)
    if count == looked_at:
        return best
    return Detected(best.format, f"{best.reason}, in {count} of the first {looked_at} rows", best.columns)


def to_example(row: Row, format: str | Detected, *, chat: bool = True) -> Example:
    """Read one row as the given format.

    Args:
        row: The row.
        format: What `detect` found, or the name of a format.
        chat: Whether the tokenizer has a chat template; without one alpaca and sharegpt rows become a
            prompt with "### Instruction:" and "### Response:" headings and a completion.

    Raises:
        DataError: A column is missing or holds something else than it should.
    """
    detected = format if isinstance(format, Detected) else detect([row], format)
    if detected.template is not None:
        return detected.template.example(row)
    if detected.format == "mixed":
        detected = detect([row])
    if isinstance(row.value, str):
        if detected.format != "text":
            raise DataError(
                f"a plain text cannot be read as {detected.format}", where=row.where, fix="format: text"
            )
        return Text(row.value, row.where)
    if detected.format in ("text", "prompt_completion") and any(row.value.get(name) for name in _IMAGES):
        raise DataError(
            f"the row has images, and {detected.format} has no place for them",
            where=row.where,
            fix='write "messages" with <image> where each image belongs',
        )
    if detected.format == "text":
        return Text(column_text(row, detected.columns.get("text", "text")), row.where)
    if detected.format == "prompt_completion":
        return _pair(row, detected.columns)
    read = {"messages": read_messages, "sharegpt": read_sharegpt, "alpaca": read_alpaca}[detected.format]
    conversation = read(row)
    if detected.format != "messages" and not chat and conversation.images is None:
        return plain_pair(conversation)
    return conversation


def _fit(row: Row) -> Detected | None:
    if isinstance(row.value, str):
        return Detected("text", "a plain text file is one document")
    value = row.value
    if "chosen" in value and "rejected" in value:
        return None
    if _is_list(value.get("messages")):
        return Detected("messages", "the column 'messages' holds a list")
    turns = value.get("conversations", value.get("conversation"))
    if _is_list(turns):
        first = turns[0] if turns else None
        if isinstance(first, dict) and "role" in first:
            return Detected("messages", "the column 'conversations' holds messages with roles")
        return Detected("sharegpt", "the column 'conversations' holds a list")
    if "instruction" in value and "output" in value:
        return Detected("alpaca", "the columns 'instruction' and 'output' are there")
    prompt = next((name for name in PROMPTS if name in value), None)
    completion = next((name for name in COMPLETIONS if name in value), None)
    if prompt and completion:
        columns = {"prompt": prompt, "completion": completion}
        if _is_list(value[prompt]) and _is_list(value[completion]):
            return Detected("messages", f"the columns {prompt!r} and {completion!r} hold messages", columns)
        return Detected("prompt_completion", f"the columns {prompt!r} and {completion!r} are there", columns)
    if isinstance(value.get("text"), str):
        return Detected("text", "the column 'text' is there", {"text": "text"})
    return None


def _columns_for(wanted: str, rows: Sequence[Row]) -> Mapping[str, str]:
    if wanted != "prompt_completion" or not rows or isinstance(rows[0].value, str):
        return {}
    names = rows[0].value
    prompt = next((name for name in (*PROMPTS, "instruction") if name in names), "prompt")
    completion = next((name for name in COMPLETIONS if name in names), "completion")
    return {"prompt": prompt, "completion": completion}


def _is_labelled(row: Row) -> bool:
    """Whether a row is a text with a class, and nothing that could be an answer."""
    value = row.value
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return False
    label = value.get("label")
    return isinstance(label, str | int) and not any(name in value for name in (*COMPLETIONS, *PROMPTS))


def _is_rated(row: Row) -> bool:
    """Whether a row is an answer with a thumb up or down."""
    value = row.value
    return isinstance(value, dict) and isinstance(value.get("label"), bool) and "completion" in value


def _refuse_ratings(row: Row) -> NoReturn:
    raise DataError(
        "the rows are rated answers ('label' is true or false), of which the bad ones would be learned too",
        where=row.where,
        fix=(
            "keep the rows whose label is true and leave the column out, or make pairs of "
            "'chosen' and 'rejected'"
        ),
    )


def _refuse_labels(row: Row) -> NoReturn:
    raise DataError(
        "the rows are texts with a class (columns 'text' and 'label'): task: classification learns from them",
        where=row.where,
        fix=(
            "give --task classification, or set data.format to text to learn the texts and leave "
            "the labels out"
        ),
    )


def _refuse_columns(row: Row) -> NoReturn:
    assert isinstance(row.value, dict)
    names = ", ".join(map(repr, row.value)) or "none"
    if "chosen" in row.value:
        raise DataError(
            f"the rows are preferences (columns {names}): training.loss: dpo learns from them",
            where=row.where,
            fix="set training.loss to dpo, or make rows of 'prompt' and 'completion' of the chosen answers",
        )
    raise DataError(
        f"the columns {names} fit no known format",
        where=row.where,
        fix="name them 'prompt' and 'completion', 'messages', 'instruction' and 'output', or 'text'",
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _pair(row: Row, columns: Mapping[str, str]) -> Pair:
    prompt, completion = columns.get("prompt", "prompt"), columns.get("completion", "completion")
    return Pair(column_text(row, prompt), column_text(row, completion), row.where)
