"""The commands as a user gives them: train, evaluate, generate, chat, merge; answers and exit codes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.cli.main import run
from graft.models.load import load


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"prompt": f"say {word}: ", "completion": word} for word in ("red", "green", "blue", "black") * 4
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(tiny_dir: Callable[..., Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "qlora"
    words = ["train", "--model", str(tiny_dir("llama")), "--data", str(rows), "--eval-data", str(rows)]
    words += ["--method", "qlora", "--out", str(out), "--set", "training.max_steps=12", "--quiet"]
    words += ["--set", "training.learning_rate=3e-2", "--set", "data.max_length=64"]
    assert run(words) == 0
    return out


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON object on stdout."""
    capsys.readouterr()
    code = run([*words, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    told: dict[str, Any] = json.loads(out)
    assert told["ok"] is (code == 0)
    return code, told


def test_train_answers_in_json(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(tiny_dir("qwen2")), "--data", str(rows), "--out", str(tmp_path / "run")]
    code, told = answer(capsys, *words, "--set", "training.max_steps=2")
    assert code == 0
    assert told["metrics"]["steps"] == 2
    assert Path(told["adapter"], "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_evaluate_generate_and_merge_agree(
    trained: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = "loss,perplexity,exact_match,accuracy"
    _, live = answer(capsys, "evaluate", "--adapter", str(trained), "--data", str(rows), "--metrics", metrics)
    assert live["num_rows"] == 16
    assert set(live["metrics"]) == set(metrics.split(","))
    _, merged = answer(capsys, "merge", str(trained), "--out", str(tmp_path / "m"), "--from-quantized")
    assert Path(merged["model"], "model.safetensors").exists()
    _, again = answer(capsys, "evaluate", str(tmp_path / "m"), "--data", str(rows), "--metrics", metrics)
    assert again["metrics"]["loss"] == pytest.approx(live["metrics"]["loss"], abs=1e-5)
    assert again["metrics"]["accuracy"] == live["metrics"]["accuracy"]
    prompt = ("--prompt", "say red: ", "--max-new-tokens", "5")
    _, from_live = answer(capsys, "generate", "--adapter", str(trained), *prompt)
    _, from_merged = answer(capsys, "generate", str(tmp_path / "m"), *prompt)
    assert from_live["completions"] == from_merged["completions"]
    _, both = answer(capsys, "generate", "--adapter", str(trained), *prompt, "--compare")
    assert both["completions"][0]["text"] == from_live["completions"][0]["text"]
    assert both["completions"][0]["base"] != both["completions"][0]["text"]


def test_evaluate_tells_the_rows_that_it_left_out(
    tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    words = ("evaluate", str(tiny_dir("llama")), "--data", str(path))
    _, told = answer(capsys, *words)
    assert told["num_rows"] == 1
    assert [row["where"] for row in told["rejected"]] == [f"{path}:2"]
    assert run([*words]) == 0
    assert f"1 rows; 1 left out, the first: {path}:2" in capsys.readouterr().out


def test_a_second_merge_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", str(trained), "--out", str(tmp_path / "m"), "--json"]) == 0
    code, told = answer(
        capsys,
        "merge",
        str(trained),
        "--base",
        str(tmp_path / "m"),
        "--out",
        str(tmp_path / "n"),
        "--force-base",
    )
    assert code == 2
    assert told["error"]["what"]


def test_another_base_of_the_same_shape_is_refused(
    trained: Path, tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_dir("llama"), other)
    base = load(other)
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1.0
    base.model.save_pretrained(other)
    words = ("generate", str(other), "--adapter", str(trained), "--prompt", "say red: ")
    code, told = answer(capsys, *words)
    assert code == 2
    assert told["error"]["type"] == "FingerprintError"
    assert "--force-base" in told["error"]["fix"]
    was, now = (
        load(tiny_dir("llama"), quantization="nf4").fingerprint,
        load(other, quantization="nf4").fingerprint,
    )
    assert was.short in told["error"]["what"]
    assert now.short in told["error"]["what"]
    code, _ = answer(capsys, *words, "--force-base")
    assert code == 0


def test_chat_reads_lines_and_answers_each(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say red: \n\nsay blue: \n/quit\nnever\n"))
    assert run(["chat", "--adapter", str(trained), "--compare", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("base:    ") == 2
    assert out.count("adapter: ") == 2


def test_doctor_names_a_backend_for_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    _, told = answer(capsys, "doctor")
    assert {row["operation"] for row in told["operations"]} >= {"encode_blockwise", "decode_blockwise"}
    assert all(row["backend"] and row["reason"] for row in told["operations"])


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["train"], "no training data", "--data FILE"),
        (
            ["train", "--data", "x.jsonl", "--method", "qlra"],
            "unknown method 'qlra'",
            "did you mean 'qlora'?",
        ),
        (
            ["train", "--data", "x.jsonl", "--set", "trainin.seed=1"],
            "unknown name 'trainin.seed'",
            "training?",
        ),
        (["train", "--data", "x.jsonl", "--set", "training.seed=-1"], "training.seed = -1", "at least 0"),
        (["train", "--data", "nowhere/x.jsonl"], "x.jsonl", ""),
        (["train", "--resume", "nowhere"], "is not a run directory", "run.json"),
        (
            ["train", "--resume", "nowhere", "--data", "x.jsonl"],
            "--data cannot go with --resume",
            "--resume nowhere",
        ),
        (
            ["train", "--data", "x.jsonl", "--allow-change", "training.seed"],
            "only a run that goes on can change",
            "--resume RUN",
        ),
        (["train", "--no-such-flag"], "--no-such-flag", "--help"),
        (["trian"], "trian", "--help"),
        (["generate"], "no prompt", "--prompt"),
        (["evaluate"], "no evaluation data", "--data"),
        (
            ["evaluate", "nowhere/model", "--data", "x.jsonl", "--metrics", "loss,exact-match"],
            "no metric 'exact-match'",
            "did you mean 'exact_match'?",
        ),
        (
            ["evaluate", "builtin", "--data", "x.jsonl", "--set", "training.seed=1"],
            "evaluate does not take 'training.seed'",
            "--set takes here: data.format, data.limit, data.max_length",
        ),
        (
            ["evaluate", "builtin", "--data", "x.jsonl", "--set", "training.batch_size=1"],
            "evaluate does not take 'training.batch_size'",
            "--batch-size N; --set takes here",
        ),
        (
            ["evaluate", "builtin", "--data", "x.jsonl", "--set", "data.packing=false"],
            "evaluate does not take 'data.packing'",
            "--set takes here",
        ),
        (
            ["evaluate", "builtin", "--data", "x.jsonl", "--set", "data.max_lenght=8"],
            "evaluate does not take 'data.max_lenght'",
            "did you mean data.max_length?",
        ),
        (["merge", "nowhere", "--out", "m"], "nowhere", ""),
        (["generate", "nowhere/model", "--prompt", "x"], "nowhere/model", ""),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    words: list[str],
    what: str,
    fix: str,
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[:1] == ["train"] and "--resume" not in words and "--no-such-flag" not in words:
        words = [*words, "--model", str(tiny_dir("llama"))]
    code, told = answer(capsys, *words)
    assert code == 2
    error = told["error"]
    assert what in error["what"] + error["where"]
    assert fix in error["fix"]
    assert error["fix"], "every error says how to mend it"
    assert run(words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_several_mistakes_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("adapter:\n  rnak: 4\ntraining:\n  batch_size: none\n")
    code, told = answer(capsys, "train", str(path))
    assert code == 2
    assert len(told["error"]["problems"]) == 2
    assert "run.yaml line 2" in told["error"]["problems"][0]["where"]


def test_interrupt_saves_exits_3_and_resumes(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", "--model", str(tiny_dir("llama")), "--data", str(rows), "--out", str(out)]
    words += ["--set", "training.max_steps=4000", "--set", "data.max_length=64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "graft.cli.main", *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 500:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3, told
    assert "the state is saved" in told
    assert f"graft train --resume {out}" in told
    before = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert before[-1] in told
