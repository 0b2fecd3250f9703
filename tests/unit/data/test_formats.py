"""What columns mean, and what rows of each format become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.data.examples import Conversation, Pair, Text
from graft.data.formats import detect, to_example
from graft.data.sources import Row, read_rows
from graft.errors import DataError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def row(**columns: Any) -> Row:
    return Row(columns, "rows:1")


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ({"text": "x"}, "text"),
        ({"prompt": "x", "completion": "y"}, "prompt_completion"),
        ({"question": "x", "answer": "y"}, "prompt_completion"),
        ({"input": "x", "output": "y"}, "prompt_completion"),
        ({"instruction": "x", "input": "", "output": "y"}, "alpaca"),
        ({"messages": CHAT}, "messages"),
        ({"conversations": CHAT}, "messages"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
    ],
)
def test_the_format_is_read_from_the_columns_and_says_why(columns: dict[str, Any], format: str) -> None:
    detected = detect([row(**columns)])
    assert detected.format == format
    assert next(iter(columns)) in detected.reason


@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("instruct/alpaca_en_demo.json", "alpaca"),
        ("instruct/glaive_toolcall_en_demo.json", "sharegpt"),
        ("instruct/identity.json", "alpaca"),
        ("instruct/wiki_demo.txt", "text"),
        ("gsm8k/test.jsonl", "prompt_completion"),
        ("books/black-beauty.txt", "text"),
    ],
)
def test_real_files_are_recognised_and_read(shared: Path, file: str, format: str) -> None:
    rows = list(read_rows(shared / "datasets" / file))
    detected = detect(rows)
    assert detected.format == format
    assert len([to_example(row, detected) for row in rows]) == len(rows)


@pytest.mark.parametrize("file", ["instruct/dpo_en_demo.json", "mt_bench/question.jsonl"])
def test_real_files_of_other_kinds_are_refused(shared: Path, file: str) -> None:
    with pytest.raises(DataError):
        detect(list(read_rows(shared / "datasets" / file)))


def test_rows_become_examples() -> None:
    assert to_example(row(text="x"), "text") == Text("x", "rows:1")
    assert to_example(Row("x", "f:1"), "text") == Text("x", "f:1")
    assert to_example(row(query="x", response="y"), "prompt_completion") == Pair("x", "y", "rows:1")
    assert to_example(row(messages=CHAT), "messages") == Conversation(CHAT, "rows:1")


def test_alpaca_becomes_a_chat_or_headed_text() -> None:
    value = row(instruction="Do", input="this", output="Done", system="Be", history=[["a", "b"]])
    chat = to_example(value, "alpaca")
    assert isinstance(chat, Conversation)
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        ("system", "Be"), ("user", "a"), ("assistant", "b"), ("user", "Do\n\nthis"), ("assistant", "Done"),
    ]  # fmt: skip
    pair = to_example(value, "alpaca", chat=False)
    assert isinstance(pair, Pair)
    assert pair.completion == "Done"
    assert pair.prompt == (
        "Be\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nDo\n\nthis\n\n### Response:\n"
    )


def test_sharegpt_becomes_messages_with_tools() -> None:
    turns = [{"from": name, "value": name} for name in ("human", "function_call", "observation", "gpt")]
    tools = [{"name": "f"}]
    chat = to_example(row(conversations=turns, system="S", tools=json.dumps(tools)), "sharegpt")
    assert isinstance(chat, Conversation)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.tools == tools


def test_a_prompt_of_messages_is_not_learned() -> None:
    chat = to_example(row(prompt=[*CHAT, CHAT[0]], completion=CHAT[1:]), "messages")
    assert isinstance(chat, Conversation)
    assert chat.messages == [*CHAT, *CHAT]
    assert chat.trained_from == 3


def test_text_parts_are_joined_and_other_fields_kept() -> None:
    message = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    chat = to_example(row(messages=[CHAT[0], message, call]), "messages")
    assert isinstance(chat, Conversation)
    assert chat.messages[1]["content"] == "ab"
    assert chat.messages[2] == {**call, "content": ""}


@pytest.mark.parametrize(
    ("columns", "format", "fix"),
    [
        ({"instruction": "x", "outputs": "y"}, "alpaca", "rename 'outputs' to 'output'"),
        ({"conversations": [{"from": "humans", "value": "x"}]}, "sharegpt", "did you mean 'human'?"),
        ({"messages": [{"role": "assitant", "content": "x"}]}, "messages", "did you mean 'assistant'?"),
    ],
)
def test_a_slip_of_the_pen_gets_the_closest_name(columns: dict[str, Any], format: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        to_example(row(**columns), format)
    assert caught.value.fix == fix


def test_columns_without_a_part_are_told() -> None:
    value = row(prompt="x", completion="y", label=3)
    assert detect([value]).unused(value) == ["label"]
