"""Adapters on experts beside PEFT on transformers' fused experts: each computes with what the other wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import graft
from graft.adapters.attached import adapter_tensors
from graft.errors import AdapterError
from graft.models.load import load

IDS = torch.arange(3, 40)[None]
SIZES: dict[str, Any] = {"num_experts_per_tok": 3, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 12},
    "qwen3_moe": {"num_experts": 12, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 12, "head_dim": 8},
}
LEAVES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers for a deprecated name
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*grouped_mm.*"),
]


@pytest.fixture
def base_dir(tiny_dir: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda family: tiny_dir(family, **SIZES, **FAMILIES[family])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fused(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=5e-5)


def noisy(tensors: Any) -> None:
    torch.manual_seed(1)
    for tensor in tensors:
        tensor.data += 0.2 * torch.randn_like(tensor)


@pytest.mark.parametrize("family", sorted(LEAVES))
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_reads_what_graft_writes(
    base_dir: Callable[[str], Path], tmp_path: Path, family: str, use_rslora: bool
) -> None:
    base = load(base_dir(family))
    plain = logits(base.model)
    # PEFT joins gate and up into one adapter of twice the rank and alpha: not the same scaling with rsLoRA.
    targets = LEAVES[family][2:] if use_rslora else LEAVES[family]
    config = graft.LoraConfig(
        rank=4, alpha=8, target_modules=("q_proj", "v_proj", *targets), use_rslora=use_rslora
    )
    graft.attach(base.model, config)
    noisy(adapter_tensors(base.model).values())
    live = logits(base.model)
    graft.save_adapter(base.model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fused(base_dir(family)), tmp_path / "adapter").eval()
    close(logits(theirs), live)
    assert (live - plain).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("stacks", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])
def test_graft_reads_stacks_of_peft(
    base_dir: Callable[[str], Path], tmp_path: Path, family: str, stacks: list[str]
) -> None:
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{stack}" for stack in stacks],
        rank_pattern={".*gate_up_proj": 5} if "gate_up_proj" in stacks else {},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(fused(base_dir(family)), settings).eval()
    noisy(tensor for name, tensor in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path / "adapter")
    for quantization in (None, "nf4"):
        base = load(base_dir(family), quantization=quantization, dtype="float32")
        plain = logits(base.model)
        made = graft.load_adapter(base.model, tmp_path / "adapter")
        assert sum(".experts." in path for path in made.targets) == 2 * 12 * (
            2 * ("gate_up_proj" in stacks) + ("down_proj" in stacks)
        )
        assert (logits(base.model) - plain).abs().max() > 0.1
        if quantization is None:
            close(logits(base.model), logits(theirs))
    graft.save_adapter(base.model, tmp_path / "again")
    base = load(base_dir(family))
    graft.load_adapter(base.model, tmp_path / "again", force_base=True)
    close(logits(base.model), logits(theirs))


def test_what_peft_makes_of_single_experts_comes_back(
    base_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(base_dir("mixtral"))
    graft.attach(base.model, graft.LoraConfig(rank=4, alpha=8, target_modules=LEAVES["mixtral"]))
    noisy(adapter_tensors(base.model).values())
    live = logits(base.model)
    graft.save_adapter(base.model, tmp_path / "single")
    theirs = peft.PeftModel.from_pretrained(fused(base_dir("mixtral")), tmp_path / "single")
    theirs.save_pretrained(tmp_path / "stacked")
    assert any("base_layer" in key for key in load_file(tmp_path / "stacked" / "adapter_model.safetensors"))
    again = load(base_dir("mixtral"))
    graft.load_adapter(again.model, tmp_path / "stacked")
    close(logits(again.model), live)


def test_names_of_older_models_are_understood(base_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = load(base_dir("mixtral"))
    graft.attach(base.model, graft.LoraConfig(rank=4, alpha=8, target_modules=("q_proj", *LEAVES["mixtral"])))
    noisy(adapter_tensors(base.model).values())
    directory = graft.save_adapter(base.model, tmp_path / "adapter")
    file = directory / "adapter_model.safetensors"
    tensors = {key.replace(".mlp.", ".block_sparse_moe."): x for key, x in load_file(file).items()}
    assert any(".block_sparse_moe.experts.11.w1." in key for key in tensors)
    save_file(tensors, file, {"format": "pt"})
    (directory / "graft.json").unlink()
    theirs = peft.PeftModel.from_pretrained(fused(base_dir("mixtral")), directory).eval()
    again = load(base_dir("mixtral"))
    graft.load_adapter(again.model, directory)
    close(logits(again.model), logits(base.model))
    close(logits(theirs), logits(base.model))


def edited(directory: Path, **changes: Any) -> Path:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def test_stacks_that_cannot_be_read_are_refused(base_dir: Callable[[str], Path], tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    theirs = peft.get_peft_model(fused(base_dir("mixtral")), settings)
    theirs.save_pretrained(tmp_path / "adapter")
    base = load(base_dir("mixtral"))
    for change, told in (
        ({"peft_version": "0.18.1"}, "before 0.19"),
        ({"peft_version": None}, "before 0.19"),
        ({"target_parameters": ["gate.weight"], "peft_version": "0.21.2"}, "no stack of experts"),
        ({"target_parameters": 3}, "target_parameters"),
    ):
        with pytest.raises(AdapterError, match=told):
            graft.load_adapter(base.model, edited(tmp_path / "adapter", **change))
    edited(tmp_path / "adapter", target_parameters=["experts.down_proj"])
    with pytest.raises(AdapterError, match="the shape is"):
        graft.load_adapter(load(base_dir("qwen3_moe")).model, tmp_path / "adapter", force_base=True)


def test_adapters_of_experts_are_composed(base_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = load(base_dir("mixtral"))
    for name, rank in (("one", 2), ("two", 3)):
        config = graft.LoraConfig(rank=rank, target_modules=("q_proj", *LEAVES["mixtral"]))
        graft.attach(base.model, config, name, seed=rank)
        noisy(adapter_tensors(base.model, name).values())
        graft.save_adapter(base.model, tmp_path / name, name)
    graft.set_active(base.model, ["one", "two"], [0.7, -0.5])
    live = logits(base.model)
    config = graft.ComposeConfig(operation="cat", weights=(0.7, -0.5))
    graft.compose([tmp_path / "one", tmp_path / "two"], config, tmp_path / "mixed")
    theirs = peft.PeftModel.from_pretrained(fused(base_dir("mixtral")), tmp_path / "mixed").eval()
    close(logits(theirs), live)
    stacks = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    of_peft = peft.get_peft_model(fused(base_dir("mixtral")), stacks).eval()
    noisy(tensor for name, tensor in of_peft.named_parameters() if "lora_" in name)
    of_peft.save_pretrained(tmp_path / "stacks")
    resized = graft.ComposeConfig(operation="resize", energy=1.0)
    graft.compose(tmp_path / "stacks", resized, tmp_path / "single", base=base_dir("mixtral"))
    fresh = load(base_dir("mixtral"))
    graft.load_adapter(fresh.model, tmp_path / "single")
    close(logits(fresh.model), logits(of_peft))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("case", ["gated", "ranks", "rslora", "last"])
def test_experts_that_peft_could_not_join_are_written_as_stacks(
    base_dir: Callable[[str], Path], tmp_path: Path, family: str, case: str
) -> None:
    gate, up, down = LEAVES.get(family, LEAVES["qwen3_moe"])
    more: dict[str, Any] = {
        "gated": {"target_modules": (gate, up)},
        "ranks": {"target_modules": ("q_proj", gate, up, down), "rank_pattern": (rf".*\.{down}=2",)},
        "rslora": {"target_modules": (gate, up, down), "use_rslora": True},
        "last": {"target_modules": ("q_proj", gate, up, down), "layers": (1,), "alpha_pattern": (f"{up}=8",)},
    }[case]
    base = load(base_dir(family))
    graft.attach(base.model, graft.LoraConfig(rank=4, alpha=8, **more))
    noisy(adapter_tensors(base.model).values())
    directory = graft.save_adapter(base.model, tmp_path / "adapter")
    keys = load_file(directory / "adapter_model.safetensors").keys()
    assert any(".experts.base_layer.lora_A" in key or ".experts.lora_A" in key for key in keys)
    assert not any(".experts.0." in key for key in keys)
    theirs = peft.PeftModel.from_pretrained(fused(base_dir(family)), directory).eval()
    close(logits(theirs), logits(base.model))
    again = load(base_dir(family))
    made = graft.load_adapter(again.model, directory, trainable=True)
    assert torch.equal(logits(again.model), logits(base.model))
    first, second = adapter_tensors(base.model), adapter_tensors(again.model)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert {made.config.at(path).scaling for path in made.targets} == {
        graft.LoraConfig(rank=4, alpha=8, **more).at(path).scaling for path in made.targets
    }
    graft.save_adapter(again.model, tmp_path / "again")
    files = [side / "adapter_model.safetensors" for side in (directory, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
