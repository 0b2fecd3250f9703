"""Bases quantized together with an adapter, in several rounds: better than one, and belonging together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft.models.load as models
from graft.adapters.attach import adapters_of, attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.loftq import loftq
from graft.adapters.lora import LoraConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter
from graft.cli.main import run
from graft.errors import ConfigError, FingerprintError, StorageError, TargetError
from graft.models.quantize import quantize

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
NAMES = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


def settings(family: str = "llama", **more: Any) -> LoraConfig:
    how = {"rank": 8, "alpha": 4, "target_modules": NAMES[family], "init": "loftq", "init_iterations": 4}
    return LoraConfig(**{**how, **more})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def gap(model: Any, path: str, original: Tensor) -> float:
    module = model.get_submodule(path)
    weight = module.adapters["default"].merged_weight(module.base, module.base.dense_weight())
    return float((weight - original).norm() / original.norm())


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("quant_type", ["nf4", "int3"])
def test_rounds_bring_base_and_adapter_nearer_to_the_dense_weights(
    tiny_dir: Callable[..., Path], family: str, quant_type: str, tmp_path: Path
) -> None:
    config = settings(family)
    report, errors = loftq(tiny_dir(family), quant_type, config, tmp_path / "q")
    assert report.directory == tmp_path / "q"
    base = models.load(tmp_path / "q", dtype="float32")
    adapter = attach(base.model, config)
    assert set(adapter.targets) == errors.keys()
    dense = models.load(tiny_dir(family)).model
    for path in adapter.targets:
        original = dense.get_submodule(path).weight.detach()
        original = original if family == "llama" else original.T
        assert len(errors[path]) == 4
        assert gap(base.model, path, original) == pytest.approx(min(errors[path]), rel=1e-4)
        assert min(errors[path]) < 0.97 * errors[path][0]
    other = models.load(tmp_path / "q", dtype="float32").model
    load_adapter(other, tmp_path / "q" / "loftq_init", trainable=True)
    assert torch.equal(logits(other), logits(base.model))
    for key, tensor in adapter_tensors(other).items():
        assert torch.equal(tensor, adapter_tensors(base.model)[key])
    raw = json.loads((tmp_path / "q" / "loftq_init" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(tmp_path / "q")


def test_base_and_adapter_belong_together(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    loftq(tiny_dir("llama"), "nf4", settings(), tmp_path / "q")
    quantize(tiny_dir("llama"), "nf4", tmp_path / "plain")
    for wrong in (models.load(tmp_path / "plain"), models.load(tiny_dir("llama"), quantization="nf4")):
        with pytest.raises(FingerprintError):
            load_adapter(wrong.model, tmp_path / "q" / "loftq_init")
    report = merge(tmp_path / "q" / "loftq_init", tmp_path / "merged", dtype="float32")
    assert report.folded_into == "dequantized"
    assert report.logit_gap < 1e-4
    assert any("rounding is made up for" in note for note in report.notes)
    for wrong_config, message in (
        (settings(rank=4), "made with rank 8 and scaling 0.5 for .*asked for are rank 4"),
        (settings(alpha=8), "asked for are rank 8 and scaling 1"),
        (settings(target_modules="all-linear"), "made with no adapter for"),
        (settings(init_iterations=2), "made in 4 rounds, asked for are 2"),
    ):
        model = models.load(tmp_path / "q").model
        with pytest.raises(ConfigError, match=message):
            attach(model, wrong_config)
        assert adapters_of(model) == {}


def test_several_rounds_are_refused_on_a_base_that_is_loaded(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama"), quantization="nf4").model
    with pytest.raises(ConfigError, match="after the first round the base is another one") as refused:
        attach(model, settings())
    assert "graft quantize --set adapter.init=loftq" in refused.value.fix


def test_nothing_is_left_of_what_is_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init is 'pissa'"):
        loftq(tiny_dir("llama"), "nf4", settings(init="pissa"), tmp_path / "q")
    with pytest.raises(TargetError, match="matched no layer"):
        loftq(tiny_dir("llama"), "nf4", settings(target_modules=("w_proj",)), tmp_path / "q")
    assert not list(tmp_path.iterdir())
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(StorageError):
            loftq(tiny_dir("llama"), "nf4", settings(), tmp_path / "q", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["mine.txt"]


def test_the_command_makes_the_base_that_its_next_command_trains_on(
    tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "q", tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i}: one and {i} more"}) + "\n" for i in range(6)))
    words = ["--set", "adapter.init=loftq", "--set", "adapter.rank=4", "--set", "adapter.init_iterations=3"]
    assert run(["quantize", str(tiny_dir("llama")), "--out", str(out), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {len(errors) for errors in told["loftq_errors"].values()} == {3}
    command = told["next"][0].replace("train.jsonl", str(rows)).split()[1:]
    assert run([*command, "--out", str(tmp_path / "run"), "--set", "training.max_steps=2", "--json"]) == 0
    capsys.readouterr()
    base = models.load(out)
    assert load_adapter(base.model, tmp_path / "run" / "adapter").makes_up
    assert run(["quantize", str(tiny_dir("llama")), "--out", str(out), *words, "--overwrite"]) == 0
    assert "of the weights is lost" in capsys.readouterr().out
    for wrong in (["--set", "adapter.rank=4"], [*words, "--set", "model.name=x"]):
        assert run(["quantize", str(tiny_dir("llama")), "--out", str(tmp_path / "no"), *wrong]) == 2
        assert "has no part here" in capsys.readouterr().err
