"""Files of quantization-aware training in other tools: PEFT's LoRA, bitsandbytes' 4-bit layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.adapters.attach import attach
from graft.adapters.attached import trained_tensors
from graft.adapters.merge import merge
from graft.adapters.peft_format import save_adapter
from graft.adapters.qat import QatConfig
from graft.models.load import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peers

IDS = torch.arange(3, 43)[None]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""Rows are whole blocks, without which bitsandbytes is wrong on a CPU."""


def trained(directory: Path, out: Path, **how: Any) -> Any:
    base = load(directory)
    attach(base.model, QatConfig(rank=4, alpha=8, **how))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in trained_tensors(base.model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    save_adapter(base.model, out)
    return base.model


def test_peft_runs_the_update_without_rounding(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = trained(tiny_dir("llama"), tmp_path / "a")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    peer = PeftModel.from_pretrained(theirs, str(tmp_path / "a")).eval()
    dense = load(tiny_dir("llama")).model
    for path, layer in dense.named_modules():
        adapted: Any = model.get_submodule(path) if path else None
        if hasattr(adapted, "adapters"):
            down, up = adapted.adapters["default"].tensors().values()
            layer.weight.data += 2.0 * (up.detach() @ down.detach())
    with torch.no_grad():
        found, expected, live = (each(IDS).logits for each in (peer, dense, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - live).abs().max() > 1e-2


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_computes_with_the_trained_weights(
    tiny_dir: Callable[..., Path], tmp_path: Path, double_quant: bool
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model = trained(tiny_dir("llama", **WIDE), tmp_path / "a", double_quant=double_quant)
    merge(tmp_path / "a", tmp_path / "m")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    num_layers = 0
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for path, layer in theirs.named_modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                adapted: Any = model.get_submodule(path)
                ours = adapted.adapters["default"].merged_weight(adapted.base, adapted.base.dense_weight())
                weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                assert torch.equal(weight, ours), path
                num_layers += 1
    assert num_layers == 14
