"""The compiled kernels against the reference: the same bytes, on every instruction set of the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graft import kernels
from graft.kernels import reference, reference_decode
from graft.kernels.cpu import backend, library
from graft.quant.formats import ABSMAX_FORMAT, FORMATS

pytestmark = pytest.mark.skipif(bool(library.problem()), reason=f"compiled kernels: {library.problem()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 5, 31, 63, 64, 65, 333, 1001, 4096 + 7, 70_001)
SYMMETRIC = [name for name, fmt in FORMATS.items() if not fmt.affine and fmt.bits < 8]
AFFINE = [name for name, fmt in FORMATS.items() if fmt.affine]
MAP = torch.tensor(ABSMAX_FORMAT.codebook)


def _values(size: int, seed: int = 0) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size + seed))
    values[size // 2 : size // 2 + 40] = 0  # a block of zeros and, with small blocks, a zero in others
    values[-1] = values[-1] * 40
    return values


def _codebook(name: str) -> Tensor:
    return torch.tensor(FORMATS[name].codebook)


def _nested(numbers: Tensor) -> list[Tensor]:
    return [*reference.encode_absmax(numbers, MAP), MAP]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_encoding_gives_the_bytes_of_the_reference(
    tier: str, name: str, blocksize: int, dtype: torch.dtype
) -> None:
    for size in SIZES:
        flat, sizes = _values(size).to(dtype), {"bits": FORMATS[name].bits, "blocksize": blocksize}
        expected = reference.encode_blockwise(flat, _codebook(name), **sizes)
        found = backend.encode_blockwise(flat, _codebook(name), **sizes)
        assert torch.equal(found[0], expected[0]), (tier, size)
        assert torch.equal(found[1], expected[1]), (tier, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_encoding_gives_the_bytes_of_the_reference(tier: str, name: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        flat, sizes = _values(size).to(dtype), {"bits": FORMATS[name].bits, "blocksize": 64}
        expected = reference.encode_affine(flat, _codebook(name), **sizes)
        found = backend.encode_affine(flat, _codebook(name), **sizes)
        assert all(map(torch.equal, found, expected)), (tier, size)


@pytest.mark.parametrize("rounding", ["grid", "nearest"])
@pytest.mark.parametrize("codebook", [MAP, _codebook("int8")], ids=["dynamic", "int8"])
def test_eight_bits_give_the_bytes_of_the_reference(
    tier: str, codebook: Tensor, rounding: reference.Rounding
) -> None:
    for size in SIZES:
        for dtype in DTYPES:
            flat = (_values(size) * torch.logspace(0, -6, size)).to(dtype)
            expected = reference.encode_blockwise(flat, codebook, bits=8, blocksize=256, rounding=rounding)
            found = backend.encode_blockwise(flat, codebook, bits=8, blocksize=256, rounding=rounding)
            assert all(map(torch.equal, found, expected)), (tier, size, dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_decoding_gives_the_values_of_the_reference(tier: str, name: str, nested: bool) -> None:
    fmt = FORMATS[name]
    for size in SIZES:
        for blocksize in (32, 64, 4096):
            stored = fmt.encode(_values(size), blocksize)
            scales, shifts = [stored.scale], [] if stored.shift is None else [stored.shift]
            if nested:
                scales, shifts = _nested(scales[0]), _nested(shifts[0]) if shifts else []
            args = (stored.codes, scales, shifts, _codebook(name))
            for dtype in DTYPES:
                expected, found = torch.empty(size, dtype=dtype), torch.full((size + 64,), 7.0, dtype=dtype)
                sizes = {"bits": fmt.bits, "blocksize": blocksize}
                reference_decode.decode_blockwise(*args, **sizes, out=expected)
                backend.decode_blockwise(*args, **sizes, out=found[:size])
                assert torch.equal(found[:size], expected), (tier, size, blocksize, dtype)
                assert bool((found[size:] == 7).all()), "writes past the end"


@pytest.mark.parametrize("name", ["nf4", "nf3"])
def test_a_large_result_that_is_written_around_the_cache(tier: str, name: str) -> None:
    size, fmt = (1 << 23) + 77, FORMATS[name]  # 16 MiB and a little in bfloat16
    stored = fmt.encode(_values(size), 64)
    args, sizes = (
        (stored.codes, _nested(stored.scale), [], _codebook(name)),
        {"bits": fmt.bits, "blocksize": 64},
    )
    expected, aligned = (torch.empty(size, dtype=torch.bfloat16) for _ in range(2))
    shifted = torch.empty(size + 1, dtype=torch.bfloat16)[1:]
    reference_decode.decode_blockwise(*args, **sizes, out=expected)
    for out in (aligned, shifted):
        backend.decode_blockwise(*args, **sizes, out=out)
        assert torch.equal(out, expected), tier


@pytest.mark.parametrize("scale", [1e-39, 3e-38, 1e-30, 1e30, 3e38])
def test_extreme_scales_round_as_the_reference(tier: str, scale: float) -> None:
    flat = (_values(640).double() / 100 * scale).float()
    codes, absmax = reference.encode_blockwise(flat, _codebook("nf4"), bits=4, blocksize=64)
    for dtype in DTYPES:
        out = [torch.empty(640, dtype=dtype) for _ in range(2)]
        args = (codes, [absmax], [], _codebook("nf4"))
        reference_decode.decode_blockwise(*args, bits=4, blocksize=64, out=out[0])
        backend.decode_blockwise(*args, bits=4, blocksize=64, out=out[1])
        assert torch.equal(out[0], out[1]), (tier, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_shows_in_its_scale(tier: str, bad: float) -> None:
    for dtype in DTYPES:
        for place in (0, 37, 63, 130):
            flat = _values(192).to(dtype)
            flat[place] = bad
            for name in ("nf4", "int4"):
                fmt = FORMATS[name]
                encode = backend.encode_affine if fmt.affine else backend.encode_blockwise
                scale = encode(flat, _codebook(name), bits=fmt.bits, blocksize=64)[1]
                assert torch.isfinite(scale).logical_not().nonzero().flatten().tolist() == [place // 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_product_of_few_rows_is_that_of_the_decoded_weight(
    tier: str, name: str, dtype: torch.dtype
) -> None:
    fmt = FORMATS[name]
    for in_features, out_features, blocksize in ((64, 9, 64), (96, 33, 64), (2080, 6, 32), (256, 5, 4096)):
        stored = fmt.encode(_values(in_features * out_features) / 20, blocksize)
        scales = _nested(stored.scale)
        shifts = [] if stored.shift is None else [stored.shift]
        weight = torch.empty(out_features, in_features, dtype=dtype)
        args = (stored.codes, scales, shifts, _codebook(name))
        reference_decode.decode_blockwise(*args, bits=fmt.bits, blocksize=blocksize, out=weight)
        for rows in (1, 2, 3, 5, 16, 23, 32):
            x = _values(rows * in_features, seed=1).view(rows, in_features).to(dtype)
            bias = _values(out_features).to(dtype)
            exact = x.double() @ weight.double().T + bias.double()
            y = backend.quantized_linear(
                x, *args, bias, bits=fmt.bits, blocksize=blocksize, out_features=out_features
            )
            # Sums in float32; bfloat16 keeps 8 bits of the result.
            largest = (x.double().abs() @ weight.double().T.abs() + bias.double().abs()).max()
            bound = largest * (2.0**-20 if dtype == torch.float32 else 2.0**-8)
            assert float((y.double() - exact).abs().max()) <= bound, (tier, in_features, rows)


@pytest.mark.parametrize("name", ["nf4", "nf3", "int4", "int8"])
def test_a_product_in_parts_is_that_in_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, in_features, out_features = FORMATS[name], 96, 200
    stored = fmt.encode(_values(in_features * out_features), 32)
    shifts = [] if stored.shift is None else _nested(stored.shift)
    args = (stored.codes, _nested(stored.scale), shifts, _codebook(name))
    x, bias = _values(39 * in_features).view(3, 13, in_features), _values(out_features)
    sizes = {"bits": fmt.bits, "blocksize": 32, "out_features": out_features}
    whole = backend.quantized_linear(x, *args, bias, **sizes)
    monkeypatch.setattr(backend, "PART_ELEMENTS", 70 * in_features)  # parts of 96 rows, the last of 8
    parts = backend.quantized_linear(x, *args, bias, **sizes)
    assert parts.shape == (3, 13, out_features)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-4)


def test_codes_that_are_not_contiguous_are_read_right(tier: str) -> None:
    codes, absmax = reference.encode_blockwise(_values(640), _codebook("nf4"), bits=4, blocksize=64)
    spread = torch.stack([codes, codes + 1], dim=1)[:, 0]
    assert not spread.is_contiguous()
    out = [torch.empty(640) for _ in range(2)]
    for given, into in zip((codes, spread), out, strict=True):
        backend.decode_blockwise(given, [absmax], [], _codebook("nf4"), bits=4, blocksize=64, out=into)
    assert torch.equal(*out)


def test_threads_give_the_same_bytes() -> None:
    flat, threads = _values(300_000), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(backend.encode_blockwise(flat, _codebook("nf4"), bits=4, blocksize=64)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_threads_of_its_own_give_the_same_bytes_where_torch_has_none_to_share() -> None:
    flat, lib = _values(300_000), library.library()
    shared = backend.encode_blockwise(flat, _codebook("nf4"), bits=4, blocksize=64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        lib.graft_use_openmp(None)
        own = backend.encode_blockwise(flat, _codebook("nf4"), bits=4, blocksize=64)
    finally:
        torch.set_num_threads(threads)
        lib.graft_use_openmp(library.openmp_parallel())
    assert all(map(torch.equal, shared, own))


def test_the_table_runs_them_and_says_what_they_are() -> None:
    chosen = {choice.op: choice.backend for choice in kernels.explain("cpu")}
    assert library.tier() in next(c.reason for c in kernels.explain("cpu") if c.op == "decode_blockwise")
    assert chosen["decode_blockwise"] == chosen["quantized_linear"] == chosen["encode_affine"] == "cpu"


def test_float64_is_decoded_by_the_reference() -> None:
    codes, absmax = reference.encode_blockwise(_values(64), _codebook("nf4"), bits=4, blocksize=64)
    out = torch.empty(64, dtype=torch.float64)
    wanted = torch.empty(64)
    args = (codes, [absmax], [], _codebook("nf4"))
    backend.decode_blockwise(*args, bits=4, blocksize=64, out=out)
    backend.decode_blockwise(*args, bits=4, blocksize=64, out=wanted)
    assert torch.equal(out.float(), wanted)


def test_a_missing_library_is_told_with_its_reason_and_the_reference_runs(tmp_path: Path) -> None:
    note = tmp_path / "libgraft.txt"
    note.write_text("there is no C++ compiler")
    code = f"""
