"""kill -9 at random times: the resumed run ends with the same bytes as one that was never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def campaign(model: Path, directory: Path, kills: int, seed: int) -> dict[str, object]:
    rows = directory / "rows.jsonl"
    lines = [{"prompt": f"add {a} and {b}: ", "completion": f"{a + b}"} for a in range(6) for b in range(5)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(model), str(rows), str(directory), str(kills), str(seed)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, object] = json.loads(done.stdout)
    return told


def test_twenty_random_kills(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    told = campaign(tiny_dir("llama"), tmp_path, kills=20, seed=0)
    assert told["kills"] == 20
    assert told["different"] == []


@pytest.mark.campaign
def test_three_hundred_random_kills(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    told = campaign(tiny_dir("llama"), tmp_path, kills=300, seed=1)
    assert told["kills"] == 300
    assert told["different"] == []
