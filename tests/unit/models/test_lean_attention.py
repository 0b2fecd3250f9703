"""Attention of halves that keeps halves: torch's own result and gradients, with less kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from graft.models.lean_attention import lean_attention, takes

ROUNDING = 2.0**-8
"""Half a step of bfloat16, of which results and the kept output have one each."""


def operands(key_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 40, 16), (2, key_heads, 40, 16), (2, key_heads, 40, 16)]
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def packed_mask() -> torch.Tensor:
    documents = torch.arange(40) // 13
    return (torch.ones(40, 40).tril().bool() & (documents[:, None] == documents[None])).expand(2, 1, 40, 40)


@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("masked", ["no", "truth", "numbers"])
def test_result_and_gradients_are_those_of_torch_in_float32(key_heads: int, masked: str) -> None:
    mask = None if masked == "no" else packed_mask()
    if masked == "numbers":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))  # type: ignore[union-attr,operator]
    q, k, v = operands(key_heads)
    weights = torch.randn(2, 40, 6, 16, generator=torch.Generator().manual_seed(1))
    assert takes(q, k, v, mask, {"scaling": 0.3})
    found = lean_attention(q, k, v, mask, 0.3)
    assert found.is_contiguous()
    got = torch.autograd.grad((found.float() * weights).sum(), [q, k, v])
    exact = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    wide = functional.scaled_dot_product_attention(
        *exact, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    expected = torch.autograd.grad((wide * weights).sum(), exact)
    for one, other in zip([found, *got], [wide, *expected], strict=True):
        gap = (one.detach().float() - other.detach()).norm() / other.detach().norm()
        assert float(gap) < 2 * ROUNDING


def test_no_float32_copy_and_no_mask_of_numbers_is_kept() -> None:
    q, k, v = operands(2)
    mask = packed_mask()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = lean_attention(q, k, v, mask, None)
    halves = [tensor for tensor in kept if tensor.dtype == torch.bfloat16]
    assert sum(t.numel() for t in halves) == q.numel() + k.numel() + v.numel() + found.numel()
    wide = [tensor for tensor in kept if tensor.dtype == torch.float32]
    assert [tuple(tensor.shape) for tensor in wide] == [(2, 6, 40)]
    assert any(tensor.data_ptr() == mask.data_ptr() for tensor in kept)
