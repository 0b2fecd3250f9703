"""Which messages are learned: by role, by place, by what the row says; odd messages are refused."""

from __future__ import annotations

from typing import Any

import pytest

from graft.data.chat.turns import Choice
from graft.data.config import DataConfig
from graft.data.examples import Conversation, Text
from graft.data.formats import detect, to_example
from graft.data.masking import Encoder, Rejected
from graft.data.sources import Row
from graft.errors import ConfigError, DataError

SOURCE = (
    "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}"
)
ROLES = ["system", "user", "assistant", "tool", "assistant"]


def chat(**flags: Any) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": f"the {role} said {n}", **flags.get(f"m{n}", {})}
        for n, role in enumerate(ROLES)
    ]


def learned(tokenizer: Any, messages: list[dict[str, Any]], choice: Choice | None = None) -> list[int]:
    found = to_example(Row({"messages": messages}, "rows:1"), "messages")
    (samples,) = Encoder(tokenizer, chat_template=SOURCE, choice=choice).encode([found], 1000)
    assert not isinstance(samples, Rejected), samples.reason
    (sample,) = samples
    texts = [tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.learned]
    assert all(text.endswith(tokenizer.eos_token) for text in texts)
    return [int(text.removesuffix(tokenizer.eos_token)[-1]) for text in texts]


@pytest.mark.parametrize(
    ("choice", "flags", "expected"),
    [
        (Choice(), {}, [2, 4]),
        (Choice(last=True), {}, [4]),
        (Choice(("tool",)), {}, [3]),
        (Choice(("user", "assistant")), {}, [1, 2, 4]),
        (Choice(("assistant", "tool"), last=True), {}, [4]),
        (Choice(), {"m2": {"train": False}}, [4]),
        (Choice(), {"m2": {"weight": 0}, "m4": {"weight": 1}}, [4]),
        (Choice(), {"m1": {"train": True}}, [1, 2, 4]),
        (Choice(last=True), {"m2": {"train": True}}, [2, 4]),
        (Choice(last=True), {"m4": {"train": False}, "m2": {"train": True}}, [2]),
    ],
)
def test_what_is_learned_is_what_was_chosen(
    tokenizer: Any, choice: Choice, flags: dict[str, Any], expected: list[int]
) -> None:
    assert learned(tokenizer, chat(**flags), choice) == expected


def test_flags_of_sharegpt_turns_count_after_a_system_column() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]
    found = to_example(Row({"conversations": turns, "system": "S"}, "rows:1"), "sharegpt")
    assert isinstance(found, Conversation)
    assert found.flags == {2: False}


@pytest.mark.parametrize("value", [0.5, "yes", 2, []])
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(DataError, match="must be true or false") as caught:
        to_example(Row({"messages": chat(m2={"weight": value})}, "rows:1"), "messages")
    assert caught.value.where == "rows:1, message 3"


def test_a_message_that_is_not_to_be_learned_is_refused_where_all_is(tokenizer: Any) -> None:
    found = [
        to_example(Row({"messages": chat(m2={"train": learned})}, "rows:1"), "messages")
        for learned in (False, True)
    ]
    refused, kept = Encoder(tokenizer, chat_template=SOURCE, loss_on="all").encode(found, 100)
    assert isinstance(refused, Rejected)
    assert refused.invalid
    assert "message 3 is not to be learned" in refused.reason
    assert not isinstance(kept, Rejected)
    assert kept[0].labels[1:] == kept[0].input_ids[1:]


def test_flags_that_contradict_each_other_are_refused() -> None:
    for flags in ({"train": False, "weight": 1}, {"weight": 0, "train": True}):
        with pytest.raises(DataError, match="one of them learns the message") as caught:
            to_example(Row({"messages": chat(m2=flags)}, "rows:1"), "messages")
        assert caught.value.where == "rows:1, message 3"
    to_example(Row({"messages": chat(m2={"train": False, "weight": 0})}, "rows:1"), "messages")


@pytest.mark.parametrize("name", ["train_on_turn", "training", "train_detail"])
def test_names_of_other_tools_are_answered_with_ours(name: str) -> None:
    with pytest.raises(DataError, match="called 'train'") as caught:
        to_example(Row({"messages": chat(m2={name: False})}, "rows:1"), "messages")
    assert f'rename {name!r} to "train"' in caught.value.fix


def test_a_row_without_anything_chosen_is_told(tokenizer: Any) -> None:
    found = to_example(Row({"messages": chat()[:3]}, "rows:1"), "messages")
    (rejected,) = Encoder(tokenizer, chat_template=SOURCE, choice=Choice(("tool",))).encode([found], 100)
    assert isinstance(rejected, Rejected)
    assert "no message of tool" in rejected.reason


def test_rows_without_turns_refuse_a_choice(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="rows without turns"):
        list(Encoder(tokenizer, choice=Choice(last=True)).encode([Text("once", "rows:1")], 100))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"train_on_roles": ("asistant",)}, "no role"),
        ({"train_on_roles": ()}, "nothing would be learned"),
        ({"train_on_last_turn": True, "loss_on": "all"}, "loss_on is all"),
    ],
)
def test_a_setting_that_would_not_act_is_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"text": "x", "label": "y"}, "classification learns"),
        ({"prompt": "x", "completion": "y", "label": True}, "rated answers"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "training.loss: dpo"),
    ],
)
def test_rows_for_another_kind_of_training_name_it(columns: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        detect([Row(columns, "rows:1")])


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"role": "user", "content": "q"}] * 1001, "1,001 messages"),
        ([], "empty"),
        (["hi"], "must be an object"),
        ([{"role": "user", "content": {"a": 1}}], "content must be text"),
        ([{"role": "user", "value": "q"}], "'role' and 'value'"),
        ([{"role": "assistant", "content": "", "tool_calls": "find()"}], "tool_calls must be a list"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 3}}]}],
            "tool_calls must be",
        ),
        ([{"role": "assistant", "content": "", "tool_calls": [7]}], "tool_calls must be"),
    ],
)
def test_odd_messages_are_refused_by_what_is_odd(messages: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        to_example(Row({"messages": messages}, "rows:1"), "messages")


@pytest.mark.parametrize("arguments", ["{not json", "", None, [], {"a": {"b": [None]}}, 3.5, "</s>"])
def test_odd_arguments_of_tool_calls_stay_text(tokenizer: Any, arguments: Any) -> None:
    source = SOURCE.replace(
        "m.content + eos_token", "(m.tool_calls | tojson if m.tool_calls else m.content) + eos_token"
    )
    call = {"type": "function", "function": {"name": "f</s>", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    found = to_example(Row({"messages": messages}, "rows:1"), "messages")
    (samples,) = Encoder(tokenizer, chat_template=source).encode([found], 1000)
    assert not isinstance(samples, Rejected)
    ids = samples[0].input_ids
    assert ids.count(tokenizer.eos_token_id) == 2
    assert samples[0].labels[-1] == tokenizer.eos_token_id
