"""The forward side of writing: rows of tokens over one key-value cache, and the draw of a next token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from graft.errors import ModelError
from graft.models.families import head


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode (no dropout) for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def context_length(model: nn.Module) -> int:
    """Tokens that a model can see at once, prompt and answer together."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


class Decoding:
    """A batch of token rows over one key-value cache; rows may leave it and be repeated.

    Args:
        model: A causal language model of transformers.
        prompts: Token ids of each row, at least one each.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        config: Any = model.config
        self._model = model
        self._device = next(model.parameters()).device
        self._cache = DynamicCache(config=config.get_text_config())
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
        self._mask = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long().to(self._device)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._hidden = self._forward(ids.to(self._device), positions)

    @property
    def logits(self) -> Tensor:
        """Logits of the token after each row, (rows, vocabulary) fp32."""
        return self.logits_of(self._hidden[:, -1])

    @torch.no_grad()
    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (tokens, hidden size), (tokens, vocabulary) fp32.

        Raises:
            ModelError: A logit is not a number.
        """
        # Two dimensions: a linear over a frozen weight takes a slow path on the CPU for three.
        logits = head(self._model, hidden).float()
        if torch.isnan(logits).any():
            raise ModelError(
                "the model's output is not a number",
                where=f"{type(self._model).__name__}, {logits.isnan().any(-1).sum()} rows",
                fix="check the weights, or load with dtype bfloat16 or float32",
            )
        return logits

    def advance(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Go on with some of the rows, or with some several times, feeding each the same number of tokens.

        Args:
            rows: Which of the present rows stay, in their new order.
            tokens: Token ids for each of them, (rows, new).

        Returns:
            Hidden states of the new tokens, (rows, new, hidden size).
        """
        if list(rows) != list(range(len(self._lengths))):
            kept = torch.tensor(rows, device=self._device)
            self._cache.batch_select_indices(kept)
            self._mask, self._lengths = self._mask[kept], self._lengths[kept]
        ids = torch.tensor(tokens, device=self._device)
        num_new = ids.shape[1]
        positions = self._lengths[:, None] + torch.arange(num_new, device=self._device)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], 1)
        self._lengths = self._lengths + num_new
        self._hidden = self._forward(ids, positions)
        return self._hidden

    @torch.no_grad()
    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        decoder: Any = self._model.base_model
        output = decoder(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token from each row by inverting the distribution function at a given uniform number.

    Args:
        logits: (rows, vocabulary) fp32.
        draws: (rows,) uniform in [0, 1).
        temperature: Above 0.
        top_p: Only the smallest set of likeliest tokens that reaches this probability takes part.

    Returns:
        Token ids (rows,). Source of top_p: nucleus sampling, arXiv:1904.09751, section 3.1.
    """
    chances, order = torch.softmax(logits / temperature, -1).sort(stable=True, dim=-1, descending=True)
    before = chances.cumsum(-1) - chances
    kept = torch.where(before < top_p, chances, 0.0)
    kept[:, 0] = chances[:, 0]
    total = kept.cumsum(-1)
    place = torch.searchsorted(total, (draws * total[:, -1])[:, None], right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(place, last))[:, 0]
