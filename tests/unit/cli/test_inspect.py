"""`graft inspect` as a user gives it: a trained adapter, the table, the JSON, the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from graft.cli.main import run
from graft.runs import read_lines


@pytest.fixture(scope="module")
def trained(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    lines = [{"prompt": f"{word} ", "completion": word[::-1]} for word in ("red", "green", "blue", "black")]
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["train", "--model", str(tinystories), "--data", str(place / "rows.jsonl"), "--method", "lora"]
    words += ["--out", str(place / "run"), "--set", "training.max_steps=8", "--quiet"]
    words += ["--set", "training.learning_rate=1e-2", "--set", "training.spectrum_steps=8"]
    assert run([*words, "--set", "adapter.rank=4"]) == 0
    return place / "run"


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run(["inspect", *words, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    told: dict[str, Any] = json.loads(out)
    assert told["ok"] is (code == 0)
    return code, told


def test_json_has_what_the_run_measured_itself(
    trained: Path, tinystories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own log of spectra, made with the model in memory, and the files say the same."""
    code, told = answer(capsys, str(trained), "--base", str(tinystories))
    assert code == 0
    (line,) = read_lines(trained / "spectra.jsonl")
    layers = {layer["path"]: layer for layer in told["layers"]}
    assert layers.keys() == line["layers"].keys()
    for path, figures in line["layers"].items():
        layer = layers[path]
        assert layer["values"] == pytest.approx(figures["singular_values"], rel=1e-4, abs=1e-9)
        for name in ("effective_rank", "update_ratio", "balance"):
            assert layer[name] == pytest.approx(figures[name], rel=1e-4), (path, name)
        assert len(layer["cosines"]) == 10
    record = json.loads((trained / "run.json").read_text())
    assert told["trained"]["steps"] == 8
    assert told["trained"]["learning_rate"] == record["config"]["training"]["learning_rate"]
    assert told["trained"]["data"] == record["identity"]["training data"]
    assert told["base_checked"]
    assert told["settings"]["rank"] == 4
    assert sum(group["layers"] for group in told["bands"]) == len(layers)
    assert sum(group["share"] for group in told["kinds"]) == pytest.approx(1, abs=1e-4)


def test_the_terminal_says_the_same(
    trained: Path, tinystories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told = answer(capsys, str(trained))
    assert run(["inspect", str(trained)]) == 0
    text = capsys.readouterr().out
    for layer in told["layers"]:
        (row,) = re.findall(rf"^{re.escape(layer['path'])} .*$", text, re.MULTILINE)
        cells = row.split()
        assert cells[1] == "4"
        assert float(cells[2]) == pytest.approx(layer["norm"], rel=1e-2)
        assert float(cells[4]) == pytest.approx(layer["stable_rank"], abs=0.06)
    assert "/ weight" not in text
    assert "--base MODEL measures against it" in text
    assert re.search(rf"^base .*{re.escape(str(tinystories))}, fingerprint [0-9a-f]{{12}}, dense", text, re.M)


def test_errors_have_a_code_and_a_fix(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = answer(capsys, str(trained / "nothing"))
    assert code == 2
    assert told["error"]["type"] == "AdapterError"
    code, told = answer(capsys, str(trained), "--base", "builtin")
    assert code == 2
    assert told["error"]["type"] == "FingerprintError"
    assert "--force-base" in told["error"]["fix"]
    code, told = answer(capsys, str(trained), "--page", str(trained / "no" / "page.html"))
    assert code == 2
    assert told["error"]["type"] == "StorageError"


def test_a_browser_draws_the_page(
    trained: Path, tinystories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "adapter.html"
    _, told = answer(capsys, str(trained), "--base", str(tinystories), "--page", str(page))
    assert told["page"] == str(page)
    written = unescape(page.read_text())
    for item in told["tensors"]:
        assert f"<span>{item['name']}</span>" in written
    for finding in told["findings"]:
        assert finding["text"] in written
    assert not re.search(r"""(?:src|href)=["']?https?:""", page.read_text())
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    drawn = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert drawn.count("<canvas") == 2
    cells = re.findall(r'data-path="([^"]+)"[^>]*title="[^"]*: ([\d.e-]+)"', drawn)
    assert {path: float(value) for path, value in cells} == {
        layer["path"]: pytest.approx(layer["update_ratio"], rel=1e-2) for layer in told["layers"]
    }
