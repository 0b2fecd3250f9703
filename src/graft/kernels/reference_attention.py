"""Attention and its gradients in plain torch, by their formulas (arXiv:2307.08691, sec. 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k' + mask) v, causal where there is no mask.

    Args:
        query: (B, heads, T, D).
        key: (B, key heads, T, D); each serves heads / key heads queries in a row.
        value: (B, key heads, T, D).
        mask: (B or 1, 1, T, T), truth values, or numbers to add; None for causal attention.
        scale: Factor on the scores.

    Returns:
        The output (B, T, heads, D) in the query's dtype, zero for a query that may look at nothing, and the
        logarithms of the softmax's sums (B, heads, T), float32.

    Cost: the scores (B, heads, T, T) in float32.
    """
    scores = _scores(query, key, mask, scale)
    sums = torch.logsumexp(scores, -1)
    weights = _weights(scores, sums)
    output = weights @ _for_every_head(value, query.shape[1])
    return output.transpose(1, 2).to(query.dtype).contiguous(), _finite(sums)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    sums: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`.

    Args:
        grad: Of the output, (B, T, heads, D).
        query: As it was given.
        key: As it was given.
        value: As it was given.
        mask: As it was given.
        output: What came of it.
        sums: What came of it.
        scale: As it was given.

    Returns:
        Of query (B, heads, T, D), key and value (B, key heads, T, D), in their dtypes.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    upper = grad.transpose(1, 2).float()
    scores = _scores(query, key, mask, scale)
    weights = _weights(scores, sums)
    slopes = upper @ _for_every_head(value, heads).transpose(-1, -2)
    delta = (upper * output.transpose(1, 2).float()).sum(-1, keepdim=True)
    changes = weights * (slopes - delta) * scale
    grad_query = changes @ _for_every_head(key, heads)
    grad_key = _over_groups(changes.transpose(-1, -2) @ query.float(), key_heads)
    grad_value = _over_groups(weights.transpose(-1, -2) @ upper, key_heads)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query.float() @ _for_every_head(key, query.shape[1]).transpose(-1, -2) * scale
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()


def _weights(scores: Tensor, sums: Tensor) -> Tensor:
    """Zero where a score is minus infinity, for a whole row of them too."""
    return torch.exp(scores - _finite(sums)[..., None])


def _finite(sums: Tensor) -> Tensor:
    return sums.masked_fill(sums == float("-inf"), 0.0)


def _for_every_head(part: Tensor, heads: int) -> Tensor:
    return part.float().repeat_interleave(heads // part.shape[1], 1)


def _over_groups(grad: Tensor, key_heads: int) -> Tensor:
    """Gradients of a key head summed over the query heads that it serves."""
    return grad if grad.shape[1] == key_heads else grad.unflatten(1, (key_heads, -1)).sum(2)
