"""The page report.html: its figures are the run's, what was recorded is on it, a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from graft.config import build, read_assignments
from graft.evaluate.run_page import drawn_lines
from graft.runs import RunDirectory, read_lines
from graft.training.build import run_from_config
from graft.training.config import RunConfig
from graft.training.report import write_run_report

NAMES = ("metrics", "timings", "spectra")


@pytest.fixture(scope="module")
def run(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    lines = [{"prompt": f"add {a} and {b}: ", "completion": f"{a + b}"} for a in range(5) for b in range(5)]
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        f"model.name={tiny_dir('llama')}",
        f"data.train={place / 'rows.jsonl'}",
        f"output={place / 'run'}",
    ]
    words += ["data.max_length=64", "adapter.rank=4", "training.batch_size=2", "training.max_steps=6"]
    words += [f"data.eval={place / 'rows.jsonl'}", "training.eval_steps=3", "training.spectrum_steps=3"]
    return run_from_config(build(RunConfig, read_assignments(words))).directory


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="run-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_numbers_are_the_runs(run: Path) -> None:
    data = embedded((run / "report.html").read_text())
    record = json.loads((run / "run.json").read_text())
    assert data["live"] is None
    for name in ("metrics", "spectra"):
        assert data["lines"][name] == read_lines(run / f"{name}.jsonl")
    for shown, line in zip(data["lines"]["timings"], read_lines(run / "timings.jsonl"), strict=True):
        assert shown.items() <= line.items()
        assert {"seconds", "num_tokens", "num_padded_tokens", "memory_bytes", "achieved"} <= shown.keys()
    assert data["state"]["phase"] == "finished"
    assert data["state"]["num_steps"] == 6
    assert data["state"]["speed"] == record["speed"]


def test_what_was_checked_and_decided_is_on_the_page(run: Path) -> None:
    page = unescape((run / "report.html").read_text())
    audit = json.loads((run / "audit.json").read_text())
    record = json.loads((run / "run.json").read_text())
    for name in audit["tensors"]:
        assert f"<span>{name}</span>" in page
    for told in (*record["derived"].values(), *map(str, record["versions"].values())):
        assert told in page
    assert "trained" in page
    assert f"{audit['moved']} of {audit['trained_tensors']}" in page


def test_predicted_memory_stands_beside_the_measured(run: Path, tmp_path: Path) -> None:
    copy = RunDirectory(shutil.copytree(run, tmp_path / "copy"))
    record = copy.read_record()
    assert record["predicted_memory"]["peak_bytes"] > 0
    record["predicted_memory"] = {"base_bytes": 100 * 2**20, "logits_bytes": 0, "peak_bytes": 300 * 2**20}
    write_run_report(copy, record)
    page = copy.report_path.read_text()
    assert embedded(page)["state"]["predicted_memory_bytes"] == 300 * 2**20
    ratio = record["results"]["peak_memory_bytes"] / (300 * 2**20)
    for cell in ("base_bytes", "100.0", "predicted peak", "300.0", "measured peak"):
        assert f"<span>{cell}</span>" in page, cell
    assert "<span>logits_bytes</span>" not in page
    assert f"Measured is {ratio:.2f} times" in page


def test_defects_and_trackers_are_on_the_page(run: Path, tmp_path: Path) -> None:
    copy = RunDirectory(shutil.copytree(run, tmp_path / "copy"))
    evil = "<img src=x onerror=alert(1)>"
    audit = json.loads((copy.path / "audit.json").read_text())
    defect = {"what": evil, "names": ["a.b"], "cause": "because"}
    (copy.path / "audit.json").write_text(json.dumps({**audit, "passed": False, "defects": [defect]}))
    record = copy.read_record() | {"trackers": {"mlflow": {"last_step": 2, "failure": evil}}}
    write_run_report(copy, record)
    page = copy.report_path.read_text()
    assert evil not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 2
    assert "defects found" in page


def steps(count: int) -> list[dict[str, Any]]:
    return [{"step": n, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1} for n in range(1, count + 1)]


def test_a_long_run_is_thinned_and_keeps_what_matters() -> None:
    metrics = steps(1000)
    metrics[499]["grad_norm"] = 99.0
    metrics[700] |= {"loss": None, "grad_norm": None, "skipped": "the loss is not finite"}
    evals = [{"step": n, "eval_loss": 1.0, "best": True} for n in (333, 1000)]
    timings = [{"step": n, "seconds": 1.0, "num_tokens": 2} for n in range(1, 1001)]
    lines, every = drawn_lines([*metrics, *evals], timings, [], most=100)
    assert every == 10
    kept = {line["step"] for line in lines["metrics"] if "loss" in line}
    assert {500, 701, 1000} <= kept
    assert len(kept) <= 102
    assert [line for line in lines["metrics"] if "eval_loss" in line] == evals
    assert {line["step"] for line in lines["timings"]} == kept


def test_a_step_that_was_made_again_counts_with_its_last_timing() -> None:
    timings = [{"step": 1, "seconds": 1.0}, {"step": 2, "seconds": 9.0}, {"step": 2, "seconds": 2.0}]
    lines, every = drawn_lines(steps(2), timings, [])
    assert every == 1
    assert [line["seconds"] for line in lines["timings"]] == [1.0, 2.0]


def test_a_browser_draws_the_run(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    page = subprocess.run(
        [*command, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert page.count("<canvas") == 7  # loss, and six of rates, speed and memory
    lines = read_lines(run / "metrics.jsonl")
    (evaluation,) = re.findall(r'Evaluation loss</div><div class="value">([\d.]+)', page)
    assert float(evaluation) == pytest.approx(lines[-1]["eval_loss"], rel=1e-3)
    layers = read_lines(run / "spectra.jsonl")[-1]["layers"]
    cells = re.findall(r'data-path="([^"]+)"[^>]*title="[^"]*: ([\d.]+)"', page)
    assert {path: float(value) for path, value in cells} == {
        path: pytest.approx(figures["effective_rank"], rel=1e-3) for path, figures in layers.items()
    }
    assert re.search(r'data-phase="finished">finished', page)
    assert page.count('<ul class="events" data-part="events"><li') == 1
