"""What the columns of a row mean: text, prompt and completion, messages, alpaca or sharegpt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.config import closest
from graft.data.sources import Row
from graft.errors import DataError

PROMPTS = ("prompt", "question", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "context",
    "tool_call",
    "tool_response",
    "assistant_tool_call",
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
MAX_TURNS = 10_000
"""Most messages of one conversation."""
_LOOKED_AT = 100
_USED = {
    "text": ("text",),
    "prompt_completion": (),
    "messages": ("messages", "conversations", "conversation", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools"),
    "sharegpt": ("conversations", "conversation", "system", "tools"),
}

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with roles; the assistant's are learned from `trained_from` on."""

    messages: list[Message]
    where: str
    tools: list[Any] | None = None
    trained_from: int = 0


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


@dataclass(frozen=True)
class Detected:
    """What a file's rows are.

    Attributes:
        format: "text", "prompt_completion", "messages", "alpaca", "sharegpt"; or "mixed": each row its own.
        reason: Why, for the user.
        columns: The column that plays each part, where its name is free ("prompt" -> "question").
    """

    format: str
    reason: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def unused(self, row: Row) -> list[str]:
        """The columns of a row that this format has no part for."""
        if isinstance(row.value, str):
            return []
        own = detect([row]) if self.format == "mixed" else self
        used = {*own.columns.values(), *_USED[own.format]}
        return [name for name in row.value if name not in used]


def detect(rows: Sequence[Row], wanted: str = "auto") -> Detected:
    """Say what the rows are from the names and kinds of their columns.

    Args:
        rows: At least one row; the first hundred are looked at.
        wanted: A format that the user named, or "auto".

    Raises:
        DataError: The columns fit no format that can be trained on.
    """
    if wanted != "auto":
        return Detected(wanted, "named by data.format", _columns_for(wanted, rows))
    fits = [fit for row in rows[:_LOOKED_AT] if (fit := _fit(row)) is not None]
    if not fits:
        raise _unknown_columns(rows[0])
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
    if detected.format == "mixed":
        detected = detect([row])
    if isinstance(row.value, str):
        if detected.format != "text":
            raise DataError(
                f"a plain text cannot be read as {detected.format}", where=row.where, fix="format: text"
            )
        return Text(row.value, row.where)
    if detected.format == "text":
        return Text(_text(row, detected.columns.get("text", "text")), row.where)
    if detected.format == "prompt_completion":
        return _pair(row, detected.columns)
    read = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca}[detected.format]
    conversation = read(row)
    if detected.format != "messages" and not chat:
        return plain_pair(conversation)
    return conversation


def plain_pair(conversation: Conversation) -> Pair:
    """A conversation as headed plain text, its last answer as the completion.

    Raises:
        DataError: The conversation does not end with an answer.
    """
    *history, last = conversation.messages
    if last["role"] != "assistant":
        raise DataError("the conversation does not end with an answer", where=conversation.where)
    return Pair(plain_prompt(history), last["content"], conversation.where)


def plain_prompt(messages: Sequence[Message]) -> str:
    """Messages as headed plain text, ready for the answer; for tokenizers without a chat template."""
    headings = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Input:\n"}
    parts = [headings.get(message["role"], "") + message["content"] + "\n\n" for message in messages]
    return "".join(parts) + "### Response:\n"


def _fit(row: Row) -> Detected | None:
    if isinstance(row.value, str):
        return Detected("text", "a plain text file is one document")
    value = row.value
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


