"""The demo, with few steps: three runs, a merge, a page; and what the package ships."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch

from graft.cli.main import run
from graft.models.load import load

BUILTIN = Path(str(resources.files("graft"))) / "builtin"


def test_the_shipped_files_are_small_and_whole() -> None:
    total = sum(path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file())
    assert total <= 12 * 2**20
    base = load("builtin")
    count = sum(parameter.numel() for parameter in base.model.parameters())
    assert 3_000_000 <= count <= 6_000_000
    text = "Straße, naïve, 東京, \U0001f600, \t tabs and\nlines"
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    assert base.tokenizer.decode(ids) == text
    assert "{%- generation %}" in base.tokenizer.chat_template


def test_evaluation_rows_share_no_answer_with_training_rows() -> None:
    def answers(name: str) -> list[list[str]]:
        lines = (BUILTIN / "tasks" / "demo" / name).read_text().splitlines()
        return [json.loads(line)["messages"][-1]["content"].split(" | ") for line in lines]

    train, held_out = answers("train.jsonl"), answers("eval.jsonl")
    assert len(train) >= 300
    assert len(held_out) == 200
    assert not {row[1] for row in train} & {row[1] for row in held_out}
    assert not {row[2] for row in train} & {row[2] for row in held_out}
    assert not {row[3] for row in train} & {row[3] for row in held_out}


def test_demo_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert run(["demo", "--out", str(out), "--max-steps", "2", "--json"]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert set(told["metrics"]) == {"full", "lora", "qlora", "base"}
    assert told["metrics"]["full"]["trained"] > 10 * told["metrics"]["lora"]["trained"]
    assert told["metrics"]["qlora"]["size_bytes"] < told["metrics"]["full"]["size_bytes"]
    assert "wanted:" in shown.err
    page = (out / "report.html").read_text()
    assert "Before and after" in page
    assert (out / "merged" / "model.safetensors").exists()
    with torch.no_grad():
        merged = load(str(out / "merged"))
        assert torch.isfinite(merged.model(torch.tensor([[1, 2, 3]])).logits).all()
