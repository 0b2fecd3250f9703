"""`graft quantize`: flags, answers, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from graft.adapters.attached import num_base_parameters
from graft.cli.main import run
from graft.models.load import load
from graft.quant import QuantizationConfig


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run(["quantize", *words, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    told: dict[str, Any] = json.loads(out)
    assert told["ok"] is (code == 0)
    return code, told


FLAGS = {
    (): QuantizationConfig(),
    ("--quant-type", "fp4", "--no-double-quant"): QuantizationConfig(quant_type="fp4", double_quant=False),
    ("--quant-type", "int4", "--hqq", "--blocksize", "128"): QuantizationConfig(
        quant_type="int4", hqq=True, blocksize=128
    ),
    ("--skip-module", "o_proj", "--skip-module", "down_proj"): QuantizationConfig(
        skip_modules=("o_proj", "down_proj")
    ),
}


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_every_flag_acts(tiny_dir, tmp_path, capsys, flags):
    out = tmp_path / "out"
    code, told = answer(capsys, str(tiny_dir("llama")), "--out", str(out), *flags)
    assert code == 0
    assert load(out).quantization == FLAGS[flags]
    assert told["model"] == str(out)
    assert told["num_bytes"] == told["quantized_bytes"] + told["dense_bytes"] < told["source_bytes"]
    assert told["source_weights"] == load(out).fingerprint.weights
    assert told["next"][0] == f"graft train --model {out} --data train.jsonl"


def test_the_summary_for_people(tiny_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["quantize", str(tiny_dir("llama")), "-o", str(out), "--quant-type", "nf3"]) == 0
    shown = capsys.readouterr()
    config = QuantizationConfig(quant_type="nf3")
    layers = 2 * (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 64)
    for words in (str(out), "before", "after", "14 quantized layers", "import graft", f"graft chat {out}"):
        assert words in shown.out
    numbers = num_base_parameters(load(tiny_dir("llama")).model)
    assert f"a base of {numbers:,} parameters" in shown.out
    # Every layer has an offset and a last block of scales of its own, so small layers take a little more.
    assert config.bits_per_weight(layers) < float(shown.out.split("quantized layers")[1].split()[1]) < 4
    assert "quantizing" not in shown.err  # a bar is for terminals


def test_a_layer_that_the_peer_would_misread_is_told(tiny_dir, tmp_path, capsys):
    assert run(["quantize", str(tiny_dir("llama")), "-o", str(tmp_path / "out")]) == 0
    assert "note: rows of model.layers.0" in capsys.readouterr().out
    _, told = answer(capsys, str(tiny_dir("llama")), "--out", str(tmp_path / "fits"), "--blocksize", "32")
    assert told["notes"] == []


def test_mistakes(tiny_dir, tmp_path, capsys):
    out, model = tmp_path / "out", str(tiny_dir("llama"))
    code, told = answer(capsys, model, "--out", str(out), "--quant-type", "nf5")
    assert (code, told["error"]["type"]) == (2, "ConfigError")
    assert "nf4" in told["error"]["fix"]
    code, told = answer(capsys, model, "--out", str(out), "--hqq")
    assert (code, told["error"]["where"]) == (2, "quantization.hqq")
    code, told = answer(capsys, model, "--out", str(out), "--blocksize", "63")
    assert (code, told["error"]["where"]) == (2, "quantization.blocksize")
    code, told = answer(capsys, model, "--out", str(out), "--skip-module", "o_prj")
    assert (code, told["error"]["type"]) == (2, "ModelError")
    assert "o_proj" in told["error"]["fix"]
    assert not out.exists()
    assert answer(capsys, model, "--out", str(out))[0] == 0
    code, told = answer(capsys, model, "--out", str(out))
    assert (code, told["error"]["type"]) == (2, "StorageError")
    assert "--overwrite" in told["error"]["fix"]
    assert answer(capsys, model, "--out", str(out), "--overwrite")[0] == 0
    code, told = answer(capsys, str(out), "--out", str(tmp_path / "twice"))
    assert (code, told["error"]["type"]) == (2, "ModelError")


class _Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_a_bar_on_a_terminal(tiny_dir, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", _Terminal(sys.stderr))
    assert run(["quantize", str(tiny_dir("llama")), "-o", str(tmp_path / "out")]) == 0
    assert "quantizing" in capsys.readouterr().err


def test_dense_weights_of_it_cannot_be_asked_for(tiny_dir, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert answer(capsys, str(tiny_dir("llama")), "--out", out, "--quant-type", "int8")[0] == 0
    words = ["generate", out, "--prompt", "a", "--max-new-tokens", "1", "--json"]
    assert run(words) == 0
    capsys.readouterr()
    assert run([*words, "--quantization", "none"]) == 2
    assert "no dense weights" in json.loads(capsys.readouterr().out)["error"]["what"]
    assert run([*words, "--quantization", "int8"]) == 0
    capsys.readouterr()
    assert run([*words, "--quantization", "nf4"]) == 2
    assert "cannot be loaded as nf4" in json.loads(capsys.readouterr().out)["error"]["what"]
