from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.errors import ConfigError, ModelError
from graft.evaluate.decoding import sample
from graft.evaluate.generate import GenerationConfig, complete, encode_prompt, end_tokens, generate, stream
from graft.models.load import load


@pytest.fixture
def tiny(tiny_dir: Callable[..., Path]) -> tuple[Any, Any]:
    base = load(tiny_dir("llama"))
    return base.model, base.tokenizer


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.0]])
    draws = (torch.arange(20_000) + 0.5) / 20_000
    found = torch.bincount(sample(logits.expand(20_000, -1), draws, 0.7, 1.0), minlength=5) / 20_000
    # Evenly spread draws hit each token as often as its probability, up to one draw at each of two edges.
    torch.testing.assert_close(found, torch.softmax(logits[0] / 0.7, -1), atol=2 / 20_000, rtol=0)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    from transformers.generation.logits_process import TopPLogitsWarper

    logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)) * 3
    kept = torch.softmax(TopPLogitsWarper(top_p)(None, logits.clone()), -1)
    draws = torch.linspace(0, 1, 4001)[:-1]
    for row in range(8):
        drawn = sample(logits[row].expand(4000, -1), draws, 1.0, top_p)
        share = torch.bincount(drawn, minlength=40) / 4000
        torch.testing.assert_close(share, kept[row], atol=1 / 2000, rtol=0)


def test_the_last_draw_stays_inside() -> None:
    logits = torch.full((1, 7), -1e9)
    logits[0, 3] = 0.0
    assert sample(logits, torch.tensor([1.0]), 1.0, 0.5).tolist() == [3]


def test_the_seed_and_the_place_decide_the_draws(tiny: tuple[Any, Any]) -> None:
    config = GenerationConfig(max_new_tokens=20, temperature=1.0, seed=1)
    first = generate(*tiny, ["same", "same"], config)
    assert first == generate(*tiny, ["same", "same"], config)
    assert first[0] != first[1]
    assert first != generate(
        *tiny, ["same", "same"], GenerationConfig(max_new_tokens=20, temperature=1.0, seed=2)
    )


def test_stop_strings_end_the_text_and_are_left_out(tiny: tuple[Any, Any]) -> None:
    whole = complete(*tiny, ["abc"], GenerationConfig(max_new_tokens=40))[0]
    stop = whole.text[10:13]
    place = whole.text.index(stop)
    config = GenerationConfig(max_new_tokens=40, stop=("never there", stop))
    found = complete(*tiny, ["abc"], config)[0]
    assert (found.text, found.finish) == (whole.text[:place], "stop")
    assert len(found.token_ids) < len(whole.token_ids)
    assert "".join(stream(*tiny, "abc", config)) == found.text


def test_a_stop_string_that_is_a_control_token_ends_the_text(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tokenizer, ("<pad>", "abc")) == {0, 7, 9, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id}


def test_further_end_tokens_can_be_given(tiny: tuple[Any, Any]) -> None:
    whole = complete(*tiny, ["abc"], GenerationConfig(max_new_tokens=10))[0]
    end = whole.token_ids[4]
    first = whole.token_ids.index(end)
    found = complete(*tiny, ["abc"], GenerationConfig(max_new_tokens=10), end_ids=[end])[0]
    assert (found.token_ids, found.finish) == (whole.token_ids[: first + 1], "eos")
    assert (
        found.text == complete(*tiny, ["abc"], GenerationConfig(max_new_tokens=max(first, 1)))[0].text
        or first == 0
    )


def test_the_tokenizer_begins_a_prompt_once_and_does_not_end_it(
    tiny: tuple[Any, Any], tinystories: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    once = encode_prompt(tokenizer, "One day")
    assert once.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, tokenizer.bos_token + "One day").count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in once
    assert encode_prompt(tiny[1], "") == [tiny[1].bos_token_id]


def test_the_context_ends_the_text(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    context = model.config.max_position_embeddings
    long, short = [5] * (context - 3), [5, 6]
    found = complete(model, tokenizer, [long, short], GenerationConfig(max_new_tokens=8))
    assert len(found[0].token_ids) <= 3
    assert found[1] == complete(model, tokenizer, [short], GenerationConfig(max_new_tokens=8))[0]
    with pytest.raises(ConfigError, match=f"{context}") as error:
        generate(model, tokenizer, [short, [5] * context])
    assert error.value.where == "prompt 1"


def test_learned_positions_end_at_the_context_too(tiny_dir: Callable[..., Path]) -> None:
    base = load(tiny_dir("gpt2"))
    context = base.model.config.max_position_embeddings
    prompts = [[5] * (context - 2), [7, 8, 9]]
    found = complete(base.model, base.tokenizer, prompts, GenerationConfig(max_new_tokens=10))
    assert len(found[0].token_ids) <= 2
    assert len(found[1].token_ids) == 10 or found[1].finish == "eos"


def test_ids_outside_the_vocabulary_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="vocabulary has 264"):
        generate(*tiny, [[5, 264]])


def test_a_model_that_gives_no_numbers_is_told(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="not a number"):
        generate(model, tokenizer, ["abc"])


def test_dropout_is_off_while_writing_and_the_mode_comes_back(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    modes = []
    model.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    model.train()
    generate(model, tokenizer, ["abc"], GenerationConfig(max_new_tokens=3))
    assert model.training
    assert modes
    assert not any(modes)
    writing = stream(model, tokenizer, "abc", GenerationConfig(max_new_tokens=3))
    next(writing)
    assert torch.is_grad_enabled()
    writing.close()
    assert model.training


def test_no_prompts_make_no_texts(tiny: tuple[Any, Any]) -> None:
    assert generate(*tiny, []) == []


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"top_p": 0.9}, "top_p"),
        ({"stop": ("",)}, "stop"),
        ({"seed": -1}, "seed"),
    ],
)
def test_values_that_cannot_act_are_refused(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as error:
        GenerationConfig(**fields)
    assert error.value.where == f"generation.{name}"
