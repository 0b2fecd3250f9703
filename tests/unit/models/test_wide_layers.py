"""A model in halves on a processor without their products: the same model, computed in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graft.adapters.attach import attach
from graft.adapters.lora import LoraConfig
from graft.kernels import wide
from graft.kernels.cpu import library
from graft.models.attention import ATTENTION
from graft.models.load import load
from graft.models.wide_layers import WideLinear, widen


@pytest.fixture(autouse=True)
def as_on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_has_products", lambda dtype: False)
    monkeypatch.setattr(library, "has_attention", lambda: False)


def test_a_product_and_its_gradient_are_rounded_once() -> None:
    layer = nn.Linear(48, 40, dtype=torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    assert widen_linears(model) == 1
    x = torch.randn(3, 20, 48).bfloat16().requires_grad_()
    y = model(x)
    assert y.grad_fn is not None
    assert "WideProduct" in type(y.grad_fn).__name__
    exact = x.detach().double() @ layer.weight.detach().double().T + layer.bias.detach().double()
    assert (
        torch.equal(y, exact.float().bfloat16()) or float((y.detach().double() - exact).abs().max()) < 2**-7
    )
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    wanted = grad.double() @ layer.weight.detach().double()
    assert float((x.grad.double() - wanted).abs().max() / wanted.abs().max()) < 2**-8


def widen_linears(model: nn.Module) -> int:
    model.config = type("Config", (), {})()  # type: ignore[assignment]
    return widen(model)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_weight_that_trains_has_its_gradient(rows: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    widen_linears(model)
    model(torch.randn(rows, 8).bfloat16()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_loaded_model_computes_in_float32_and_keeps_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = load("builtin", dtype="bfloat16")
    assert made.model.config._attn_implementation == ATTENTION
    linears = [m for m in made.model.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all(type(m) is WideLinear for m in linears)
    assert made.model.lm_head.weight is made.model.get_input_embeddings().weight
    monkeypatch.setattr(wide, "_has_products", lambda dtype: True)
    plain = load("builtin", dtype="bfloat16")
    assert plain.model.config._attn_implementation == "sdpa"
    assert list(plain.model.state_dict()) == list(made.model.state_dict())
    assert plain.fingerprint == made.fingerprint
    ids = torch.randint(3, 200, (2, 40))
    exact = load("builtin", dtype="float32").model(ids).logits
    with torch.no_grad():
        plainly = (plain.model(ids).logits.float() - exact).abs().mean()
        monkeypatch.setattr(wide, "_has_products", lambda dtype: False)
        widely = (made.model(ids).logits.float() - exact).abs().mean()
    assert float(widely) < 1.2 * float(plainly)


def _adapter_gradients(dtype: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    model = load("builtin", dtype=dtype).model
    attach(model, LoraConfig(rank=4))
    for module in model.modules():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B, std=0.02, generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_adapters_are_nearer_to_those_of_float32_than_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact, widely = _adapter_gradients("float32"), _adapter_gradients("bfloat16")
    monkeypatch.setattr(wide, "_has_products", lambda dtype: True)
    plainly = _adapter_gradients("bfloat16")
    assert exact.keys() == widely.keys() == plainly.keys()
    off = {
        kind: sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)
        for kind, found in (("widely", widely), ("plainly", plainly))
    }
    assert off["widely"] < 1.1 * off["plainly"], off
    assert off["widely"] > 0


def test_saving_writes_an_ordinary_model(tmp_path: Path) -> None:
    made = load("builtin", dtype="bfloat16")
    made.model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