def _unknown_columns(row: Row) -> DataError:
    assert isinstance(row.value, dict)
    names = ", ".join(map(repr, row.value)) or "none"
    if "chosen" in row.value:
        return DataError(
            f"the rows are preferences (columns {names}), which are not trained on",
            where=row.where,
            fix="make rows of 'prompt' and 'completion' from the prompt and the chosen answer",
        )
    return DataError(
        f"the columns {names} fit no known format",
        where=row.where,
        fix="name them 'prompt' and 'completion', 'messages', 'instruction' and 'output', or 'text'",
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _text(row: Row, name: str) -> str:
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


def _pair(row: Row, columns: Mapping[str, str]) -> Pair:
    prompt, completion = columns.get("prompt", "prompt"), columns.get("completion", "completion")
    return Pair(_text(row, prompt), _text(row, completion), row.where)


def _messages(row: Row) -> Conversation:
    assert isinstance(row.value, dict)
    value = row.value
    name = next((name for name in ("messages", "conversations", "conversation") if name in value), None)
    prompts: list[Any] = []
    if name is None and _is_list(value.get("prompt")) and _is_list(value.get("completion")):
        prompts, turns = value["prompt"], value["completion"]
    elif name is None or not _is_list(value[name]):
        raise DataError(
            "the row has no list of messages",
            where=row.where,
            fix='write {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    else:
        turns = value[name]
    messages = [_message(raw, index, row) for index, raw in enumerate([*prompts, *turns])]
    return _conversation(messages, row, trained_from=len(prompts))


def _conversation(messages: list[Message], row: Row, trained_from: int = 0) -> Conversation:
    assert isinstance(row.value, dict)
    if not messages:
        raise DataError(
            "the conversation is empty", where=row.where, fix="remove the row, or set skip_invalid"
        )
    if len(messages) > MAX_TURNS:
        raise DataError(
            f"the conversation has {len(messages):,} messages, more than {MAX_TURNS:,}",
            where=row.where,
            fix="split it into several rows",
        )
    if isinstance(row.value.get("system"), str) and row.value["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row.value["system"]}, *messages]
        trained_from += 1 if trained_from else 0
    return Conversation(messages, row.where, _tools(row), trained_from)


def _message(raw: Any, index: int, row: Row) -> Message:
    where = f"{row.where}, message {index + 1}"
    if not isinstance(raw, dict):
        raise DataError(
            f"a message must be an object, not {raw!r:.60}", where=where, fix="give it role and content"
        )
    role = raw.get("role")
    if not isinstance(role, str) or role not in ROLES:
        near = closest(str(role), ROLES)
        allowed = ", ".join(ROLES[:5])
        raise DataError(
            f"role {role!r} is not known; it must be one of {allowed}",
            where=where,
            fix=f"did you mean {near!r}?" if near else "rename the role",
        )
    content = _content(raw.get("content"), where, optional=bool(raw.get("tool_calls")))
    return {**raw, "content": content}


def _content(content: Any, where: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise DataError(
            "the message holds something else than text", where=where, fix="only text is trained on"
        )
    raise DataError(f"content must be text, not {content!r:.60}", where=where, fix='write "content": "..."')


def _sharegpt(row: Row) -> Conversation:
    assert isinstance(row.value, dict)
    turns = row.value.get("conversations", row.value.get("conversation"))
    if not isinstance(turns, list):
        raise DataError(
            "the row has no list of conversations",
            where=row.where,
            fix='write {"conversations": [{"from": "human", "value": "..."}, ...]}',
        )
    return _conversation([_turn(raw, index, row) for index, raw in enumerate(turns)], row)


def _turn(raw: Any, index: int, row: Row) -> Message:
    where = f"{row.where}, turn {index + 1}"
    if not isinstance(raw, dict) or not isinstance(raw.get("value"), str):
        raise DataError(f"a turn must have from and value, got {raw!r:.60}", where=where, fix="both are text")
    role = SHAREGPT_ROLES.get(str(raw.get("from")))
    if role is None:
        near = closest(str(raw.get("from")), SHAREGPT_ROLES)
        raise DataError(
            f"turn from {raw.get('from')!r} is not known; it must be one of {', '.join(SHAREGPT_ROLES)}",
            where=where,
            fix=f"did you mean {near!r}?" if near else "rename it",
        )
    return {"role": role, "content": raw["value"]}


def _tools(row: Row) -> list[Any] | None:
    assert isinstance(row.value, dict)
    tools = row.value.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"column 'tools' is not JSON: {error}", where=row.where) from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError("column 'tools' must hold a list", where=row.where, fix="wrap the tool in [ ]")
    return tools


def _alpaca(row: Row) -> Conversation:
    assert isinstance(row.value, dict)
    instruction, answer = _text(row, "instruction"), _text(row, "output")
    given = _text(row, "input") if row.value.get("input") else ""
    messages: list[Message] = []
    for pair in row.value.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise DataError(f"history must hold pairs of texts, not {pair!r:.60}", where=row.where)
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = instruction + ("\n\n" + given if given else "")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _conversation(messages, row)
