"""Text from a model: greedy or sampled, many prompts at a time or streamed, ended by tokens or strings."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.adapters.attached import disabled
from graft.errors import ConfigError
from graft.evaluate.decoding import Decoding, context_length, evaluating, sample
from graft.evaluate.detokenize import Detokenizer, StopFinder

Prompt = str | Sequence[int]
"""Text, or token ids that are fed as they are."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model writes."""

    max_new_tokens: int = 64
    """Most tokens written; fewer where the model's context ends earlier."""
    temperature: float = 0.0
    """0 takes the likeliest token (greedy); above, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Decides the draws, together with a prompt's place in the list; the batch size plays no part."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are left out of it; the model's end tokens always end it."""

    def __post_init__(self) -> None:
        """Refuse values that cannot act.

        Raises:
            ConfigError: A value is out of range.
        """
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "use 1 or more")
        _require(0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "use 0 or more")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "use a number above 0, at most 1")
        _require(self.seed >= 0, "seed", self.seed, "use 0 or more")
        _require(all(self.stop), "stop", self.stop, "leave the empty string out")
        if self.temperature == 0.0 and self.top_p < 1.0:
            raise ConfigError(
                f"top_p {self.top_p} cannot act at temperature 0",
                where="generation.top_p",
                fix="set a temperature above 0, or leave top_p out",
            )


def _require(holds: bool, field: str, value: object, fix: str) -> None:
    if not holds:
        raise ConfigError(f"{field} is {value!r}", where=f"generation.{field}", fix=fix)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after one prompt."""

    text: str
    token_ids: tuple[int, ...]
    """The new tokens, the end token included."""
    finish: Literal["eos", "stop", "length"]
    num_prompt_tokens: int


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    batch_size: int = 16,
    end_ids: Collection[int] = (),
) -> list[str]:
    """Continue each prompt.

    Args:
        model: A causal language model of transformers, with or without adapters, dense or quantized.
        tokenizer: Its tokenizer.
        prompts: Texts, or lists of token ids; a list also for one.
        config: How to write; greedy by default.
        batch_size: Prompts written at a time; the result does not depend on it.
        end_ids: Tokens that end a text besides the model's own, such as a chat template's end of turn.

    Returns:
        The new text of each prompt, in the order of the prompts.

    Raises:
        ConfigError: A prompt is empty, longer than the model's context, or has ids outside the vocabulary.
        ModelError: The model's output is not a number.
    """
    done = complete(model, tokenizer, prompts, config, batch_size=batch_size, end_ids=end_ids)
    return [completion.text for completion in done]


def complete(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    batch_size: int = 16,
    end_ids: Collection[int] = (),
) -> list[Completion]:
    """Continue each prompt, as `generate` does, and say for each how it ended.

    Raises:
        ConfigError: As `generate`, and where one prompt stands for a list of them.
    """
    if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
        raise ConfigError(
            "one prompt was given where a list of prompts belongs", where="prompts", fix="write [prompt]"
        )
    config = config or GenerationConfig()
    ends = end_tokens(model, tokenizer, config.stop) | frozenset(end_ids)
    writers = [_Writer(model, tokenizer, prompt, config, ends, place) for place, prompt in enumerate(prompts)]
    order = sorted(range(len(writers)), key=lambda place: len(writers[place].prompt))
    for first in range(0, len(order), batch_size):
        for _ in _write(model, [writers[place] for place in order[first : first + batch_size]], config):
            pass
    return [writer.completion() for writer in writers]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    *,
    end_ids: Collection[int] = (),
) -> Iterator[str]:
    """Continue one prompt, giving the text out as it is written.

    Joined, the pieces are what `generate` returns for this prompt alone. Arguments and errors are the same.

    Yields:
        Pieces of text, never a part of a character.
    """
    config = config or GenerationConfig()
    ends = end_tokens(model, tokenizer, config.stop) | frozenset(end_ids)
    writer = _Writer(model, tokenizer, prompt, config, ends)
    given = 0
    for _ in _write(model, [writer], config):
        yield from writer.pieces[given:]
        given = len(writer.pieces)


def compare_generations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    end_ids: Collection[int] = (),
) -> list[tuple[str, str]]:
    """Continue each prompt without and with the model's active adapters.

    Args:
        model: A model with adapters.
        tokenizer: Its tokenizer.
        prompts: Texts, or lists of token ids.
        config: How to write; greedy by default.
        end_ids: Tokens that end a text besides the model's own.

    Returns:
        Pairs (base, adapted), in the order of the prompts.
    """
    adapted = generate(model, tokenizer, prompts, config, end_ids=end_ids)
    with disabled(model):
        base = generate(model, tokenizer, prompts, config, end_ids=end_ids)
    return list(zip(base, adapted, strict=True))


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: the tokenizer's start token exactly once, and no end token.

    Raises:
        ConfigError: The prompt is empty and the tokenizer has no start or end token to begin with.
    """
    if not isinstance(prompt, str):
        ids = [int(token) for token in prompt]
    else:
        start = tokenizer.bos_token
        ids = tokenizer(prompt, add_special_tokens=not (start and prompt.startswith(start)))["input_ids"]
        end = tokenizer.eos_token
        if ids and end and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(end):
            ids = ids[:-1]
    if ids:
        return ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ConfigError("the prompt is empty", where="prompt", fix="give at least one word")


