"""Products of halves in float32: the same weight, sums as exact as float32's, whatever the machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graft.kernels import reference_decode, wide
from graft.kernels.cpu import backend, library
from graft.quant.formats import FORMATS

HALVES = (torch.bfloat16, torch.float16)
# Two roundings to halves (x's gradient, y), and sums in float32 that are far below them.
BOUND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def as_on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_has_products", lambda dtype: False)


def _near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    return bool(((found.double() - exact).abs() <= BOUND[dtype] * exact.abs().max()).all())


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wide_product_is_the_exact_one_rounded_once(
    dtype: torch.dtype, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "PART_ELEMENTS", 3 * 96)  # parts of three rows, the last of one
    weight, x = torch.randn(40, 96).to(dtype), torch.randn(2, rows, 96).to(dtype)
    added = torch.randn(40).to(dtype) if bias else None
    fill = lambda start, stop, out: out.copy_(weight[start:stop])  # noqa: E731
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    y = wide.wide_linear(x, 40, fill, added)
    assert y.shape == (2, rows, 40)
    assert y.dtype == dtype
    assert _near(y, exact, dtype)
    back = wide.wide_linear_backward(y, 96, fill)
    assert back.shape == x.shape
    assert _near(back, y.double() @ weight.double(), dtype)


def test_no_rows_of_the_weight_give_zeros() -> None:
    fill = lambda start, stop, out: None  # noqa: E731
    assert wide.wide_linear(torch.ones(3, 8).bfloat16(), 0, fill).shape == (3, 0)
    assert torch.equal(
        wide.wide_linear_backward(torch.ones(3, 0).bfloat16(), 8, fill), torch.zeros(3, 8).bfloat16()
    )


@pytest.mark.skipif(bool(library.problem()), reason=f"compiled kernels: {library.problem()}")
@pytest.mark.parametrize("tier", [] if library.problem() else library.tiers())
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_quantized_product_takes_the_weight_that_decoding_gives(
    name: str, dtype: torch.dtype, tier: str, as_on_avx2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "PART_ELEMENTS", 64 * 96)
    fmt, out_features, in_features = FORMATS[name], 200, 96
    stored = fmt.encode(torch.randn(out_features * in_features), 64)
    shifts = [] if stored.shift is None else [stored.shift]
    args = (stored.codes, [stored.scale], shifts, torch.tensor(fmt.codebook))
    weight = torch.empty(out_features, in_features, dtype=dtype)
    reference_decode.decode_blockwise(*args, bits=fmt.bits, blocksize=64, out=weight)
    library.force_tier(tier)
    try:
        for rows in (3, 70):  # few enough to be multiplied while decoding, and not
            x = torch.randn(rows, in_features).to(dtype)
            sizes = {"bits": fmt.bits, "blocksize": 64}
            y = backend.quantized_linear(x, *args, None, **sizes, out_features=out_features)
            assert y.dtype == dtype
            assert _near(y, x.double() @ weight.double().T, dtype)
            back = backend.quantized_linear_backward(y, *args, **sizes, in_features=in_features)
            assert _near(back, y.double() @ weight.double(), dtype)
    finally:
        library.force_tier(None)


@pytest.mark.skipif(bool(library.problem()), reason=f"compiled kernels: {library.problem()}")
@pytest.mark.parametrize("tier", [] if library.problem() else library.tiers())
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("name", list(FORMATS))
def test_wide_values_are_those_of_halves(name: str, blocksize: int, tier: str) -> None:
    fmt, size = FORMATS[name], 3 * 4096 + 77
    stored = fmt.encode(torch.randn(size), blocksize)
    shifts = [] if stored.shift is None else [stored.shift]
    args = (stored.codes, [stored.scale], shifts, torch.tensor(fmt.codebook))
    library.force_tier(tier)
    try:
        for dtype in HALVES:
            expected = torch.empty(size, dtype=dtype)
            reference_decode.decode_blockwise(*args, bits=fmt.bits, blocksize=blocksize, out=expected)
            weight, _held = backend._weight(*args, fmt.bits, blocksize, size)
            found = torch.full((size + 8,), 7.0)
            backend._filler(weight, size, dtype)(0, 1, found[:size])
            assert torch.equal(found[:size], expected.float()), (tier, dtype)
            assert bool((found[size:] == 7).all()), "writes past the end"
    finally:
        library.force_tier(None)
