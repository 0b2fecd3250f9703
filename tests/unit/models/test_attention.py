"""The attention that models in halves are given: where, and that it computes what theirs did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from graft.data.loader import Loader
from graft.data.masking import Sample
from graft.evaluate.loss import token_losses
from graft.kernels import wide
from graft.kernels.cpu import library
from graft.kernels.cpu.attention import is_compiled
from graft.models import attention
from graft.models.attention import ATTENTION, attend
from graft.models.load import load

compiled = pytest.mark.skipif(
    not is_compiled(torch.bfloat16, 16), reason="no compiled attention for this processor"
)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What attention ran: graft's as if it were compiled here, or another one."""
    ran: list[str] = []
    lean = attention.lean_attention

    def noted(*args: Any) -> torch.Tensor:
        ran.append("ours")
        return lean(*args)

    monkeypatch.setattr(attention, "is_compiled", lambda dtype, head_dim: dtype == torch.bfloat16)
    monkeypatch.setattr(attention, "lean_attention", noted)
    monkeypatch.setattr(wide, "_has_products", lambda dtype: True)
    return ran


def operands(length: int = 20, keys: int = 20, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, length, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class Layer(nn.Module):
    num_key_value_groups = 2

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal


UNUSUAL: dict[str, tuple[Layer, list[torch.Tensor], dict[str, Any]]] = {
    "every token sees all": (Layer(is_causal=False), operands(), {}),
    "a cache": (Layer(), operands(length=1), {}),
    "dropout": (Layer(), operands(), {"dropout": 0.1}),
    "float32": (Layer(), operands(dtype=torch.float32), {}),
    "one token": (Layer(), operands(length=1, keys=1), {}),
}


def test_the_usual_is_computed_by_the_kernels(called: list[str]) -> None:
    q, k, v = operands()
    found, _ = attend(Layer(), q, k, v, None, scaling=0.3)
    assert called == ["ours"]
    wanted = nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found.float(), wanted.transpose(1, 2), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("case", UNUSUAL)
def test_the_unusual_goes_the_usual_way(case: str, called: list[str]) -> None:
    layer, (q, k, v), settings = UNUSUAL[case]
    torch.manual_seed(0)
    found, _ = attend(layer, q, k, v, None, **settings)
    assert not called
    torch.manual_seed(0)
    causal = layer.is_causal and q.shape[2] > 1
    wanted = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, dropout_p=settings.get("dropout", 0.0), enable_gqa=True
    )
    assert torch.equal(found, wanted.transpose(1, 2))


@compiled
def test_a_loaded_model_has_it_and_loses_the_same(
    tiny_dir: Callable[..., Path], tiny_family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = {"hidden_size": 64}
    if "head_dim" in AutoConfig.from_pretrained(tiny_dir(tiny_family)).to_dict():
        wider["head_dim"] = 16
    directory = tiny_dir(tiny_family, **wider)
    ours = load(directory, dtype="bfloat16").model
    monkeypatch.setattr(library, "has_attention", lambda: False)
    theirs = load(directory, dtype="bfloat16").model
    exact = load(directory, dtype="float32").model
    implementation = ours.config._attn_implementation
    assert implementation in (ATTENTION, "eager")
    assert theirs.config._attn_implementation == ("sdpa" if implementation == ATTENTION else "eager")
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (30, 9, 20, 31)]
    samples = [Sample(row, [-100, *row[1:]]) for row in ids]
    for packing in (False, True):
        batch = next(Loader(samples, 4, 64, packing, shuffle=False).epoch(0))
        with torch.no_grad():
            found, plain, wanted = (token_losses(model, batch)[0] for model in (ours, theirs, exact))
        assert float((found - wanted).abs()) < 2 * float((plain - wanted).abs()) + 2**-8 * float(wanted)


def test_masks_of_other_shapes_and_tracing_go_the_usual_way(called: list[str]) -> None:
    q, k, v = operands()
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    found, _ = attend(Layer(), q, k, v, mask)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    slopes = torch.func.grad(lambda q: attend(Layer(), q, k, v, None)[0].float().sum())(q)
    assert torch.isfinite(slopes).all()
    assert not called


@compiled
def test_another_default_device_is_not_where_it_works() -> None:
    q, k, v = operands()
    wanted, _ = attend(Layer(), q, k, v, None)
    with torch.device("meta"):
        found, _ = attend(Layer(), q, k, v, None)
    assert torch.equal(found, wanted)
