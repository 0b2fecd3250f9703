"""Starts the weights with the one circuit that a short pretraining does not find: copying what came before.

A small model copies through attention heads that need each other: one that looks at the token before, and
induction heads that look for the same token earlier and pass on what followed it (Olsson et al., "In-context
learning and induction heads", arXiv:2209.11895). Each alone gains nothing, so both appear late; 4.5 million
tokens of the corpus at a learning rate of 3e-3 did not bring them about. Here they are written into the
random weights: the embedding gets a part that all tokens share and parts that tell tokens apart, and three
heads read and write those parts. Everything else stays random, and everything is trained afterwards, gently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PREVIOUS = (0, 0)
"""(layer, head) that looks at the token before."""
INDUCTION = ((1, 0), (2, 0))
"""(layer, head) that looks at what followed the same token."""
QUIET = 0.02
"""Share left of what all blocks write, so that the stream is at first the tokens themselves."""
SHARED = 1.0
"""Length of the part that all embeddings share."""
AIM, MATCH, NOTE, COPY = 0.58, 3.5, 0.47, 0.8
"""Gains: previous-token queries and keys, matching queries and keys, values noted, values copied."""
NUM_FAST, FIRST_SLOW = 6, 16
"""Rotary pairs that tell neighbours apart; the first of those that hardly turn within a text."""


@torch.no_grad()
def write_induction_circuit(model: Any, seed: int = 0) -> None:
    """Change a randomly initialised Llama in place so that it repeats sequences it has seen.

    Args:
        model: LlamaForCausalLM, heads of 64 or more, at least 256 wide, three layers or more.
        seed: Decides the directions of the parts.
    """
    config = model.config
    size, width, half = config.head_dim, config.hidden_size, config.head_dim // 2
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    shared, told, noted = basis[:, 0], basis[:, 1 : 1 + half], basis[:, 1 + half : 1 + size]
    embedding = model.model.embed_tokens.weight
    embedding -= embedding @ noted @ noted.T
    embedding += SHARED * shared
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= QUIET
        layer.mlp.down_proj.weight *= QUIET
    query, key, value, output = _head(model, *PREVIOUS)
    turns = config.rope_parameters["rope_theta"] ** (-torch.arange(NUM_FAST) / half)
    query.zero_()
    key.zero_()
    # A query turned back by one position meets the key of the position before it.
    query[:NUM_FAST] = AIM * turns.cos()[:, None] * shared
    query[half : half + NUM_FAST] = -AIM * turns.sin()[:, None] * shared
    key[:NUM_FAST] = AIM * shared
    value[:half] = NOTE * told.T
    output[:, :half] = NOTE * noted
    slow = torch.cat([torch.arange(FIRST_SLOW, half), torch.arange(half + FIRST_SLOW, size)])
    for number, place in enumerate(INDUCTION):
        query, key, value, output = _head(model, *place)
        query *= QUIET
        key *= QUIET
        query[slow] = MATCH * told[:, : len(slow)].T
        key[slow] = MATCH * noted[:, : len(slow)].T
        copied = basis[:, 1 + size * (number + 1) : 1 + size * (number + 2)]
        value.copy_(COPY * copied.T)
        output.copy_(COPY * copied)


def _head(model: Any, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of one head's query, key and value rows, each (head_dim, hidden), and output columns."""
    attention, size = model.model.layers[layer].self_attn, model.config.head_dim
    group = head // attention.num_key_value_groups
    own, shared = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
    return (
        attention.q_proj.weight[own],
        attention.k_proj.weight[shared],
        attention.v_proj.weight[shared],
        attention.o_proj.weight[:, own],
    )
