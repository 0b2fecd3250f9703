"""The loss of a language model: fp32 cross-entropy over the labelled tokens, the logits made in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from graft import kernels
from graft.data.loader import Batch, rounded_length
from graft.errors import DataError
from graft.evaluate.decoding import evaluating
from graft.models.families import head, hidden_states

IGNORED = -100
"""Label of a token that is not trained."""

CHUNK_LOGITS = 1 << 24
"""Logits held at a time: 64 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """What a model loses on a data set."""

    loss: float
    """Mean cross-entropy per labelled token, in nats."""
    perplexity: float
    """exp(loss)."""
    num_tokens: int
    """Labelled tokens that were counted."""


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum the cross-entropy of a batch over its labelled tokens.

    The token labelled at position t+1 is predicted from the hidden state at position t. Only those positions
    go through the output head.

    Args:
        model: A causal language model of transformers, with or without adapters.
        batch: input_ids, position_ids and labels, each (rows, tokens).

    Returns:
        The sum in nats (fp32 scalar, differentiable) and the number of labelled tokens.
    """
    losses, _ = labelled_losses(model, batch.input_ids, batch.position_ids, batch.labels)
    return losses.sum(), losses.numel()


def labelled_losses(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each labelled token, and the row that it stands in.

    Args:
        model: A causal language model of transformers.
        input_ids: (rows, tokens).
        position_ids: (rows, tokens), starting at 0 again where a document starts.
        labels: (rows, tokens); `labels[i]` is `input_ids[i]` or -100.

    Returns:
        Losses in nats (labelled,) fp32 in reading order, and their row numbers (labelled,).
    """
    hidden = hidden_states(model, input_ids, position_ids)
    targets = labels[:, 1:]
    kept = targets != IGNORED
    rows = kept.nonzero()[:, 0]
    return head_losses(model, hidden[:, :-1][kept], targets[kept]), rows


def head_losses(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target given the hidden state that predicts it.

    The logits are made in chunks of at most `CHUNK_LOGITS`, so memory does not grow with tokens times
    vocabulary. Under a frozen head the gradient is taken while a chunk is there; under a head that trains,
    chunks are made again in the backward pass, unless there is only one.

    Args:
        model: A causal language model of transformers.
        hidden: (tokens, hidden size), the final-normed decoder output.
        targets: (tokens,) token ids.

    Returns:
        Losses in nats, (tokens,) fp32.
    """
    config: Any = model.config
    size = _whole_length(max(1, CHUNK_LOGITS // config.get_text_config().vocab_size))
    learning = torch.is_grad_enabled()
    if learning and hidden.requires_grad and _is_frozen(model):
        losses: Tensor = _FrozenHeadLosses.apply(hidden, model, targets, size)
        return losses
    if len(targets) <= size:
        return _chunk_losses(model, hidden, targets)
    parts = [
        checkpoint(_chunk_losses, model, part, goal, use_reentrant=False)
        if learning
        else _chunk_losses(model, part, goal)
        for part, goal in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


class _FrozenHeadLosses(torch.autograd.Function):
    """Losses whose gradient to the hidden states is ready before the backward pass begins.

    Each loss depends on its own hidden state only, so the backward pass just weighs the rows. A chunk holds
    its logits in the model's dtype and their gradient, and one copy in fp32 where there is no kernel.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, model: nn.Module, targets: Tensor, size: int) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        slope: Tensor | None = None
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            with torch.enable_grad():
                leaf = hidden[chunk].detach().requires_grad_()
                logits = _logits(model, leaf.view_as(leaf))  # hooks on the head cannot take a leaf here
            found = logits.detach()
            slope = torch.empty_like(found) if slope is None else slope[: len(found)]
            losses[chunk] = kernels.call("cross_entropy", found, targets[chunk], slope)
            (gradient[chunk],) = torch.autograd.grad(logits, leaf, slope)
            del logits, found
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * weights[0][:, None]).to(gradient.dtype), None, None, None


def _whole_length(size: int) -> int:
    """The greatest length up to a size that is not padded; see rounded_length."""
    return next((length for length in range(size, 0, -1) if rounded_length(length) == length), size)


def _is_frozen(model: nn.Module) -> bool:
    head_module: Any = model
    return not any(p.requires_grad for p in head_module.get_output_embeddings().parameters())


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    # A count of labels that differs in each batch would be a new shape each time; see rounded_length.
    spare = rounded_length(len(hidden)) - len(hidden)
    return head(model, functional.pad(hidden, (0, 0, 0, spare)) if spare else hidden)[: len(hidden)]


def _chunk_losses(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(_logits(model, hidden).float(), targets, reduction="none")


def evaluate_loss(model: nn.Module, batches: Iterable[Batch]) -> LossReport:
    """Mean loss of a model over batches, every labelled token weighing the same.

    The model is put in eval mode (no dropout) for the time of the call.

    Args:
        model: A causal language model of transformers.
        batches: For instance `loader.epoch(0)` of a loader that does not shuffle.

    Returns:
        The loss, its perplexity and the number of tokens.

    Raises:
        DataError: The batches hold no labelled token.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            losses, _ = labelled_losses(
                model, batch.input_ids.to(device), batch.position_ids.to(device), batch.labels.to(device)
            )
            total += float(losses.double().sum())
            count += losses.numel()
    if count == 0:
        raise DataError("no labelled token to evaluate on", fix="check the data with `graft data check`")
    mean = total / count
    return LossReport(loss=mean, perplexity=perplexity(mean), num_tokens=count)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.inf if loss > 709 else math.exp(loss)