import warnings, torch
from pathlib import Path
from graft.kernels.cpu import library
library.FILE = Path({str(note.with_suffix(".so"))!r})
from graft import kernels
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        kernels.call("encode_blockwise", torch.ones(64), torch.linspace(-1, 1, 16), bits=4, blocksize=64)
print(len(told), told[0].message)
print({{choice.backend for choice in kernels.explain()}})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("1 the cpu kernels are not used, the slower reference is: there is no C++ compiler")
    assert "install graft again" in out
    assert out.splitlines()[-1] == "{'reference'}"


def test_a_codebook_of_tiny_entries_keeps_its_subnormal_values(tier: str) -> None:
    codebook, absmax = torch.linspace(-1, 1, 16) * 1e-20, torch.tensor([1e-19])
    codes = torch.arange(32, dtype=torch.uint8) * 7
    out = [torch.empty(64, dtype=torch.bfloat16) for _ in range(2)]
    reference_decode.decode_blockwise(codes, [absmax], [], codebook, bits=4, blocksize=64, out=out[0])
    backend.decode_blockwise(codes, [absmax], [], codebook, bits=4, blocksize=64, out=out[1])
    assert out[0].count_nonzero() > 32
    assert torch.equal(out[0], out[1]), tier


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process on its memory is Linux's")
def test_where_the_system_gives_no_more_threads_those_that_there_are_do_the_work() -> None:
    code = """
import resource
import torch
from graft.kernels import reference
from graft.kernels.cpu import backend, library
torch.set_num_threads(64)
library.library().graft_use_openmp(None)
flat, codebook = torch.randn(5_000_000), torch.linspace(-1, 1, 16)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.RLIM_INFINITY))
codes, absmax = backend.encode_blockwise(flat, codebook, bits=4, blocksize=64)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(torch.equal(absmax, flat.view(-1, 64).abs().amax(1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
