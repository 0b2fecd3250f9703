"""kill -9 at random moments: the resumed run ends with the same bytes as one that was never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import uint8


def campaign(model: Path, directory: Path, kills: int, seed: int, *settings: str) -> dict[str, Any]:
    rows = directory / "rows.jsonl"
    lines = [{"prompt": f"add {a} and {b}: ", "completion": f"{a + b}"} for a in range(6) for b in range(5)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(model), str(rows), str(directory), str(kills), str(seed)]
    command += settings
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_twenty_random_kills(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    told = campaign(tiny_dir("llama", num_hidden_layers=1), tmp_path, kills=20, seed=0)
    check(told, 20)


def check(told: dict[str, Any], kills: int) -> None:
    """Nothing was lost, and most kills fell where there was something to lose."""
    assert told["kills"] == kills
    assert told["lost"] == []
    assert told["different"] == []
    assert sum(told["phases"].values()) == kills
    assert 2 * told["phases"].get("before the first step", 0) < kills
    assert told["phases"]["in a step"] > 0
    assert told["phases"]["in a save"] > 0


def test_kills_with_states_in_eight_bits(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    # Of rank 128 on a width of 32 the matrices have the 4096 numbers from which states are in 8 bits.
    settings = ("training.optimizer=adamw_8bit", "adapter.rank=128")
    told = campaign(tiny_dir("llama"), tmp_path, 6, 2, *settings)
    assert told["kills"] == 6
    assert told["lost"] == []
    assert told["different"] == []
    stored = load_file(max((tmp_path / "straight" / "checkpoints").iterdir()) / "state.safetensors")
    assert {name.rsplit("|")[-1] for name, value in stored.items() if value.dtype == uint8} >= {
        "exp_avg",
        "exp_avg_sq",
    }


@pytest.mark.campaign
@pytest.mark.parametrize("kills", [60, 300])
def test_random_kills_of_every_kind_of_run(
    tiny_dir: Callable[..., Path], tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = campaign(tiny_dir("llama", num_hidden_layers=1), tmp_path, kills, 1, "every")
    with capsys.disabled():
        sys.stdout.write(f"\n{json.dumps(told)}\n")
    check(told, kills)
    resumed = told["resumed"]
    assert 2 * resumed.get("before the first step", 0) < sum(resumed.values())
    assert told["phases"]["while writing the result"] > 0
    assert min(told["kinds"].values()) >= kills // 60
