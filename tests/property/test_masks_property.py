"""For any conversation: the quick way finds what the exact way finds, masks and cuts keep what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.chat import frames, rendering
from graft.data.chat.templates import read_template
from graft.data.chat.turns import Choice
from graft.data.examples import Conversation, Pair
from graft.data.masking import IGNORED, Encoder, Rejected, Sample
from graft.data.samples import CUT_LEFT, OLDER_CUT, PARTED

CONTROLS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
NAMES = [
    "chatml",
    "qwen2.5-instruct",
    "llama-3-instruct",
    "llama-2-chat",
    "mistral-instruct",
    "gemma-it",
    "phi-3",
    "zephyr",
]
THINKING = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
TALKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if '/quiet' in messages[-1].content %}{{ '(quietly)' }}{% endif %}{% endif %}"
)
MARKED = TALKING.replace(
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}",
)
OWN = {"thinking": THINKING, "talking": TALKING, "marked": MARKED}
words = st.sampled_from(
    ["a", "cat", " dog", "\n", " ", "é", "👍🏽", "</think>", "<think>", "/quiet", "user", "[INST]",
     "<|im_end|>", "</s>", "assistant", "\n\n", "1", "  ", "<", "|>", "?"]
)  # fmt: skip
texts = st.lists(words, min_size=1, max_size=6).map("".join)
turns = st.lists(texts, min_size=1, max_size=7)
chats = st.builds(
    lambda system, contents, flags: (system, contents, flags),
    st.none() | texts,
    turns,
    st.dictionaries(st.integers(0, 7), st.booleans(), max_size=2),
)
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    made.add_special_tokens(
        {"additional_special_tokens": CONTROLS[2:], "bos_token": "<s>", "eos_token": "</s>"}
    )
    return made


def chat_of(system: str | None, contents: list[str], flags: dict[int, bool], place: int = 1) -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return Conversation(
        messages, f"rows:{place}", flags={i: f for i, f in flags.items() if i < len(messages)}
    )


def source_of(shared: Path, name: str) -> str:
    return OWN.get(name) or read_template(shared / "tokenizers" / "chat_templates" / f"{name}.jinja")


def encoder_of(tokenizer: Any, source: str, choice: Choice | None = None) -> Encoder:
    from graft.data.tokens import TextEncoder

    known = _TEXTS.get(id(tokenizer)) or _TEXTS.setdefault(id(tokenizer), TextEncoder(tokenizer))
    return Encoder(known, chat_template=source, choice=choice)


_TEXTS: dict[int, Any] = {}


@quick
@pytest.mark.parametrize(
    "choice", [Choice(), Choice(last=True), Choice(("user", "assistant"))], ids=["answers", "last", "both"]
)
@pytest.mark.parametrize("name", [*NAMES, *OWN])
@given(made=st.lists(chats, min_size=12, max_size=24))
def test_the_quick_way_gives_what_the_exact_way_gives(
    shared: Path, tokenizer: Any, name: str, choice: Choice, made: list[Any]
) -> None:
    # Rows of a few shapes, so that frames are learned and then used.
    rows = [chat_of(*each, place) for place, each in enumerate(made)]
    plain = [chat_of(None, [f"q{n} {c}", f"a{n} {c}"], {}, n) for n, (_, (c, *_), _) in enumerate(made)]
    source = source_of(shared, name)
    quick_way = list(encoder_of(tokenizer, source, choice).encode([*plain, *rows, *plain], 10_000))
    with mock.patch.object(frames, "_WITNESSES", 10**9):
        exact = list(encoder_of(tokenizer, source, choice).encode([*plain, *rows, *plain], 10_000))
    assert quick_way == exact


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_way_is_taken(
    name: str, shared: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = []
    find = rendering.find_turns
    monkeypatch.setattr(rendering, "find_turns", lambda *args: exact.append(args[1].where) or find(*args))
    rows = [chat_of(None, [f"question {n}", f"answer {n}"], {}, n) for n in range(600)]
    assert len(list(encoder_of(tokenizer, source_of(shared, name)).encode(rows, 1000))) == 600
    assert exact == ["rows:0", "rows:1", "rows:2"]


def runs(sample: Sample) -> list[list[int]]:
    return [sample.input_ids[begin:end] for begin, end in sample.learned]


@quick
@given(made=chats)
def test_a_mask_is_the_chosen_answers_and_their_ends(tokenizer: Any, made: Any) -> None:
    chat = chat_of(*made)
    whole = encoder_of(tokenizer, TALKING)
    (found,) = whole.encode([chat], 10_000)
    # White space before a turn that nobody asks for may belong to a token of its head.
    contents = [
        message["content"] if message["role"] == "assistant" else message["content"].lstrip()
        for index, message in enumerate(chat.messages)
        if message["content"].strip() and chat.flags.get(index, message["role"] == "assistant")
    ]
    if isinstance(found, Rejected):
        assert not contents or "differently" in found.reason
        return
    (sample,) = found
    learned = [tokenizer.decode(run) for run in runs(sample)]
    assert len(learned) == len(contents)
    for text, content in zip(learned, contents, strict=True):
        assert content + "<|im_end|>" in (text, text.lstrip())
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat.messages)
    assert tokenizer.decode(sample.input_ids) == text
    places = {place for begin, end in sample.learned for place in range(begin, end)}
    expected = [id if place in places else IGNORED for place, id in enumerate(sample.input_ids)]
    assert sample.labels == expected
    assert sample.ids.tolist() == sample.input_ids


@quick
@given(
    made=chats,
    max_length=st.integers(8, 60),
    policy=st.sampled_from(["truncate", "truncate_left", "split", "drop", "error"]),
)
def test_no_policy_gives_more_than_max_length(
    tokenizer: Any, made: Any, max_length: int, policy: str
) -> None:
    chat, encoder = chat_of(*made), encoder_of(tokenizer, TALKING)
    (whole,) = encoder.encode([chat], 10_000)
    (found,) = encoder.encode([chat], max_length, policy)
    if isinstance(whole, Rejected):
        assert found == whole
        return
    if isinstance(found, Rejected):
        assert len(whole[0]) > max_length
        assert found.overlong
        return
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = [tokenizer.decode(run) for run in runs(whole[0])]
    kept = [tokenizer.decode(run) for sample in found for run in runs(sample)]
    for sample in found:
        assert len(sample) <= max_length
        assert sample.learned
    if policy == "truncate":
        assert found[0].input_ids == whole[0].input_ids[:max_length]
    else:
        # Answers are whole or absent, with their ends.
        assert all(run[-1] == end for sample in found for run in runs(sample))
    if policy == "truncate_left":
        assert kept == answers[len(answers) - len(kept) :]
        assert len(whole[0]) <= max_length or set(found[0].remarks) & {CUT_LEFT, OLDER_CUT}
    if policy == "split":
        remaining = iter(answers)
        assert all(answer in remaining for answer in kept)
        assert len(whole[0]) <= max_length or PARTED in found[0].remarks


@quick
@given(prompt=texts, completion=texts, max_length=st.integers(3, 30))
def test_a_cut_from_the_left_keeps_the_answer_and_the_beginning(
    tinystories: Path, prompt: str, completion: str, max_length: int
) -> None:
    encoder = stories(tinystories)
    ((whole,), found) = (
        (
            next(encoder.encode([Pair(prompt, completion, "row 1")], length, "truncate_left"))
            for length in (10_000, max_length)
        )
        if completion.strip()
        else ((None,), None)
    )
    if whole is None:
        return
    head, answer = len(encoder.text.bos_ids), whole.learned[0][0]
    if isinstance(found, Rejected):
        assert len(whole.input_ids) - answer + head > max_length
        return
    (sample,) = found
    cut = len(whole) - len(sample)
    assert len(sample) == min(len(whole), max_length)
    assert sample.input_ids == [*whole.input_ids[:head], *whole.input_ids[head + cut :]]
    assert runs(sample) == runs(whole)


_STORIES: list[Encoder] = []


def stories(folder: Path) -> Encoder:
    from transformers import AutoTokenizer

    if not _STORIES:
        _STORIES.append(Encoder(AutoTokenizer.from_pretrained(folder)))
    return _STORIES[0]
