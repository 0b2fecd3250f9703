"""The audit of a run: no false alarm on runs that learn, the same bits as without it, what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.adapters.attach import attach
from graft.adapters.attached import active_adapters, adapter_tensors, adapters_of
from graft.adapters.effect import idle_layers
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.config import build, read_assignments
from graft.errors import AdapterError
from graft.models.load import load
from graft.training.base_watch import BaseWatch, sampled
from graft.training.build import resume, run_from_config, train
from graft.training.config import RunConfig
from graft.training.monitors import Silent


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def config(base: Path, rows: Path, out: Path, *more: str) -> RunConfig:
    words = [f"model.name={base}", f"data.train={rows}", f"output={out}", "data.max_length=64"]
    words += ["training.batch_size=2", "training.max_steps=4"]
    words += [*([] if "adapter=" in more else ["adapter.rank=4"]), *more]
    return build(RunConfig, read_assignments(words))


def audited(directory: Path) -> Any:
    return json.loads((directory / "audit.json").read_text())


def test_every_family_passes(
    tiny_dir: Callable[..., Path], tiny_family: str, rows: Path, tmp_path: Path
) -> None:
    for method in (), ("quantization=nf4",), ("adapter=",):
        out = tmp_path / "-".join(("run", *method)).replace("=", "")
        run = run_from_config(config(tiny_dir(tiny_family), rows, out, *method))
        found = audited(run.directory)
        assert found["passed"]
        assert found["moved"] == found["trained_tensors"]
        assert found["output_change"] > 0
        assert found["notes"] == []


MIXTURE = {"num_local_experts": 12, "num_experts_per_tok": 1, "intermediate_size": 16}
CLEAN: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("llama", {}, ("quantization=int8", "model.dtype=bfloat16")),
    ("llama", {}, ("quantization=nf4", "model.dtype=bfloat16", "training.learning_rate=1e-7")),
    ("llama", {}, ("model.dtype=bfloat16", "adapter.use_rslora=true", "adapter.rank=64")),
    ("llama", {}, ("model.dtype=bfloat16", "adapter.modules_to_save=[lm_head]")),
    ("llama", {}, ("adapter.modules_to_save=[embed_tokens,norm]", "training.learning_rate=1e-6")),
    ("qwen2", {}, ("adapter.modules_to_save=[lm_head]",)),
    ("llama", {}, ("adapter.target_modules=[embed_tokens,q_proj]",)),
    ("gemma2", {}, ("adapter.target_modules=[embed_tokens]", "adapter.init=gaussian")),
    ("gpt2", {}, ("adapter.target_modules=[wte,c_attn]",)),
    ("llama", {}, ("adapter.target_modules=.*v_proj", "adapter.layers=[1]", "adapter.dropout=0.5")),
    ("llama", {}, ("adapter.rank_pattern=[q_proj=2]", "adapter.alpha_pattern=[v_proj=64]")),
    ("llama", {}, ("training.gradient_checkpointing=true", "adapter.dropout=0.1")),
    ("llama", {}, ("training.gradient_checkpointing=true", "adapter=")),
    ("llama", {}, ("training.gradient_accumulation_steps=3", "data.packing=false")),
    ("llama", {}, ("training.warmup_steps=1000", "training.max_steps=2", "adapter=")),
    ("llama", {}, ("training.warmup_steps=1000", "training.max_steps=2", "model.dtype=bfloat16")),
    ("llama", {}, ("training.max_steps=1",)),
    ("llama", {}, ("training.max_steps=1", "adapter=")),
    ("llama", {}, ("model.dtype=bfloat16", "adapter=")),
    ("llama", {}, ("training.weight_decay=0.1", "training.lr_scheduler=constant", "adapter=")),
    ("llama", {"tie_word_embeddings": True}, ("adapter=",)),
    ("llama", {"attention_bias": True}, ("adapter=",)),
    ("mixtral", MIXTURE, ("data.packing=false", "training.batch_size=1")),
    ("mixtral", MIXTURE, ("quantization=nf4", "training.batch_size=1")),
    ("mixtral", MIXTURE, ("adapter=", "training.batch_size=1")),
    ("llama", {}, ("training.audit=full",)),
    ("llama", {}, ("training.audit=full", "quantization=nf4")),
]


@pytest.mark.parametrize(("family", "sizes", "more"), CLEAN, ids=[f"{c[0]}-{'-'.join(c[2])}" for c in CLEAN])
def test_no_false_alarm(
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    family: str,
    sizes: dict[str, Any],
    more: tuple[str, ...],
) -> None:
    run = run_from_config(config(tiny_dir(family, **sizes), rows, tmp_path / "run", *more))
    found = audited(run.directory)
    assert found["passed"]
    assert found["defects"] == []
    assert found["moved"] > 0


def test_experts_without_a_token_are_noted(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    told = Told()
    more = ("training.batch_size=1", "data.packing=false")
    run = run_from_config(config(tiny_dir("mixtral", **MIXTURE), rows, tmp_path / "run", *more), told)
    found = audited(run.directory)
    assert found["moved"] < found["trained_tensors"]
    assert "experts or routers" in found["notes"][0]
    assert any(found["notes"][0] in line for line in told.lines)


def test_an_audited_run_has_the_same_bits(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    results = []
    for mode in ("none", "sampled", "full"):
        more = ("adapter.dropout=0.2", "model.dtype=bfloat16", f"training.audit={mode}")
        run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / mode, *more))
        weights = (run.directory / "adapter" / "adapter_model.safetensors").read_bytes()
        results.append((weights, (run.directory / "metrics.jsonl").read_bytes()))
        assert (run.directory / "audit.json").exists() == (mode != "none")
    assert results[0] == results[1] == results[2]


def test_a_resumed_run_is_audited_again(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    more = ("training.save_steps=2", "training.max_steps=6")
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", *more))
    weights = (run.directory / "adapter" / "adapter_model.safetensors").read_bytes()
    record = json.loads((run.directory / "run.json").read_text())
    (run.directory / "run.json").write_text(json.dumps({**record, "status": "running"}))
    for path in sorted((run.directory / "checkpoints").iterdir())[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    told = Told()
    again = resume(run.directory, told)
    assert audited(again.directory)["steps"] == [5, 6]
    line = "audit: 28 of 28 tensors move, base unchanged, output changes by"
    assert any(text.startswith(line) for text in told.lines)
    assert (again.directory / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_training_a_loaded_adapter_further_passes(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    first = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "first"))
    assert first.adapter is not None
    base = load(tiny_dir("llama"))
    load_adapter(base.model, first.adapter, trainable=True)
    second = train(base, data=rows, output=tmp_path / "second", max_steps=3, batch_size=2)
    assert audited(second.directory)["moved"] == 28


def test_what_is_measured(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", "training.learning_rate=1e-3"))
    found = audited(run.directory)
    stored = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in found["tensors"]} == set(stored)
    for name, measured in found["tensors"].items():
        assert measured["gradient"] > 0, name
        assert 0 < measured["change"] <= 1.01e-3, name  # AdamW's steps are as long as its learning rate
    base = load(tiny_dir("llama")).model
    assert found["base_tensors"] == len(base.state_dict())
    assert found["base_bytes"] == sum(p.numel() * 4 for p in base.state_dict().values())
    assert found["end"]["base"] == "unchanged"


def test_changes_of_any_tensor_are_seen() -> None:
    kinds = {
        "codes": torch.arange(256, dtype=torch.uint8).repeat(100).view(160, 160),
        "halves": torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "turned": torch.randn(300, 70, generator=torch.Generator().manual_seed(1)).t(),
        "small": torch.ones(3),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 4),
    }
    for name, tensor in kinds.items():
        watch = BaseWatch(kinds.items(), full=True)
        assert watch.changed(kinds.items(), full=True) == []
        if tensor.numel():
            tensor.add_(1)
            assert watch.changed(kinds.items()) == [name]
    assert watch.num_sampled_bytes == sum(len(sampled(tensor)) for tensor in kinds.values())
    assert watch.changed([*kinds.items()][1:]) == ["codes"]


def test_a_full_digest_sees_one_number() -> None:
    tensor = torch.zeros(1000, 1000)
    watch = BaseWatch([("weight", tensor)], full=True)
    tensor[501, 503] = 1
    assert watch.changed([("weight", tensor)]) == []
    assert watch.changed([("weight", tensor)], full=True) == ["weight"]


def test_an_adapter_without_effect_is_refused_for_use(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=2, modules_to_save=("lm_head",)))
    places = [*adapters_of(base.model)["default"].targets, "lm_head"]
    assert sorted(idle_layers(base.model, "default")) == sorted(places)
    save_adapter(base.model, tmp_path / "idle")
    path = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        adapter_tensors(base.model)[f"{path}.lora_B.weight"][3, 1] = 0.5
    assert sorted(idle_layers(base.model, "default")) == sorted(set(places) - {path})
    save_adapter(base.model, tmp_path / "acting")
    user = load(tiny_dir("llama")).model
    acting = load_adapter(user, tmp_path / "acting")
    assert any(f"{len(places) - 1} of its {len(places)} layers change nothing" in n for n in acting.notes)
    names = [name for name, _ in user.named_modules()]
    with pytest.raises(AdapterError, match=f"none of its {len(places)} layers changes any output"):
        load_adapter(user, tmp_path / "idle", "other")
    assert [name for name, _ in user.named_modules()] == names
    assert active_adapters(user) == (acting.name,)
    further = load_adapter(load(tiny_dir("llama")).model, tmp_path / "idle", trainable=True)
    assert not any("change nothing" in note for note in further.notes)
