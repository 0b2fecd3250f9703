"""The Triton kernels against the reference, bit for bit, under Triton's interpreter.

Not collected by name: `test_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1 set
before Triton is imported, so that no other test meets an interpreted Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter

from graft.kernels import bits as reference_bits
from graft.kernels import reference, reference_decode, reference_linear
from graft.kernels.ops import fill
from graft.kernels.table import OpTable
from graft.kernels.triton import backend, decode, encode, launch, linear
from graft.quant.config import QuantizationConfig
from graft.quant.formats import ABSMAX_FORMAT, FORMATS
from graft.quant.tensor import quantize

pytestmark = [
    # numpy computes 1/0 for blocks of zeros, as the device does without a word.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy.*"),
]

SIZES = (1, 7, 64, 1001, 4128, 8999)
ONLY_ON_CPU = {
    *("attention", "attention_backward", "cross_entropy"),
    *("rms_norm", "rms_norm_backward", "silu_product", "silu_product_backward"),
}
"""What models run on a CPU alone."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constants(num_blocks: int, nested: bool, generator: torch.Generator) -> list[Tensor]:
    """Scales or shifts in the form that ops take."""
    if not nested:
        return [torch.randn(num_blocks, generator=generator)]
    codes = torch.randint(0, 256, (num_blocks,), generator=generator, dtype=torch.uint8)
    scale = torch.rand(-(-num_blocks // 256), generator=generator)
    return [codes, scale, torch.randn(1, generator=generator), torch.tensor(ABSMAX_FORMAT.codebook)]


def random_weight(num_elements: int, bits: int, blocksize: int, nested: bool, shifted: bool, seed: int = 0):  # noqa: ANN201
    """Codes, scales, shifts and a codebook, all random: every code of every width occurs."""
    generator = random(seed)
    codes = torch.randint(0, 256, ((num_elements * bits + 7) // 8,), generator=generator, dtype=torch.uint8)
    num_blocks = -(-num_elements // blocksize)
    scales = constants(num_blocks, nested, generator)
    shifts = constants(num_blocks, nested, generator) if shifted else []
    return codes, scales, shifts, torch.randn(2**bits, generator=generator)


def as_interpreted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 rounded as the interpreter does, which cuts bfloat16 off; a device rounds to nearest even."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    tl = interpreter.tl
    rounded = interpreter._convert_float(values.numpy(), tl.float32, tl.bfloat16, None)
    return torch.from_numpy(rounded.view("int16")).view(torch.bfloat16)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decoding(bits: int, nested: bool, shifted: bool) -> None:
    for size, blocksize in zip(SIZES, (64, 32, 64, 128, 4096, 64), strict=True):
        weight = random_weight(size, bits, blocksize, nested, shifted, seed=size)
        options = {"bits": bits, "blocksize": blocksize}
        expected = reference_decode.decode_blockwise(*weight, **options, out=torch.empty(size))
        for dtype in DTYPES:
            out = torch.full((size,), float("nan"), dtype=dtype)
            assert decode.decode_blockwise(*weight, **options, out=out) is out
            assert torch.equal(out, as_interpreted(expected, dtype)), f"{size} elements, {dtype}"


def test_codes_at_an_odd_address_and_in_two_dimensions() -> None:
    codes, *rest = random_weight(1024, 4, 64, nested=True, shifted=False)
    expected = reference_decode.decode_blockwise(codes, *rest, bits=4, blocksize=64, out=torch.empty(1024))
    moved = torch.cat([codes.new_zeros(1), codes])[1:]
    assert [launch.whole_words(part, 4) for part in (codes, moved, codes[:-1])] == [True, False, False]
    for placed in (moved, codes.view(32, 16)):
        out = torch.empty(32, 32)
        decode.decode_blockwise(placed, *rest, bits=4, blocksize=64, out=out)
        assert torch.equal(out.view(-1), expected)


def values_for_encoding(size: int, codebook: Tensor, affine: bool) -> Iterator[Tensor]:
    generator = random(size)
    spread = torch.tensor([1.0, 1e-3, 30.0]).repeat_interleave(100).repeat(size // 300 + 1)[:size]
    normal = torch.randn(size, generator=generator) * spread
    normal[size // 2 : size // 2 + 40] = 0
    yield normal
    yield torch.zeros(size)
    yield torch.randn(size, generator=generator) * 1e-39  # where the reciprocal of a scale overflows
    # On the bounds between entries, where ties go to the lower one, and a division is not the product with a
    # reciprocal.
    entries = codebook.sort().values
    ends = torch.tensor([1.0, 0.0] if affine else [1.0])
    bounds = torch.cat([ends, (entries[:-1] + entries[1:]) / 2]).repeat(size // 3 + 1)[:size]
    yield from (bounds, bounds * 0.3, bounds * 1.7)


@pytest.mark.parametrize("quant_type", [*FORMATS, "dynamic"])
def test_encoding(quant_type: str) -> None:
    fmt = FORMATS.get(quant_type, ABSMAX_FORMAT)
    codebook = torch.tensor(fmt.codebook)
    affine = min(fmt.codebook) == 0
    roundings = ("nearest", "grid") if fmt.bits == 8 else ("nearest",)
    for size, blocksize in ((7, 64), (1001, 32), (8999, 4096)):
        options = {"bits": fmt.bits, "blocksize": blocksize}
        for index, values in enumerate(values_for_encoding(size, codebook, affine)):
            flat = values.to(DTYPES[index % 3] if index < 3 else torch.float32)
            if affine:
                expected = reference.encode_affine(flat, codebook, **options)
                found = encode.encode_affine(flat, codebook, **options)
                assert all(map(torch.equal, found, expected)), f"{size} values of kind {index}"
                continue
            for rounding in roundings:
                expected = reference.encode_blockwise(flat, codebook, **options, rounding=rounding)
                found = encode.encode_blockwise(flat, codebook, **options, rounding=rounding)
                assert all(map(torch.equal, found, expected)), f"{size} values of kind {index}, {rounding}"


def test_what_is_not_finite_shows_in_the_scale() -> None:
    values = torch.ones(256)
    values[3], values[70], values[200] = float("nan"), float("inf"), float("-inf")
    codebook = torch.tensor(FORMATS["nf4"].codebook)
    codes, absmax = encode.encode_blockwise(values, codebook, bits=4, blocksize=64)
    expected_codes, expected = reference.encode_blockwise(values, codebook, bits=4, blocksize=64)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
    affine = torch.tensor(FORMATS["int4"].codebook)
    _, scale, _ = encode.encode_affine(values, affine, bits=4, blocksize=64)
    assert torch.isfinite(scale).tolist() == [False, False, True, False]


def test_scales_of_scales() -> None:
    table = torch.tensor(ABSMAX_FORMAT.codebook)
    absmax = torch.rand(1000, generator=random(1)) + 1
    found, expected = encode.encode_absmax(absmax, table), reference.encode_absmax(absmax, table)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(decode.decode_absmax(*found, table), reference_decode.decode_absmax(*found, table))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packing(bits: int) -> None:
    for size in SIZES:
        codes = torch.randint(0, 2**bits, (size,), generator=random(size), dtype=torch.uint8)
        packed = encode.pack_bits(codes, bits)
        assert torch.equal(packed, reference_bits.pack_bits(codes, bits))
        assert torch.equal(decode.unpack_bits(packed, bits, size), codes)


def check_product(x: Tensor, out_features: int, bits: int, nested: bool, shifted: bool, biased: bool) -> None:
    in_features = x.shape[-1]
    weight = random_weight(out_features * in_features, bits, 64, nested, shifted, seed=in_features)
    options = {"bits": bits, "blocksize": 64}
    dense = reference_decode.decode_blockwise(*weight, **options, out=torch.empty(out_features, in_features))
    bias = torch.randn(out_features, generator=random(5)).to(x.dtype) if biased else None
    y = linear.quantized_linear(x, *weight, bias, **options, out_features=out_features)
    assert y.shape == (*x.shape[:-1], out_features)
    assert y.dtype == x.dtype
    expected = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ dense.double().abs().T + 1
    # One rounding of the result, and one of each weight where they are multiplied in x's dtype.
    allowed = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}[x.dtype]
    assert float(((y.double() - expected).abs() / magnitude).max()) < allowed


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_row(bits: int, nested: bool, shifted: bool) -> None:
    dtype = DTYPES[bits % 3]
    x = torch.randn(1, 1, 200, generator=random(2)).to(dtype)
    check_product(x, 9, bits, nested, shifted, biased=nested)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_few_rows(bits: int, nested: bool, shifted: bool) -> None:
    # The interpreter multiplies the bits of bfloat16 as integers: that dtype is checked on devices only.
    dtype = torch.float16 if shifted else torch.float32
    x = torch.randn(2 + bits, 72, generator=random(3)).to(dtype)
    check_product(x, 70, bits, nested, shifted, biased=not nested)


@pytest.mark.parametrize(
    ("rows", "in_features", "why"),
    [
        (1, 1100, "more columns than a program holds"),
        (16, 264, "as many rows as are fused"),
        (17, 64, "more rows than are fused"),
        (3, 36, "rows of W that end inside a group"),
    ],
)
def test_sizes_of_products(rows: int, in_features: int, why: str) -> None:
    check_product(torch.randn(rows, in_features, generator=random(4)), 6, 4, True, False, biased=True)


def test_x_need_not_be_contiguous_nor_columns_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(64, 4, generator=random(6)).T
    check_product(x, 6, 4, nested=True, shifted=False, biased=True)
    check_product(x[:1, ::2].expand(1, 32), 6, 4, nested=True, shifted=False, biased=True)
    monkeypatch.setattr(linear, "MATRIX_PROGRAMS", 1)
    check_product(torch.randn(4, 520, generator=random(6)), 6, 4, nested=True, shifted=False, biased=True)


def test_the_gradient() -> None:
    weight = random_weight(24 * 40, 4, 64, nested=True, shifted=True)
    grad = torch.randn(3, 24, generator=random(7))
    options = {"bits": 4, "blocksize": 64, "in_features": 40}
    expected = reference_linear.quantized_linear_backward(grad, *weight, **options)
    assert torch.equal(linear.quantized_linear_backward(grad, *weight, **options), expected)


def test_every_op_of_the_table() -> None:
    table = OpTable()
    fill(table)
    backend.add_to(table, devices=("cpu",), problem=lambda: "")
    lacking = {choice.op for choice in table.explain("cpu") if choice.backend != "triton"}
    assert lacking == ONLY_ON_CPU
    weight = torch.randn(33, 40, generator=random(8))
    codebook = torch.tensor(FORMATS["int3"].codebook)
    codes, scale, shift = table.call("encode_affine", weight.view(-1), codebook, bits=3, blocksize=64)
    expected = quantize(weight, QuantizationConfig(quant_type="int3", double_quant=False))
    out = torch.empty_like(weight)
    table.call("decode_blockwise", codes, [scale], [shift], codebook, bits=3, blocksize=64, out=out)
    assert torch.equal(out, expected.dequantize())


def test_nothing_in_nothing_out() -> None:
    codebook = torch.tensor(FORMATS["nf4"].codebook)
    codes, absmax = encode.encode_blockwise(torch.empty(0), codebook, bits=4, blocksize=64)
    assert (codes.numel(), absmax.numel()) == (0, 0)
    assert (
        decode.decode_blockwise(
            codes, [absmax], [], codebook, bits=4, blocksize=64, out=torch.empty(0)
        ).numel()
        == 0
    )
    assert decode.unpack_bits(encode.pack_bits(codes, 4), 4, 0).numel() == 0
    weight = random_weight(6 * 64, 4, 64, nested=False, shifted=False)
    y = linear.quantized_linear(torch.empty(0, 64), *weight, None, bits=4, blocksize=64, out_features=6)
    assert y.shape == (0, 6)
