"""The tokenizer of the built-in base: nothing lost, control tokens whole, marks where answers are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

Script = Callable[[str], ModuleType]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho, 42!"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]


@pytest.fixture(scope="module")
def tokenizer(script: Script, books: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained here on little, saved and read back."""
    module = script("tokenizer")
    texts = [*script("corpus").read_books(books).values(), "2047 " * 50]
    place = tmp_path_factory.mktemp("tokenizer")
    module.save_tokenizer(module.train_tokenizer(texts, vocab_size=320, max_length=128), place)
    return AutoTokenizer.from_pretrained(place)


@given(text=st.text())
def test_every_string_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_control_tokens_are_single_pieces(script: Script, tokenizer: Any) -> None:
    for token in script("tokenizer").CONTROL_TOKENS:
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|bos|>",
        "<|im_end|>",
        "<|pad|>",
    )


def test_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.tokenize("2047") == list("2047")


def test_text_begins_with_one_bos(tokenizer: Any) -> None:
    assert tokenizer("Hi")["input_ids"].count(tokenizer.bos_token_id) == 1
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert rendered[0] == tokenizer.bos_token_id
    assert rendered.count(tokenizer.bos_token_id) == 1


def test_marked_tokens_are_the_answers_and_their_ends(tokenizer: Any) -> None:
    made = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
    marked = [token for token, mark in pairs if mark]
    assert tokenizer.decode(marked) == "Ho, 42!<|im_end|>Bye<|im_end|>"


def test_the_prompt_for_an_answer_begins_the_conversation(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith(prompt)
