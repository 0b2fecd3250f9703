"""`graft compose`: flags, answers, losses, exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.adapters.attach import attach
from graft.adapters.attached import trained_tensors
from graft.adapters.compose import compose
from graft.adapters.composition import ComposeConfig
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import save_adapter
from graft.cli.main import run
from graft.models.load import load


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run(["compose", *words, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    told: dict[str, Any] = json.loads(out)
    assert told["ok"] is (code == 0)
    return code, told


@pytest.fixture(scope="module")
def pair(tiny_dir, tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("pair")
    found = []
    for name, rank in (("one", 2), ("two", 3)):
        base = load(tiny_dir("llama"))
        attach(base.model, LoraConfig(rank=rank, target_modules=("q_proj", "v_proj")), seed=rank)
        with torch.no_grad():
            for number, tensor in enumerate(trained_tensors(base.model).values()):
                drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(rank + number))
                tensor.add_(0.1 * drawn)
        save_adapter(base.model, out / name / "adapter")
        found.append(str(out / name))
    return found


FLAGS: dict[tuple[str, ...], ComposeConfig] = {
    ("cat", "--weights", "0.7,-0.3"): ComposeConfig(operation="cat", weights=(0.7, -0.3)),
    ("svd", "--rank", "2", "--rank-pattern", "v_proj=1"): ComposeConfig(
        operation="svd", rank=2, rank_pattern=("v_proj=1",)
    ),
    ("ties", "-w", "1,2", "--density", "0.4", "--energy", "0.9", "--majority", "frequency"): ComposeConfig(
        operation="ties", weights=(1, 2), density=0.4, energy=0.9, majority="frequency"
    ),
    ("dare-ties", "--density", "0.4", "--rank", "2", "--seed", "5"): ComposeConfig(
        operation="dare_ties", density=0.4, rank=2, seed=5
    ),
}


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_every_flag_acts(pair, tmp_path, capsys, flags):
    out = tmp_path / "out"
    code, told = answer(capsys, flags[0], *pair, "--out", str(out), *flags[1:])  # runs stand for adapters
    assert code == 0
    adapters = [Path(run_directory) / "adapter" for run_directory in pair]
    report = compose(adapters, FLAGS[flags], tmp_path / "same")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "same"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert told["adapter"] == str(out)
    assert told["error"] == report.error
    assert [layer["rank"] for layer in told["layers"]] == [layer.rank for layer in report.layers]
    assert [parent["name"] for parent in told["parents"]] == ["one/adapter", "two/adapter"]
    assert told["num_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert "metrics" not in told


def test_losses_are_those_that_evaluate_finds(pair, rows, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--data", str(rows), "--set", "data.limit=20", "--batch-size", "4")
    code, told = answer(capsys, "svd", *pair, "--rank", "1", "--out", str(out), *words)
    assert code == 0
    found = []
    for adapter in (*pair, str(out)):
        evaluate = ["evaluate", "--adapter", adapter, "--metrics", "loss", "--json"]
        assert run([*evaluate, "--data", str(rows), "--set", "data.limit=20"]) == 0
        found.append(json.loads(capsys.readouterr().out)["metrics"]["loss"])
    metrics = told["metrics"]
    assert [*metrics["loss_before"], metrics["loss_after"]] == pytest.approx(found, abs=1e-5)
    assert len(set(found)) == 3
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (
        run(["evaluate", base, "--metrics", "loss", "--data", str(rows), "--set", "data.limit=20", "--json"])
        == 0
    )
    plain = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert metrics["base_loss"] == pytest.approx(plain, abs=1e-5)


def test_the_summary_for_people(pair, rows, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compose", "resize", pair[1], "--energy", "0.7", "-o", str(out), "--data", str(rows)]
    assert run(words) == 0
    shown = capsys.readouterr()
    _, told = answer(capsys, "resize", pair[1], "--energy", "0.7", "-o", str(tmp_path / "b"), "-d", str(rows))
    worst = told["layers"][0]
    line = next(line for line in shown.out.splitlines() if line.startswith(worst["path"]))
    assert line.split()[1:] == ["3", str(worst["rank"]), f"{worst['error']:.4f}"]
    before = next(line for line in shown.out.splitlines() if line.startswith(pair[1]))
    assert before.split()[1:] == [f"{told['bytes_before']:,}", f"{told['metrics']['loss_before'][0]:.4f}"]
    after = next(line for line in shown.out.splitlines() if line.startswith(f"{out} "))
    assert after.split()[1:] == [f"{told['num_bytes']:,}", f"{told['metrics']['loss_after']:.4f}"]
    assert f"{1 - told['error'] ** 2:.2%} of the squared norm kept" in shown.out
    assert shown.err == ""  # a bar is for terminals


def test_of_many_layers_the_worst_are_listed(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("graft.cli.compose.MAX_LAYERS", 1)
    assert run(["compose", "svd", *pair, "--rank", "2", "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "the worst 1 of 4 layers" in out
    assert out.count("model.layers.") == 1


def test_mistakes(pair, rows, tmp_path, capsys):
    out = tmp_path / "out"
    cases = [
        (("tie", *pair), "ConfigError", "compose.operation", "did you mean 'ties'?"),
        (("linear", *pair), "ConfigError", "compose.operation", "cat here"),
        (("cat", *pair, "--weights", "0.5;0.5"), "ConfigError", "--weights", "0.7,0.3"),
        (("cat", *pair, "--weights", "0.5"), "ConfigError", "compose.weights", "one for each"),
        (("resize", *pair, "--rank", "2"), "ConfigError", "adapters", "cat, svd"),
        (("resize", pair[0]), "ConfigError", "compose.rank", "--energy"),
        (("cat", *pair, "--batch-size", "4"), "ConfigError", "--batch-size", "--data"),
        (("cat", *pair, "--set", "data.limit=2"), "ConfigError", "--set", "--data"),
        (
            ("cat", *pair, "--data", str(rows), "--set", "data.packing=true"),
            "ConfigError",
            "--set data.packing",
            "",
        ),
        (("cat", pair[0], str(tmp_path / "nowhere")), "AdapterError", "nowhere", "restore"),
        (("cat", *pair, "--data", str(tmp_path / "none.jsonl")), "StorageError", "none.jsonl", ""),
        (("cat", *pair, "--base", str(tmp_path / "none")), "ModelError", "", ""),
        (("cat",), "ConfigError", "command line", "compose --help"),
    ]
    for words, kind, where, fix in cases:
        code, told = answer(capsys, *words, "--out", str(out))
        error = told["error"]
        assert (code, error["type"]) == (2, kind), (words, error)
        assert where in error["where"], (words, error)
        assert fix in error["fix"], (words, error)
    assert not out.exists()
    code, told = answer(capsys, "cat", *pair, "--data", str(rows), "--out", str(tmp_path))
    assert (code, told["error"]["type"]) == (2, "StorageError")
    assert told["error"]["where"] == str(tmp_path)


def test_other_bases_need_force(pair, tiny_dir, rows, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_dir("llama"), other)
    base = load(other)
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1
    base.model.save_pretrained(other)
    base = load(other)
    attach(base.model, LoraConfig(rank=2))
    with torch.no_grad():
        for tensor in trained_tensors(base.model).values():
            tensor.add_(0.1)
    save_adapter(base.model, tmp_path / "a")
    words = ("cat", pair[0], str(tmp_path / "a"), "--out", str(tmp_path / "out"))
    code, told = answer(capsys, *words)
    assert (code, told["error"]["type"]) == (2, "FingerprintError")
    code, told = answer(capsys, *words, "--force-base", "--data", str(rows))
    assert code == 0
    assert told["forced_base"] is True
    assert len(told["metrics"]["loss_before"]) == 2


class _Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_a_bar_on_a_terminal(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", _Terminal(sys.stderr))
    assert run(["compose", "cat", *pair, "-o", str(tmp_path / "out")]) == 0
    assert "composing layer" in capsys.readouterr().err
