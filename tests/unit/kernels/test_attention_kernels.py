"""Attention and its gradients: the reference against float64, the compiled one against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graft import kernels
from graft.errors import ModelError
from graft.kernels import reference_attention as reference
from graft.kernels.cpu import attention as compiled

ROUNDING = 2.0**-8
"""Half a step of bfloat16."""

SHAPES = {  # B, heads, key heads, T, D
    "less than a tile": (2, 6, 2, 40, 16),
    "tiles and a rest": (2, 4, 2, 150, 64),
    "more keys than are in memory at once": (1, 2, 1, 1100, 32),
    "wide heads": (1, 2, 2, 129, 256),
    "a dimension of no power of two": (1, 3, 1, 70, 80),
    "whole tiles, many heads": (4, 8, 8, 128, 32),
}


def operands(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Q, k, v and a gradient, laid out as a model has them: (B, T, heads, D) seen as (B, heads, T, D)."""
    batch, heads, key_heads, length, size = shape
    generator = torch.Generator().manual_seed(length)
    made = [
        torch.randn(batch, length, count, size, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, key_heads, key_heads, heads)
    ]
    return [*made[:3], made[3].transpose(1, 2)]


def documents(batch: int, length: int) -> Tensor:
    """Rows of several documents, others in each row; the first query of all may look at nothing."""
    places = torch.arange(length)
    rows = [places // (length // (row + 2) + 1) for row in range(batch)]
    seen = torch.stack([(row[:, None] == row[None]) & (places[:, None] >= places) for row in rows])
    seen[:, 0] = False
    return seen[:, None]


def masks(batch: int, length: int) -> dict[str, Tensor | None]:
    mask = documents(batch, length)
    shared = documents(1, length).expand(batch, 1, length, length)
    numbers = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    numbers[:, :, 0, 0] = 0
    return {"causal": None, "documents": mask, "one for all rows": shared, "numbers": numbers}


@pytest.mark.parametrize("masked", ["causal", "documents", "numbers"])
def test_the_reference_is_the_formula(masked: str) -> None:
    q, k, v, grad = operands((2, 4, 2, 20, 16), torch.float32)
    mask = masks(2, 20)[masked]
    output, sums = reference.attention(q, k, v, mask, scale=0.3)
    exact = [part.double().requires_grad_() for part in (q, k, v)]
    scores = exact[0] @ exact[1].repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if mask is None:
        mask = torch.ones(20, 20).tril().bool()[None, None]
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -math.inf).all(-1)
    weights = scores.masked_fill(empty[..., None], 0).softmax(-1).masked_fill(empty[..., None], 0)
    wanted = (weights @ exact[2].repeat_interleave(2, 1)).transpose(1, 2)
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(output.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    logarithms = scores.detach().exp().sum(-1).log().masked_fill(empty, 0)
    torch.testing.assert_close(sums.double(), logarithms, rtol=1e-5, atol=1e-5)
    found = reference.attention_backward(grad, q, k, v, masks(2, 20)[masked], output, sums, scale=0.3)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("masked", ["causal", "documents", "one for all rows", "numbers"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_compiled_attention_is_the_reference(
    tier: str, shape: tuple[int, int, int, int, int], masked: str
) -> None:
    q, k, v, grad = operands(shape)
    mask = masks(shape[0], shape[3])[masked]
    wide = [part.float() for part in (q, k, v)]
    output, sums = compiled.attention(q, k, v, mask, scale=0.2)
    wanted, logarithms = reference.attention(*wide, mask, scale=0.2)
    assert output.is_contiguous()
    assert gap(output, wanted) < ROUNDING
    if mask is None or mask.dtype == torch.bool:
        torch.testing.assert_close(sums, logarithms, rtol=1e-4, atol=1e-4)
    found = compiled.attention_backward(grad, q, k, v, mask, output, sums, scale=0.2)
    expected = reference.attention_backward(grad.float(), *wide, mask, wanted, logarithms, scale=0.2)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert one.shape == other.shape
        assert gap(one, other) < 1.5 * ROUNDING


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gradients_of_shared_key_heads_do_not_depend_on_how_the_work_is_cut(threads: int) -> None:
    """With few key heads each head is a piece of work, and their gradients are summed afterwards."""
    q, k, v, grad = operands((1, 6, 2, 200, 32))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        output, sums = compiled.attention(q, k, v, None, scale=0.2)
        found = compiled.attention_backward(grad, q, k, v, None, output, sums, scale=0.2)
        again = compiled.attention_backward(grad, q, k, v, None, output, sums, scale=0.2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    expected = reference.attention_backward(
        grad.float(), q.float(), k.float(), v.float(), None, output.float(), sums, scale=0.2
    )
    for one, other in zip(found, expected, strict=True):
        assert gap(one, other) < 1.5 * ROUNDING


def test_what_is_not_finite_stays_so(tier: str) -> None:
    for place in range(3):
        parts = operands((1, 2, 1, 100, 32))
        parts[place][0, 0, 50, 3] = math.nan
        q, k, v, grad = parts
        output, sums = compiled.attention(q, k, v, None, scale=0.2)
        if place < 2:  # nothing times a value that is no number is no number either
            assert torch.isfinite(output[0, :50]).all()
        assert torch.isnan(output[0, 50, 0]).any()
        found = compiled.attention_backward(grad, q, k, v, None, output, sums, scale=0.2)
        assert any(torch.isnan(part).any() for part in found)


def test_large_scores_do_not_overflow(tier: str) -> None:
    q, k, v, _ = operands((1, 2, 2, 80, 16))
    q, k = q * 100, k * 100
    output, _ = compiled.attention(q, k, v, None, scale=1.0)
    wanted, _ = reference.attention(q.float(), k.float(), v.float(), None, scale=1.0)
    assert torch.isfinite(output).all()
    assert gap(output, wanted) < 4 * ROUNDING


def test_any_strides_are_read() -> None:
    q, k, v, _ = operands((2, 4, 2, 70, 32))
    wanted, _ = compiled.attention(q, k, v, None, scale=0.2)
    scattered = [torch.stack([part, part], -1)[..., 0] for part in (q, k, v)]
    assert not any(part.stride(-1) == 1 for part in scattered)
    assert torch.equal(compiled.attention(*scattered, None, scale=0.2)[0], wanted)
    dense = [part.contiguous() for part in (q, k, v)]
    assert torch.equal(compiled.attention(*dense, None, scale=0.2)[0], wanted)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k, v, grad = operands((2, 4, 2, 20, 16))
    call = kernels.call
    odd = torch.zeros(2, 3, 20, 16, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="4 heads cannot share 3 key heads"):
        call("attention", q, odd, odd, None, scale=1.0)
    with pytest.raises(ModelError, match=r"mask bool \(2, 4, 20, 20\) is not"):
        call("attention", q, k, v, torch.ones(2, 4, 20, 20, dtype=torch.bool), scale=1.0)
    with pytest.raises(ModelError, match="do not fit query"):
        call("attention", q, k[:, :, :10], v, None, scale=1.0)
    with pytest.raises(ModelError, match=r"key float32 .* is not \(B, heads, T, D\)"):
        call("attention", q, k.float(), v, None, scale=1.0)
    output, sums = call("attention", q, k, v, None, scale=1.0)
    with pytest.raises(ModelError, match="grad bfloat16"):
        call("attention_backward", grad[:, :5], q, k, v, None, output, sums, scale=1.0)
    with pytest.raises(ModelError, match="sums"):
        call("attention_backward", grad, q, k, v, None, output, sums.double(), scale=1.0)


def test_scores_that_grow_from_one_part_of_the_keys_to_the_next(tier: str) -> None:
    q, k, v, _ = operands((1, 2, 2, 1300, 16))
    k = k * torch.linspace(0.01, 200, 1300).bfloat16()[:, None]
    output, sums = compiled.attention(q, k, v, None, scale=1.0)
    wanted, logarithms = reference.attention(q.float(), k.float(), v.float(), None, scale=1.0)
    assert float(logarithms.max()) > 100
    assert gap(output, wanted) < 4 * ROUNDING
    torch.testing.assert_close(sums, logarithms, rtol=1e-4, atol=1e-3)