def end_tokens(model: nn.Module, tokenizer: Any, stop: Sequence[str] = ()) -> frozenset[int]:
    """Tokens that end a text.

    They are those of the model's generation config, the tokenizer's (fine-tuning data ends with it), and the
    special tokens among the stop strings.
    """
    settings: Any = getattr(model, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    ends = set(found) if isinstance(found, list | tuple) else {found}
    ends.add(tokenizer.eos_token_id)
    special = tokenizer.get_added_vocab()
    ends.update(special[text] for text in stop if text in special)
    return frozenset(int(end) for end in ends if end is not None)


class _Writer:
    """One prompt and what has been written after it."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompt: Prompt,
        config: GenerationConfig,
        ends: frozenset[int],
        place: int = 0,
    ) -> None:
        self.prompt = encode_prompt(tokenizer, prompt)
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.finish: Literal["eos", "stop", "length"] | None = None
        self._limit = min(config.max_new_tokens, _room(model, self.prompt, place))
        self._ends = ends
        self._detokenizer = Detokenizer(tokenizer, self.prompt)
        self._stops = StopFinder(config.stop)
        self._random = random.Random(f"{config.seed}/{place}")

    def draw(self) -> float:
        """A uniform number in [0, 1) for the next token."""
        return self._random.random()

    def take(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._ends:
            self._close("eos")
            return
        self._give(self._stops.push(self._detokenizer.push(token)))
        if self._stops.found:
            self.finish = "stop"
        elif len(self.tokens) == self._limit:
            self._close("length")

    def _close(self, reason: Literal["eos", "length"]) -> None:
        self.finish = reason
        self._give(self._stops.push(self._detokenizer.finish()))
        if self._stops.found:
            self.finish = "stop"
        else:
            self._give(self._stops.finish())

    def _give(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)

    def completion(self) -> Completion:
        assert self.finish is not None
        return Completion(
            text="".join(self.pieces),
            token_ids=tuple(self.tokens),
            finish=self.finish,
            num_prompt_tokens=len(self.prompt),
        )


def _room(model: nn.Module, prompt: list[int], place: int) -> int:
    """Tokens that fit behind a prompt in the model's context.

    Raises:
        ConfigError: None fit, or the prompt is of another vocabulary.
    """
    config: Any = model.config
    config = config.get_text_config()
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise ConfigError(
            f"token ids from {min(prompt)} to {max(prompt)}, but the vocabulary has {config.vocab_size}",
            where=f"prompt {place}",
            fix="use the model's own tokenizer",
        )
    context = context_length(model)
    if len(prompt) >= context:
        raise ConfigError(
            f"{len(prompt)} tokens leave no room in the model's context of {context}",
            where=f"prompt {place}",
            fix="shorten the prompt",
        )
    return context - len(prompt)


def _write(model: nn.Module, writers: list[_Writer], config: GenerationConfig) -> Iterator[None]:
    """Write all texts of a batch to their end, yielding after each token."""
    with evaluating(model):
        live = writers
        decoding = Decoding(model, [writer.prompt for writer in writers])
        while True:
            tokens = _choose(decoding.logits, config, live)
            for writer, token in zip(live, tokens, strict=True):
                writer.take(token)
            yield
            rows = [row for row, writer in enumerate(live) if writer.finish is None]
            if not rows:
                return
            live = [live[row] for row in rows]
            decoding.advance(rows, [[writer.tokens[-1]] for writer in live])


def _choose(logits: Tensor, config: GenerationConfig, writers: Sequence[_Writer]) -> list[int]:
    """Pick the next token of each row.

    Args:
        logits: (rows, vocabulary) fp32.
        config: Its temperature and top_p decide.
        writers: The rows, which give the draws.

    Returns:
        One token id per row.
    """
    if config.temperature == 0.0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    draws = torch.tensor([writer.draw() for writer in writers], device=logits.device)
    return [int(token) for token in sample(logits, draws, config.temperature, config.top_p).tolist()]
