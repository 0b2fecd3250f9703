"""A fault at every file operation of a run: kill -9, no space, no quota, a read-only disk, a broken one.

Whatever happens, the newest whole checkpoint stands, a resume ends with the bytes of an uninterrupted run,
and what is told is a StorageError with the bytes that were needed and that are free.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

ALL_OF_THEM = {"open", "write", "truncate", "fsync", "rename", "mkdir"}


@pytest.fixture(scope="module")
def interceptor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """intercepted.c, compiled; skips where that cannot be."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("system calls are intercepted on Linux, with a C compiler")
    library = tmp_path_factory.mktemp("interceptor") / "intercepted.so"
    source = str(HERE / "intercepted.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), source], check=True)
    return library


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of flushes take their time elsewhere."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.mark.parametrize(
    ("scenario", "besides"),
    [("lora", {"unlink", "rmdir", "chmod"}), ("full", set()), ("again", {"unlink", "rmdir", "chmod"})],
)
def test_every_operation_of_a_run(
    scenario: str,
    besides: set[str],
    interceptor: Path,
    quick_disk: Path,
    tiny_dir: Callable[..., Path],
    rows: Path,
) -> None:
    model = tiny_dir("llama", num_hidden_layers=1)
    command = [sys.executable, str(HERE / "every_operation.py"), str(interceptor), str(model), str(rows)]
    done = subprocess.run(
        [*command, str(quick_disk), scenario],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if "no seccomp filter here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["failed"] == []
    assert set(told["operations"]) >= ALL_OF_THEM | besides
    assert told["faults"] > 4 * sum(told["operations"].values())
    assert told["states"] > 40
