"""The reference kernels against their definitions, element by element."""

from __future__ import annotations

import pytest
import torch

from graft import kernels
from graft.kernels import reference, rounding
from graft.kernels.bits import pack_bits, unpack_bits
from graft.quant.formats import ABSMAX_FORMAT, FORMATS


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 33])
def test_bits_are_packed_highest_first(bits: int, size: int) -> None:
    codes = torch.randint(
        0, 2**bits, (size,), generator=torch.Generator().manual_seed(size), dtype=torch.uint8
    )
    text = "".join(f"{code:0{bits}b}" for code in codes.tolist())
    text += "0" * (-len(text) % 8)
    expected = [int(text[start : start + 8], 2) for start in range(0, len(text), 8)]
    packed = pack_bits(codes, bits)
    assert packed.tolist() == expected
    assert torch.equal(unpack_bits(packed, bits, size), codes)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nearest_codes_equal_a_search(quant_type: str) -> None:
    codebook = torch.tensor(FORMATS[quant_type].codebook)
    entries, order = torch.sort(codebook, stable=True)
    bounds = (entries[:-1] + entries[1:]) / 2
    edges = torch.arange(-4096, 4097) / 4096
    near = torch.cat([bounds, edges])
    values = torch.cat(
        [
            near,
            near.nextafter(torch.tensor(2.0)),
            near.nextafter(torch.tensor(-2.0)),
            torch.linspace(-1, 1, 300_001),
        ]
    ).clamp(-1, 1)
    expected = order[torch.bucketize(values, bounds)].to(torch.uint8)
    assert torch.equal(rounding.nearest_codes(values, codebook), expected)


def test_nearest_codes_of_a_crowded_codebook() -> None:
    """Entries closer than a cell cannot use the table of cells; the search takes over."""
    codebook = torch.cat([torch.linspace(-1e-4, 1e-4, 14), torch.tensor([-1.0, 1.0])])
    values = torch.linspace(-2e-4, 2e-4, 4001)
    distance = (
        (values[:, None] - codebook[rounding.nearest_codes(values, codebook).long()][:, None]).abs().amin(1)
    )
    least = (values[:, None] - codebook).abs().amin(1)
    assert bool((distance <= least + 1e-10).all())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_chunks_do_not_show(quant_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = FORMATS[quant_type]
    values = torch.randn(4096 * 3 + 77, generator=torch.Generator().manual_seed(0))
    for blocksize in (32, 4096):
        whole = fmt.encode(values, blocksize)
        decoded = fmt.decode(*whole, blocksize, torch.empty_like(values))
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4096)
        pieces = fmt.encode(values, blocksize)
        assert torch.equal(whole[0], pieces[0])
        assert torch.equal(whole[1], pieces[1])
        assert torch.equal(fmt.decode(*whole, blocksize, torch.empty_like(values)), decoded)
        monkeypatch.undo()


def test_decoding_is_entry_times_absmax() -> None:
    fmt = FORMATS["nf4"]
    values = torch.randn(200, generator=torch.Generator().manual_seed(1))
    packed, absmax = fmt.encode(values, 64)
    codes = unpack_bits(packed, 4, 200)
    expected = torch.tensor(fmt.codebook)[codes.long()] * absmax.repeat_interleave(64)[:200]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(fmt.decode(packed, absmax, 64, torch.empty(200, dtype=dtype)), expected.to(dtype))


def test_double_quantization_is_near() -> None:
    """The scales' own error is 0.2% where weights are normal (their absmax has mean 2.6, deviation 0.42)."""
    absmax = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).abs().amax(0)
    table = torch.tensor(ABSMAX_FORMAT.codebook)
    codes, scale, offset = kernels.call("encode_absmax", absmax, table)
    assert torch.equal(offset, absmax.mean().view(1))
    assert scale.shape == (16,)
    decoded = kernels.call("decode_absmax", codes, scale, offset, table)
    by_hand = table[codes.long()] * scale.repeat_interleave(256) + offset
    assert torch.equal(decoded, by_hand)
    assert (decoded / absmax - 1).square().mean().sqrt() < 0.005


def test_memory_beyond_the_result_is_small() -> None:
    """The largest tensor that encoding and decoding make is a chunk, not the weight."""
    values = torch.randn(1 << 20)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            fresh = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known
            if fresh:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    codes, absmax = FORMATS["nf4"].encode(values, 64)
    out = torch.empty_like(values)
    known = {tensor.untyped_storage().data_ptr() for tensor in (values, codes, absmax, out)}
    with Watch():
        FORMATS["nf4"].decode(codes, absmax, 64, out)
        packed, _ = FORMATS["nf4"].encode(values, 64)
    assert largest <= max(4 * 2**18, packed.numel())
