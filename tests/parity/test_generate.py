"""Greedy generation gives, token for token, what transformers' own generate gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors, disabled
from graft.adapters.lora import LoraConfig
from graft.evaluate.generate import GenerationConfig, compare_generations, complete, generate, stream
from graft.models.load import load

NEW = 16
LENGTHS = (3, 19, 11, 1, 7)


def _theirs(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def _prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def tiny(tiny_dir: Callable[..., Path], tiny_family: str) -> tuple[Any, Any]:
    directory = tiny_dir(tiny_family)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def test_greedy_is_transformers_greedy_in_every_family(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = _prompts(model.config.vocab_size)
    expected = [_theirs(model, prompt) for prompt in prompts]
    assert [
        list(done.token_ids)
        for done in complete(model, tokenizer, prompts, GenerationConfig(max_new_tokens=NEW))
    ] == expected


def test_any_end_token_of_the_generation_config_ends_a_text(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = _prompts(model.config.vocab_size)
    # Two tokens that greedy writing is known to reach, so that rows end at different times.
    free = [_theirs(model, prompt) for prompt in prompts]
    model.generation_config.eos_token_id = [2, free[0][4], free[1][9]]
    expected = [_theirs(model, prompt) for prompt in prompts]
    found = complete(model, tokenizer, prompts, GenerationConfig(max_new_tokens=NEW))
    assert [list(done.token_ids) for done in found] == expected
    assert found[0].finish == "eos"
    assert all(done.finish == "eos" for done in found if len(done.token_ids) < NEW)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_batch_writes_what_each_prompt_gets_alone(tiny: tuple[Any, Any], temperature: float) -> None:
    model, tokenizer = tiny
    prompts = _prompts(model.config.vocab_size)
    config = GenerationConfig(max_new_tokens=12, temperature=temperature, top_p=0.9 if temperature else 1.0)
    whole = complete(model, tokenizer, prompts, config, batch_size=5)
    pairs = complete(model, tokenizer, prompts, config, batch_size=2)
    alone = complete(model, tokenizer, prompts, config, batch_size=1)
    assert whole == pairs == alone
    assert len({done.text for done in whole}) > 1


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Any, Any]:
    directory = shared / "models" / "tinystories-656k"
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


STORY_PROMPTS = [
    "Once upon a time",
    "Tom",
    "The little girl was sad because her cat had run",
    "One day, a big dog",
]


def test_a_real_model_writes_the_same_story(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    prompts = [tokenizer(prompt)["input_ids"] for prompt in STORY_PROMPTS]
    expected = [_theirs(model, prompt, 60) for prompt in prompts]
    found = complete(model, tokenizer, STORY_PROMPTS, GenerationConfig(max_new_tokens=60))
    assert [list(done.token_ids) for done in found] == expected
    assert [done.num_prompt_tokens for done in found] == [len(prompt) for prompt in prompts]
    for prompt, done, ids in zip(prompts, found, expected, strict=True):
        known, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, prompt + ids))
        assert known + done.text == whole


def test_a_stream_gives_the_same_text_in_pieces(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    config = GenerationConfig(max_new_tokens=30, temperature=0.8, seed=5)
    pieces = list(stream(model, tokenizer, STORY_PROMPTS[0], config))
    assert len(pieces) > 10
    assert "".join(pieces) == generate(model, tokenizer, STORY_PROMPTS[:1], config)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_an_adapted_model_is_its_own_transformers_greedy_and_the_base_comes_back(
    tiny_dir: Callable[..., Path], family: str
) -> None:
    base = load(tiny_dir(family))
    prompts = _prompts(base.model.config.vocab_size)
    config = GenerationConfig(max_new_tokens=NEW)
    before = generate(base.model, base.tokenizer, prompts, config)
    attach(base.model, LoraConfig(rank=4))
    for tensor in adapter_tensors(base.model).values():
        torch.nn.init.normal_(tensor, std=0.3, generator=torch.Generator().manual_seed(0))
    expected = [_theirs(base.model, prompt) for prompt in prompts]
    found = complete(base.model, base.tokenizer, prompts, config)
    assert [list(done.token_ids) for done in found] == expected
    pairs = compare_generations(base.model, base.tokenizer, prompts, config)
    assert [text for text, _ in pairs] == before
    assert [text for _, text in pairs] == [done.text for done in found]
    assert [text for text, _ in pairs] != [text for _, text in pairs]
    with disabled(base.model):
        assert [_theirs(base.model, prompt) for prompt in prompts] != expected


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_quantized_model_is_its_own_transformers_greedy(
    tiny_dir: Callable[..., Path], quant_type: str
) -> None:
    base = load(tiny_dir("llama"), quantization=quant_type)
    prompts = _prompts(base.model.config.vocab_size)
    expected = [_theirs(base.model, prompt) for prompt in prompts]
    found = complete(base.model, base.tokenizer, prompts, GenerationConfig(max_new_tokens=NEW))
    assert [list(done.token_ids) for done in found] == expected
