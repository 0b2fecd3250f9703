from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graft.evaluate.detokenize import Detokenizer, StopFinder, continuation

TEXTS = (
    "Once upon a time, there was a tiny fox.",
    " a leading space,  two spaces , and a line\n\n\tbreak ",
    "naïve café — 日本語のテキスト, 한국어, עברית, 👩‍👩‍👧‍👦🎉 ok",
    "def f(x):\n    return x**2  # ²",
)


def _gpt2(shared: Path) -> Any:
    file = shared / "tokenizers" / "gpt2" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")


@pytest.fixture(scope="module", params=["gpt2", "stories260k-hf", "tinystories-656k"])
def tokenizer(request: pytest.FixtureRequest, shared: Path) -> Any:
    """Byte-level BPE, pieces with byte fallback, and pieces that lose what they do not know."""
    if request.param == "gpt2":
        return _gpt2(shared)
    return AutoTokenizer.from_pretrained(shared / "models" / request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_and_no_piece_splits_a_character(tokenizer: Any, text: str) -> None:
    prompt = tokenizer("The end:")["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, prompt + tokens)
    )
    assert before + "".join(pieces) + detokenizer.finish() == whole


def test_characters_of_several_tokens_wait_until_they_are_whole(shared: Path) -> None:
    tokenizer = _gpt2(shared)
    tokens = tokenizer("🦊", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, tokenizer("x")["input_ids"])
    pieces = [detokenizer.push(token) for token in tokens]
    assert len(tokens) > 2
    assert pieces == [*[""] * (len(tokens) - 1), "🦊"]


def test_a_character_cut_off_is_told_at_the_end(shared: Path) -> None:
    tokenizer = _gpt2(shared)
    tokens = tokenizer("ab🦊", add_special_tokens=False)["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer)
    given_out = "".join(detokenizer.push(token) for token in tokens)
    assert given_out == "ab"
    assert set(detokenizer.finish()) == {"\ufffd"}


def test_special_tokens_are_left_out(tokenizer: Any) -> None:
    tokens = tokenizer("one", add_special_tokens=False)["input_ids"]
    text = continuation(tokenizer, tokens, [*tokens, tokenizer.eos_token_id, *tokens])
    assert tokenizer.eos_token not in text
    assert text.split() == ["one", "one"] or text == "oneone"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stops_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    finder = StopFinder(stops)
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    shown = ""
    for start, end in zip(edges, edges[1:], strict=False):
        if not finder.found:
            shown += finder.push(text[start:end])
    # The first stop string to be complete ends the text, so look at growing pieces.
    cut_text = text
    for end in edges[1:]:
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            cut_text = text[: min(places)]
            break
    assert finder.found == any(stop in text for stop in stops)
    assert (shown if finder.found else shown + finder.finish()) == cut_text
