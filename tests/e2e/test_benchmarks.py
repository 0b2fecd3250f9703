"""The benchmarks run at tiny sizes; the GPU command's checks hold on any device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_gpu_checks_hold_on_this_processor_too() -> None:
    assert "all checks hold on CPU" in run("gpu.py", "--device", "cpu", "--small")


def test_kernels_are_timed() -> None:
    told = run("cpu.py", "--small")
    for what in (
        "NF4 from bfloat16: GB/s read",
        "int3 to bfloat16",
        "2048 rows, forward + backward: over bf16",
    ):
        assert what in told


def test_training_steps_are_timed() -> None:
    told = run("steps.py", "--small")
    assert "graft LoRA " in told
    assert "graft QLoRA " in told


def test_monitors_are_timed() -> None:
    told = run("monitors.py", "--small")
    assert "4M, 4 blocks, rank 16" in told
    assert "share_of_a_core_by_viewers" in told


def test_memory_and_speed_of_training_are_compared() -> None:
    told = run("training.py", "--small", "--steps", "1", "--only", "graft-lora", "peft-lora")
    assert "memory_over_peft" in told


def test_ways_of_merging_are_compared(shared: Path) -> None:
    told = run("merging.py", "--small")
    for what in (
        "requantized_dense, nf4",
        "requantized, int8",
        "dequantized, bfloat16",
        "folding and writing alone",
    ):
        assert what in told


def test_steps_of_methods_are_compared() -> None:
    told = run("methods.py", "--small", "--steps", "1", "--only", "lora", "adalora")
    assert "over_lora" in told
    assert "adalora" in told


def test_quantizing_afterwards_and_in_training_are_compared(shared: Path) -> None:
    told = run("qat.py", "--small")
    assert "lora, nf4: " in told
    assert "qat, nf4: " in told


def test_preparation_is_timed_beside_the_tokenizer_and_memory_measured(shared: Path) -> None:
    told = run("data.py", "--small", "--bytes", "3e5")
    assert "tokens_per_second" in told
    assert told.count("grown_by_an_epoch_bytes") == 6


def test_duplicates_are_found_beside_peers(shared: Path, tmp_path: Path) -> None:
    texts = str(shared / "datasets" / "instruct" / "alpaca_en_demo.json")
    told = run(
        *("data_duplicates.py", "--rows", "2000", "--sample", "500", "--texts", texts, "--out", str(tmp_path))
    )
    assert "num_exact" in told
    assert "recall" in told
    assert (tmp_path / "data_duplicates.json").is_file()
