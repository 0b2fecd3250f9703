"""PEFT loads our adapters and we load PEFT's, with the same logits, on every family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft.models.load as models
from graft.adapters.attach import adapter_tensors, adapters_of, attach, disabled
from graft.adapters.inspection import inspect_adapter
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import load_adapter, save_adapter

pytestmark = [
    # PEFT warns when it corrects fan_in_fan_out, saves embeddings that are targeted, or meets tied weights.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 1e-5
"""fp32 logits of order one; the two sides sum in another order."""

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))

EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}

NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


def plain(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(tensors: Any, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def ours_to_peft(directory: Path, config: LoraConfig, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from peft import PeftModel

    base = models.load(directory)
    attach(base.model, config)
    shake(adapter_tensors(base.model).values())
    save_adapter(base.model, out)
    theirs = PeftModel.from_pretrained(plain(directory), out).eval()
    live, other = logits(base.model), logits(theirs)
    with disabled(base.model):
        assert (logits(base.model) - live).abs().max() > 1e-2, "the adapter has no effect"
    return live, other


def peft_to_ours(directory: Path, out: Path, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    theirs = get_peft_model(plain(directory), PeftConfig(task_type="CAUSAL_LM", **settings)).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(out)
    base = models.load(directory)
    before = logits(base.model)
    adapter = load_adapter(base.model, out)
    expected, live = logits(theirs), logits(base.model)
    assert (before - live).abs().max() > 1e-2, "the adapter has no effect"
    return expected, live, adapter


RANKS = {"gpt2": (r"attn?\.c_.*=3",), "gpt_neox": ("query_key_value=1",)}
"""Patterns that name layers of the family."""

OUR_CONFIGS: dict[str, Callable[[str], LoraConfig]] = {
    "all-linear": lambda family: LoraConfig(rank=4, alpha=8),
    "rslora-gaussian": lambda family: LoraConfig(rank=4, alpha=3.5, use_rslora=True, init="gaussian"),
    "embedding-and-head": lambda family: LoraConfig(
        rank=3, target_modules=(EMBEDDING.get(family, "embed_tokens"), "lm_head")
    ),
    "saved-modules": lambda family: LoraConfig(rank=2, modules_to_save=("lm_head", NORM.get(family, "norm"))),
    "patterns-and-blocks": lambda family: LoraConfig(
        rank=4,
        alpha=8,
        target_modules=r".*\.(q_proj|down_proj|qkv_proj|c_attn|c_proj|query_key_value|dense_h_to_4h)",
        layers=(1,),
        rank_pattern=RANKS.get(family, ("down_proj=2",)),
        alpha_pattern=("dense_h_to_4h=7",) if family == "gpt_neox" else (r".*proj=5.5",),
    ),
}


@pytest.mark.parametrize("case", OUR_CONFIGS)
def test_peft_loads_ours(tiny_dir: Callable[..., Path], tiny_family: str, case: str, tmp_path: Path) -> None:
    ours, theirs = ours_to_peft(tiny_dir(tiny_family), OUR_CONFIGS[case](tiny_family), tmp_path / "a")
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


PEFT_CONFIGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "all-linear": lambda family: {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": lambda family: {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "embedding-and-head": lambda family: {
        "r": 3,
        "target_modules": [EMBEDDING.get(family, "embed_tokens"), "lm_head"],
    },
    "saved-modules": lambda family: {
        "target_modules": "all-linear",
        "modules_to_save": [NORM.get(family, "norm"), EMBEDDING.get(family, "embed_tokens")],
    },
    "patterns-and-blocks": lambda family: {
        "r": 4,
        "target_modules": ["q_proj", "down_proj", "qkv_proj", "c_attn", "c_proj", "query_key_value"],
        "exclude_modules": ["1.mlp.down_proj", "mlp.c_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "h" if family == "gpt2" else "layers",
        "rank_pattern": {"down_proj": 2, r"self_attn\.q.*": 3, "attn.c_attn": 1},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 11, "c_proj": 5},
    },
    "expression": lambda family: {"target_modules": r".*\.1\..*(attn|attention)\.[a-z_]*(proj|c_attn|dense)"},
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_we_load_peft(tiny_dir: Callable[..., Path], tiny_family: str, case: str, tmp_path: Path) -> None:
    settings = PEFT_CONFIGS[case](tiny_family)
    expected, live, adapter = peft_to_ours(tiny_dir(tiny_family), tmp_path / "a", **settings)
    torch.testing.assert_close(live, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert any("graft.json" in note for note in adapter.notes)
    assert not any("names the base" in note for note in adapter.notes)


def test_peft_file_written_again_stays_the_same(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_dir("qwen2")
    peft_to_ours(directory, tmp_path / "theirs", r=4, target_modules="all-linear", modules_to_save=["norm"])
    base = models.load(directory)
    load_adapter(base.model, tmp_path / "theirs")
    save_adapter(base.model, tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_one_training_step_gives_the_gradients_of_peft(
    tiny_dir: Callable[..., Path], tiny_family: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = models.load(tiny_dir(tiny_family))
    embedding = EMBEDDING.get(tiny_family, "embed_tokens")
    config = LoraConfig(
        rank=4, target_modules=rf".*\.(layers|h)\..*(proj|c_.*|dense.*|query.*)|.*{embedding}|lm_head"
    )
    attach(base.model, config)
    shake(adapter_tensors(base.model).values())
    save_adapter(base.model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(plain(tiny_dir(tiny_family)), tmp_path / "a", is_trainable=True)
    for model in (base.model, theirs.eval()):
        model(IDS, labels=IDS).loss.backward()
    other = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.grad is not None}
    mine = adapter_tensors(base.model)
    assert {f"base_model.model.{key}" for key in mine} == set(other)
    for key, tensor in mine.items():
        grad = other[f"base_model.model.{key}"].grad
        torch.testing.assert_close(tensor.grad, grad, atol=1e-6, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_lora_over_nf4_adds_the_same_update_as_over_dense(
    tiny_dir: Callable[..., Path], tiny_family: str, tmp_path: Path
) -> None:
    """The update of every layer must be independent of what stores the base weight."""
    directory = tiny_dir(tiny_family)
    base = models.load(directory, quantization="nf4", dtype="float32")
    attach(base.model, LoraConfig(rank=4))
    shake(adapter_tensors(base.model).values())
    save_adapter(base.model, tmp_path / "a")
    from peft import PeftModel

    dense = plain(directory)
    for path in adapters_of(base.model)["default"].targets:
        layer = base.model.get_submodule(path)
        weight = layer.base.dense_weight()
        module = dense.get_submodule(path)
        with torch.no_grad():
            module.weight.copy_(
                weight if module.weight.shape == weight.shape and tiny_family != "gpt2" else weight.t()
            )
    theirs = PeftModel.from_pretrained(dense, tmp_path / "a").eval()
    torch.testing.assert_close(logits(base.model), logits(theirs), atol=TOLERANCE, rtol=TOLERANCE)


def test_another_name_of_the_base_is_noted(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    peft_to_ours(tiny_dir("llama"), tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/other"}))
    notes = load_adapter(models.load(tiny_dir("llama")).model, tmp_path / "a").notes
    assert any("names the base 'org/other'" in note for note in notes)


def test_settings_that_peft_reads(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftConfig

    base = models.load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=6, alpha=9, dropout=0.25))
    save_adapter(base.model, tmp_path / "a")
    read = PeftConfig.from_pretrained(tmp_path / "a")
    assert (read.r, read.lora_alpha, read.lora_dropout, read.task_type) == (6, 9, 0.25, "CAUSAL_LM")
    assert read.rank_pattern == {}
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_deep_copy_of_an_attached_model_is_independent(tiny_dir: Callable[..., Path]) -> None:
    base = models.load(tiny_dir("gpt2"))
    attach(base.model, LoraConfig(rank=2, modules_to_save=("ln_f",)))
    before = logits(base.model)
    twin = copy.deepcopy(base.model)
    shake(adapter_tensors(base.model).values())
    assert torch.equal(logits(twin), before)
    shake(adapter_tensors(twin).values())
    torch.testing.assert_close(logits(twin), logits(base.model), atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_inspection_of_pefts_files_tells_pefts_own_updates(
    tiny_dir: Callable[..., Path], tmp_path: Path, family: str, use_rslora: bool
) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    settings = PeftConfig(r=4, lora_alpha=12, target_modules="all-linear", use_rslora=use_rslora)
    theirs = get_peft_model(plain(tiny_dir(family)), settings)
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "peft")
    found = inspect_adapter(tmp_path / "peft", base=tiny_dir(family), directions=0)
    assert len(found.layers) == len(adapted_by_peft(theirs))
    for layer in found.layers:
        module = theirs.base_model.model.get_submodule(layer.path)
        delta = module.get_delta_weight("default").double()
        ratio = float(delta.norm() / module.base_layer.weight.double().norm())
        values = torch.linalg.svdvals(delta)[:4].tolist()
        assert layer.values == pytest.approx(values, rel=1e-4)
        assert layer.update_ratio == pytest.approx(ratio, rel=1e-5)


def adapted_by_peft(model: Any) -> list[str]:
    """Paths of the layers to which PEFT gave an adapter."""
    return [path for path, module in model.named_modules() if hasattr(module, "get_delta_weight")]
