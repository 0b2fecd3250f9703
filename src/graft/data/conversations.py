"""How a row becomes a conversation: messages with roles, turns of ShareGPT, instructions of Alpaca."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from graft.config import closest
from graft.data.examples import IMAGE_MARK, Conversation, Message, column_text
from graft.data.images import images_of
from graft.data.sources import Row
from graft.errors import DataError

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
FLAGS = ("train", "weight")
"""Fields of a message that say whether it is learned."""
FOREIGN_FLAGS = (
    "training", "trainable", "train_on_turn", "train_detail", "training_detail", "loss_weight", "train_on",
)  # fmt: skip
"""Names of other tools for the same."""
MAX_TURNS = 1_000
"""Most messages of one conversation."""


def read_messages(row: Row) -> Conversation:
    """A row with a list of messages, or with a prompt and a completion that are such lists.

    Raises:
        DataError: There is no such list, or a message is malformed.
    """
    assert isinstance(row.value, dict)
    value = row.value
    name = next((name for name in ("messages", "conversations", "conversation") if name in value), None)
    prompts: list[Any] = []
    if name is None and isinstance(value.get("prompt"), list) and isinstance(value.get("completion"), list):
        prompts, turns = value["prompt"], value["completion"]
    elif name is None or not isinstance(value[name], list):
        raise DataError(
            "the row has no list of messages",
            where=row.where,
            fix='write {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    else:
        turns = value[name]
    raws = [*prompts, *turns]
    messages = [_message(raw, index, row) for index, raw in enumerate(raws)]
    return _conversation(messages, row, trained_from=len(prompts), raws=raws)


def _conversation(
    messages: list[Message], row: Row, trained_from: int = 0, raws: Sequence[Any] = ()
) -> Conversation:
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
    added = len(messages) - len(raws)
    flags = {
        index + added: flag
        for index, raw in enumerate(raws)
        if len(raw) > 2 and (flag := _flag(raw, f"{row.where}, message {index + 1}")) is not None
    }
    images = None
    if _may_have_images(row.value, raws):
        messages, images = images_of(row, messages, raws)
    return Conversation(messages, row.where, _tools(row), trained_from, flags, images)


def _may_have_images(value: Mapping[str, Any], raws: Sequence[Any]) -> bool:
    return bool(value.get("images") or value.get("image")) or any(
        isinstance(raw.get("content"), list) for raw in raws
    )


def _flag(raw: Mapping[str, Any], where: str) -> bool | None:
    """What a message says of itself: `"train"` or `"weight"`, true or false, 1 or 0.

    Raises:
        DataError: It says something else, both of two things, or says it under another tool's name.
    """
    found = None
    for name in FLAGS:
        if name in raw and raw[name] is not None:
            if raw[name] not in (0, 1):
                raise DataError(
                    f"{name!r} must be true or false, not {raw[name]!r:.60}",
                    where=where,
                    fix=(
                        f'write "{name}": false for a message that is not learned; there are no parts of a '
                        f"weight"
                    ),
                )
            if found is not None and found != bool(raw[name]):
                raise DataError(
                    f"'train' is {raw['train']!r} and 'weight' is {raw['weight']!r}: "
                    "one of them learns the message",
                    where=where,
                    fix="keep one of them",
                )
            found = bool(raw[name])
    for name in FOREIGN_FLAGS:
        if name in raw:
            raise DataError(
                f"the message has the field {name!r}, which here is called 'train'",
                where=where,
                fix=f'rename {name!r} to "train", true or false',
            )
    return found


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
    if "content" not in raw and "value" in raw:
        raise DataError("the message has 'role' and 'value'", where=where, fix="rename 'value' to 'content'")
    content = _content(raw.get("content"), where, optional=bool(raw.get("tool_calls")))
    message = {**raw, "content": content}
    if len(message) > 2:
        for name in FLAGS:
            message.pop(name, None)
        _check_calls(message.get("tool_calls"), where)
    return message


def _check_calls(calls: Any, where: str) -> None:
    """Refuse tool calls that no template can write.

    Raises:
        DataError: They are no list of objects with a name.
    """
    if calls is None:
        return
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if (
            not isinstance(calls, list)
            or not isinstance(inner, dict)
            or not isinstance(inner.get("name"), str)
        ):
            raise DataError(
                f"tool_calls must be a list of calls with a name, not {calls!r:.80}",
                where=where,
                fix=(
                    'write "tool_calls": [{"type": "function", "function": {"name": "...", "arguments": '
                    "{...}}}]"
                ),
            )


def _content(content: Any, where: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [_part_text(part) for part in content]
        if None not in texts:
            return "".join(text for text in texts if text is not None)
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        raise DataError(
            f"the message holds something else than text and images: {kinds!r:.80}",
            where=where,
            fix='write parts as {"type": "text", "text": "..."} and {"type": "image", "path": "..."}',
        )
    raise DataError(f"content must be text, not {content!r:.60}", where=where, fix='write "content": "..."')


def _part_text(part: Any) -> str | None:
    """The text of a part of a message, an image's being its mark; None where it is neither."""
    if not isinstance(part, dict):
        return None
    if part.get("type") in ("image", "image_url") or (part.get("type") is None and "image" in part):
        return IMAGE_MARK
    return part["text"] if isinstance(part.get("text"), str) else None


def read_sharegpt(row: Row) -> Conversation:
    """A row whose conversation has turns with `from` and `value`.

    Raises:
        DataError: There is no such list, or a turn is malformed.
    """
    assert isinstance(row.value, dict)
    turns = row.value.get("conversations", row.value.get("conversation"))
    if not isinstance(turns, list):
        raise DataError(
            "the row has no list of conversations",
            where=row.where,
            fix='write {"conversations": [{"from": "human", "value": "..."}, ...]}',
        )
    return _conversation([_turn(raw, index, row) for index, raw in enumerate(turns)], row, raws=turns)


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


def history_of(raws: Sequence[Any], row: Row) -> list[Message]:
    """Messages of either dialect: role and content, or from and value.

    Raises:
        DataError: One is malformed; it is named.
    """
    return [
        _turn(raw, index, row) if isinstance(raw, dict) and "from" in raw else _message(raw, index, row)
        for index, raw in enumerate(raws)
    ]


def continued(history: list[Message], answer: list[Message], row: Row) -> Conversation:
    """A conversation of which only the last messages are learned; the row's system and tools go with it.

    Raises:
        DataError: It has no message, or too many.
    """
    return _conversation([*history, *answer], row, trained_from=len(history), raws=[*history, *answer])


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


def read_alpaca(row: Row) -> Conversation:
    """A row with instruction and output, and maybe input, system and a history of pairs.

    Raises:
        DataError: A column is missing or holds something else than text.
    """
    assert isinstance(row.value, dict)
    instruction, answer = column_text(row, "instruction"), column_text(row, "output")
    given = column_text(row, "input") if row.value.get("input") else ""
    messages: list[Message] = []
    for pair in row.value.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise DataError(f"history must hold pairs of texts, not {pair!r:.60}", where=row.where)
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = instruction + ("\n\n" + given if given else "")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _conversation(messages, row)
