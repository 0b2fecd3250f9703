"""Presets fill in what is left out; what is given stands; unusual settings are told and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.cli.main import run as command
from graft.config import build, from_dict, read_assignments, to_dict
from graft.errors import ConfigError
from graft.training.build import run_from_config
from graft.training.config import RunConfig
from graft.training.presets import PRESETS, preset_reasons, unusual


def made(*words: str) -> RunConfig:
    return build(RunConfig, read_assignments(words))


def value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_whole_and_usual(name: str) -> None:
    config = made(f"preset={name}")
    for choice in PRESETS[name]:
        assert value(config, choice.path) == choice.value, choice.path
        assert choice.reason
    assert config.adapter is not None
    assert config.adapter.target_modules == "all-linear"
    assert config.training.learning_rate is not None
    assert unusual(config, config.training.learning_rate) == {}
    reasons = preset_reasons(config)
    assert len(reasons) == len(PRESETS[name])
    assert from_dict(RunConfig, to_dict(config), "run.json") == config, "a resumed run reads the same"


def test_what_is_given_stands_wherever_it_is_given(tmp_path: Path) -> None:
    config = made("preset=instruction", "adapter.rank=4", "training.learning_rate=1e-3")
    assert config.adapter is not None
    assert (config.adapter.rank, config.adapter.alpha) == (4, 16.0)
    assert config.training.learning_rate == 1e-3
    told = preset_reasons(config)["preset instruction, adapter.rank"]
    assert told == "4: the preset has 64, other settings decide here"


def test_full_fine_tuning_takes_a_tenth() -> None:
    config = made("preset=generation", "adapter=")
    assert config.adapter is None
    assert config.training.learning_rate == pytest.approx(2e-5)
    assert not any("adapter" in name for name in preset_reasons(config))


def test_values_that_need_each_other() -> None:
    steps = made("preset=instruction", "training.warmup_steps=10")
    assert steps.training.warmup_ratio is None
    constant = made("preset=domain", "training.lr_scheduler=constant")
    assert constant.training.min_lr_ratio == 0.0
    preferring = made("preset=instruction", "training.loss=dpo")
    assert preferring.training.learning_rate is None, "dpo's own, not that of the preset"
    with pytest.raises(ConfigError, match="given with lion"):
        made("preset=instruction", "training.optimizer=lion")


def test_unknown_or_idle_presets_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'instructions'") as caught:
        made("preset=instructions")
    assert "'instruction'" in caught.value.fix
    with pytest.raises(ConfigError, match="preset = 3"):
        made("preset=3")
    with pytest.raises(ConfigError, match="fills nothing in"):
        RunConfig(preset="domain")
    with pytest.raises(ConfigError, match="unknown preset"):
        RunConfig(preset="x")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("adapter.rank=129", "adapter.alpha=129"), ["adapter.rank"]),
        (("adapter.rank=128", "adapter.alpha=128"), []),
        (('adapter.rank_pattern=["q_proj=256"]',), ["adapter.rank"]),
        (("adapter.rank=64", "adapter.alpha=8"), ["adapter.alpha"]),
        (("adapter.rank=2", "adapter.alpha=32"), ["adapter.alpha"]),
        (("adapter.rank=64", "adapter.alpha=16"), []),
        (("adapter.rank=64", "adapter.alpha=8", "adapter.use_rslora=true"), []),
        (("adapter.rank=8", "training.learning_rate=1e-2"), ["training.learning_rate"]),
        (("adapter.rank=8", "training.learning_rate=1e-6"), ["training.learning_rate"]),
        (("training.learning_rate=1e-3",), ["training.learning_rate"]),
        (("training.learning_rate=1e-5",), []),
        (("adapter.rank=8", "training.loss=dpo", "training.learning_rate=2e-4"), ["training.learning_rate"]),
        (("adapter.rank=8", "training.optimizer=sgd", "training.learning_rate=1"), []),
        (
            ("adapter.rank=8", "training.optimizer=lion", "training.learning_rate=1e-3"),
            ["training.learning_rate"],
        ),
    ],
)
def test_what_is_unusual(words: tuple[str, ...], names: list[str]) -> None:
    config = made(*words)
    rate = config.training.learning_rate or 2e-4 * (1 if config.adapter else 0.1)
    assert list(unusual(config, rate)) == [f"unusual {name}" for name in names]


def test_a_run_records_preset_and_warnings(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    words = ["preset=generation", f"model.name={tiny_dir('llama')}", f"data.train={rows}"]
    words += [f"output={tmp_path / 'run'}", "training.max_steps=2", "training.learning_rate=1e-2"]
    run = run_from_config(made(*words, "data.max_length=64"))
    record = json.loads((run.directory / "run.json").read_text())
    derived = record["derived"]
    assert derived["preset generation, adapter.alpha"].startswith("32.0: LoRA, GPT-2 on E2E")
    assert "2e-05" not in derived["unusual training.learning_rate"]
    assert record["config"]["preset"] == "generation"
    settings = json.loads((run.directory / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)


def test_on_the_command_line(
    tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"t {n}", "label": n % 2}) + "\n" for n in range(8)))
    words = ["train", "--preset", "classification", "--model", str(tiny_dir("llama")), "--data", str(data)]
    words += ["--out", str(tmp_path / "run"), "--set", "training.max_steps=2", "--json"]
    assert command(words) == 0
    shown = capsys.readouterr()
    assert "preset classification, adapter.rank: 8: LoRA, RoBERTa on GLUE" in shown.err
    adapter = json.loads(shown.out)["adapter"]
    words = ["evaluate", "--adapter", adapter, "--data", str(data), "--json"]
    assert command([*words, "--set", "data.max_length=64"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"loss", "accuracy", "macro_f1"}
