"""The Triton backend without a GPU: interpreted, compiled, and told apart from what can run here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from graft import kernels
from graft.kernels.triton import backend

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_interpreted_kernels_equal_the_reference() -> None:
    cases = str(HERE / "triton_cases.py")
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", cases, TRITON_INTERPRET="1")
    assert " passed" in out
    assert "skipped" not in out


@needs_triton
def test_kernels_compile_for_devices_as_planned(tmp_path: Path) -> None:
    """What the interpreter cannot show: that they compile, access widths, roundings, no spilled registers."""
    out = run(str(HERE / "triton_compile.py"), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert out.splitlines()[-1] == "all kernels are as planned"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_device_every_format_and_product_is_right() -> None:
    code = "import torch, gpu_checks; gpu_checks.run_all(torch.device('cuda'), small=True)"
    run("-c", code, PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")]))


def test_without_a_device_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.problem.cache_clear()
    monkeypatch.setattr(backend.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    assert backend.problem() == "no CUDA device"
    choices = kernels.explain("cuda")
    assert {choice.backend for choice in choices} == {"reference"}
    told = {choice.op for choice in choices if "triton: no CUDA device" in choice.reason}
    assert told == set(backend.OPS)
    backend.problem.cache_clear()
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert backend.problem() == "Triton is not installed"
    backend.problem.cache_clear()


def test_the_table_of_ops_imports_no_triton() -> None:
    out = run(
        "-c", "import sys, graft.kernels.ops; print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    )
    assert out.strip() == "[]"
