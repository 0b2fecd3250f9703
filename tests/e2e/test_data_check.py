"""`graft data check` as a user gives it: the terminal, the JSON, exit codes, and that a run sees the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.cli.main import run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {n}: ", "completion": f"{n} and {n * 3} and {n * 5}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON object on stdout."""
    capsys.readouterr()
    code = run(["data", "check", *words, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    told: dict[str, Any] = json.loads(out)
    assert told["ok"] is (code == 0)
    return code, told


def test_a_run_sees_what_was_checked(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags, --set and a file mean the same, and the run has the steps and tokens that the check told."""
    words = ["--model", str(tiny_dir("llama")), "--data", str(rows), "--set", "training.batch_size=2"]
    words += ["--set", "data.max_length=100", "--set", "data.eval_fraction=0.2"]
    code, told = answer(capsys, *words)
    assert code == 0
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {tiny_dir('llama')}\nadapter: {{method: lora}}\n"
        f"data: {{train: {rows}, max_length: 100, eval_fraction: 0.2}}\ntraining: {{batch_size: 2}}\n"
    )
    assert answer(capsys, str(config)) == (code, told)
    assert run(["train", str(config), "--out", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["steps"] == told["training"]["packing"]["num_steps"]
    assert told["training"]["num_samples"] + told["evaluation"]["num_samples"] == 40
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["format"] == told["training"]["format"] == "prompt_completion"


def test_the_model_is_never_loaded(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_dir("llama").iterdir():
        if not file.name.endswith(".safetensors"):
            (bare / file.name).write_bytes(file.read_bytes())
    code, told = answer(capsys, "--model", str(bare), "--data", str(rows))
    assert code == 0
    assert told["training"]["num_used"] == 40


def test_the_context_of_the_model_counts(
    tiny_dir: Callable[..., Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told = answer(capsys, "--model", str(tiny_dir("llama")), "--data", str(rows))
    assert (told["training"]["max_length"], told["training"]["context"]) == (128, 128)


def test_data_that_stops_a_run_has_code_2_and_is_shown(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rows.open("a") as file:
        file.write("{broken\n")
    page = tmp_path / "page.html"
    code, told = answer(capsys, "--data", str(rows), "--page", str(page))
    assert code == 2
    assert told["error"]["type"] == "DataError"
    assert told["error"]["where"].startswith(f"{rows}:41:")
    assert told["training"]["num_used"] == 40
    assert told["findings"][0]["rule"] == "stops"
    assert "cannot be trained on" in page.read_text()
    assert run(["data", "check", "--data", str(rows)]) == 2
    assert "cannot be trained on: not JSON" in capsys.readouterr().out
    assert run(["train", "--data", str(rows), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_left_out_where_that_is_asked_for(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rows.open("a") as file:
        file.write("{broken\n" + json.dumps({"prompt": 3, "completion": "x"}) + "\n")
    words = ["--model", str(tiny_dir("llama")), "--data", str(rows), "--skip-invalid"]
    code, told = answer(capsys, *words)
    assert code == 0
    counts = told["training"]
    assert (counts["num_rows"], counts["num_used"], counts["num_rejected"]) == (42, 40, 2)
    steps = ["--set", "training.max_steps=1", "--quiet", "--json"]
    assert run(["train", *words, "--out", str(tmp_path / "run"), *steps]) == 0
    kept = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["where"].removeprefix(str(rows)) for line in kept] == [":41:2", ":42"]
    derived = json.loads((tmp_path / "run" / "run.json").read_text())["derived"]
    assert re.fullmatch(r"[\d.]+% used, the rest is padding", derived["token places"])


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--data", "absent.jsonl"], "StorageError"),
        ([], "ConfigError"),
        (["--samples", "21"], "ConfigError"),
        (["--set", "data.max_lenght=3"], "ConfigError"),
        (["--set", "data.chat_template=x.jinja"], "StorageError"),
    ],
)
def test_what_cannot_be_checked_is_an_error(
    words: list[str], kind: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words if "absent.jsonl" in words or not words else [*words, "--data", str(rows)]
    code, told = answer(capsys, *given)
    assert code == 2
    assert told["error"]["type"] == kind
    assert told["error"]["fix"]


def test_a_page_that_cannot_be_written_leaves_nothing(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = answer(capsys, "--data", str(rows), "--page", str(tmp_path / "no" / "page.html"))
    assert code == 2
    assert told["error"]["type"] == "StorageError"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_the_terminal_without_colours_marks_what_is_learned(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "check", "--data", str(rows), "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "say 0: ⟦0 and 0 and 0" in out
    assert "◀⟧" in out
    assert out.count("rows.jsonl:") == 3
    assert re.search(r"^  rows +40 rows read = 40 used \+ 0 left out$", out, re.MULTILINE)
    assert re.search(r"^  samples +40$", out, re.MULTILINE)
    assert "◀ max_length" in out
    assert "1. advice the tokenizer has a chat template" in out
    assert out.rstrip().endswith("can be trained on")


def test_data_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    """In a real terminal, with colours: what a row holds comes as pictures of control characters."""
    path = tmp_path / "evil.jsonl"
    evil = "red \x1b[31m bell \x07 title \x1b]0;x\x07 turn \u202e end [bold]markup[/bold]"
    rows = [{"prompt": f"{evil} {n} ", "completion": f"{evil} {n}"} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "check", "--data", str(path)]
    code = f"import sys\nsys.stdout.isatty = lambda: True\nfrom graft.cli.main import run\nrun({words!r})"
    environment = {"TERM": "xterm-256color", "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        encoding="utf-8",
    )
    out = done.stdout
    assert "\x1b[" in out  # colours are there
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", plain)
    assert "␛[31m" in plain
    assert "[bold]markup[/bold]" in plain
    colours = re.findall(r"\x1b\[([\d;]*)m", out)
    assert "31" not in colours or "1;31" in colours  # none but those of the view
