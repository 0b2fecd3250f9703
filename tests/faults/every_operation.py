"""Breaks a run at every file operation that it makes, and resumes each directory that this leaves.

    python every_operation.py LIBRARY MODEL ROWS DIRECTORY SCENARIO

LIBRARY is intercepted.c, compiled. At each operation the run is forked: the child goes on in a copy of the
directory with the fault, the run itself without it; so every fault costs a fork and not a run. Directories
that are the same are resumed once. Prints one JSON object: operations, faults, states, and what failed.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graft.config import build, read_assignments
from graft.errors import GraftError
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig

DO, HALF, HALF_AND_DIE = 0, -1, -2
NEEDS_SPACE = ("open", "write", "writev", "mkdir", "rename", "truncate", "fallocate", "fsync", "copy")
FULL = (errno.ENOSPC, errno.EDQUOT)
OF_THE_CLOCK = ("timings.jsonl", "audit.json", "report.html", "lock")

COMPARED = {
    "lora": ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/graft.json"),
    "full": ("metrics.jsonl", "model/model.safetensors", "model/config.json"),
    "again": ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/graft.json"),
}
MORE = {
    "lora": ["adapter.rank=2", "training.max_steps=2", "training.eval_steps=2"],
    "full": ["training.max_steps=1", "training.learning_rate=1e-3"],
    "again": ["adapter.rank=2", "training.max_steps=3", "training.keep_checkpoints=2"],
}


def config(model: str, rows: str, scenario: str) -> RunConfig:
    words = [f"model.name={model}", f"data.train={rows}", f"data.eval={rows}", "output=run"]
    words += ["data.max_length=32", "data.packing=false", "training.batch_size=2", "training.save_steps=1"]
    words += ["training.keep_checkpoints=1", "training.learning_rate=1e-2", *MORE[scenario]]
    return build(RunConfig, read_assignments(words))


def begin(made: RunConfig) -> None:
    """Start the run in the working directory, or go on with it."""
    if (Path("run") / "run.json").exists():
        resume("run")
    else:
        run_from_config(made)


class Faults:
    """Answers the intercepted calls of one run.

    Args:
        library: The compiled interceptor.
        work: The directory whose `run` is watched.
    """

    def __init__(self, library: Path, work: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long)
        self._asked = kind(self.asked)  # kept: the library holds only its address
        self.work, self.states = work, work.parent / "states"
        self.states.mkdir()
        self.operations: Counter[str] = Counter()
        self.faults = 0
        self.kept: dict[str, tuple[Path, str]] = {}
        self.failed: list[str] = []
        self.fault: tuple[str, int] | None = None
        self.fired = False
        self.place = ""
        self.outcome = work.parent / "outcome.json"

    def arm(self) -> None:
        self._library.graft_watch(str(self.work / "run").encode(), self._asked)
        refused = self._library.graft_intercept()
        if refused:
            raise SystemExit(f"no seccomp filter here: {os.strerror(refused)}")

    def asked(self, name: bytes, path: bytes, size: int) -> int:
        try:
            operation, where = name.decode(), Path(path.decode())
            if self.fault is not None:
                return self._again(operation)
            return self._at(operation, where, size)
        except BaseException:  # noqa: BLE001 - nothing can be raised through a system call
            traceback.print_exc()
            os._exit(70)

    def _at(self, operation: str, where: Path, size: int) -> int:
        number = sum(self.operations.values())
        self.operations[operation] += 1
        name = re.sub(r"\.\d+\.", ".", str(where.relative_to(self.work)))
        step = newest_step(self.work)
        for fault in faults_of(operation, size):
            self.faults += 1
            told = f"{number} {operation} {name} ({size} bytes): {fault[0]} {fault[1]}"
            copy = self.states / f"{number}-{self.faults}"
            shutil.copytree(self.work, copy)
            self.outcome.unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                self._become(fault, copy)
                return self._first(fault)
            os.waitpid(pid, 0)
            self._judge(fault, operation, told, copy, step)
        return DO

    # In a child.

    def _become(self, fault: tuple[str, int], copy: Path) -> None:
        os.chdir(copy)
        for number in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue  # the one that lists them
            if target.startswith(f"{self.work}/"):
                flags = os.O_RDWR if os.path.isfile(target) else os.O_RDONLY
                twin = os.open(target.replace(str(self.work), str(copy)), flags | append_of(int(number)))
                if flags == os.O_RDWR:
                    os.lseek(twin, os.lseek(int(number), 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(twin, int(number))
                os.close(twin)
        self._library.graft_watch(str(copy / "run").encode(), self._asked)
        self.fault = fault

    def _first(self, fault: tuple[str, int]) -> int:
        kind, code = fault
        if kind == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"kill inside": HALF_AND_DIE, "half, then": HALF}.get(kind, code)

    def _again(self, operation: str) -> int:
        kind, code = self.fault or ("", 0)
        if kind == "once" or (code in FULL and operation not in NEEDS_SPACE):
            return DO
        return code

    # In the run itself.

    def _judge(self, fault: tuple[str, int], operation: str, told: str, copy: Path, step: int) -> None:
        if not fault[0].startswith("kill"):
            outcome = json.loads(self.outcome.read_text()) if self.outcome.exists() else {"type": "died"}
            wanted = outcome["type"] in ("StorageError", "done")
            if fault[1] in FULL and outcome["type"] == "StorageError":
                size = r"[\d,]+ bytes were needed; " if operation == "write" or "/.step-" in told else ""
                wanted = bool(re.search(f"cannot be removed|{size}[\\d,]+ bytes are free", outcome["what"]))
            if not wanted:
                self.failed.append(f"{told}: {outcome}")
        if newest_step(copy) < step:
            self.failed.append(f"{told}: checkpoint {step} was there, {newest_step(copy)} is left")
        key = digest(copy)
        if key in self.kept:
            shutil.rmtree(copy)
        else:
            self.kept[key] = copy, told


def append_of(handle: int) -> int:
    flags = int(Path(f"/proc/self/fdinfo/{handle}").read_text().split("flags:")[1].split()[0], 8)
    return flags & os.O_APPEND


def faults_of(operation: str, size: int) -> list[tuple[str, int]]:
    # Killed after one operation is killed before the next one: nothing else changes a file between them.
    found = [(kind, 0) for kind in ("kill before", *(["kill inside"] if size > 1 else []))]
    found += [("once", errno.EIO), ("from then on", errno.EROFS)]
    if operation in NEEDS_SPACE:
        found += [("from then on", code) for code in FULL]
    if size > 1:
        found.append(("half, then", errno.ENOSPC))
    return found


def newest_step(work: Path) -> int:
    """Step of the newest checkpoint that is whole; -1 for none."""
    steps = [-1]
    for path in (work / "run" / "checkpoints").glob("step-*"):
        try:
            state = json.loads((path / "state.json").read_text())
            whole = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest() == state["sha256"]
        except (OSError, ValueError):
            continue
        steps += [state["position"]["step"]] if whole else []
    return max(steps)


def digest(work: Path) -> str:
    """What a resume could find different; files with the clock in them by their names only."""
    found = []
    for path in sorted(work.rglob("*")):
        name = re.sub(r"\.\d+\.", ".", str(path.relative_to(work)))
        content = path.read_bytes() if path.is_file() and path.name not in OF_THE_CLOCK else b""
        found.append(f"{name} {hashlib.sha256(content).hexdigest()}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def forked(act: Callable[[], None]) -> Any:
    """Do something in a child; what it raised, as text, or None."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:  # noqa: BLE001 - a child reports whatever it was
            os.write(write, traceback.format_exc()[-1500:].encode() or b"?")
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        told = file.read()
    os.waitpid(pid, 0)
    return told or None


def resumed(work: Path, made: RunConfig, straight: Path, names: tuple[str, ...]) -> None:
    os.chdir(work)
    begin(made)
    for name in names:
        found, wanted = (work / "run" / name).read_bytes(), (straight / "run" / name).read_bytes()
        assert found == wanted, f"{name} differs"
    left = [str(path) for path in (work / "run").rglob(".*")]
    assert not left, f"left behind: {left}"


def prepared(work: Path, made: RunConfig, scenario: str) -> None:
    """What the scenario starts from: nothing, or a run whose newest checkpoint and result are damaged."""
    work.mkdir()
    if scenario != "again":
        return
    os.chdir(work)
    begin(made)
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**record, "status": "running"}))
    newest = Path("run/checkpoints/step-000003/state.safetensors")
    newest.write_bytes(bytes(newest.stat().st_size))


def faulted(faults: Faults, made: RunConfig) -> dict[str, Any]:
    """The run with its faults; a child never comes back."""
    os.chdir(faults.work)
    faults.arm()
    outcome: dict[str, Any] = {"type": "done"}
    try:
        begin(made)
    except GraftError as error:
        outcome = {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    except BaseException:  # noqa: BLE001 - to be told as a failure
        outcome = {"type": "untold", "what": traceback.format_exc()[-1500:]}
    if faults.fault is not None:
        faults.outcome.write_text(json.dumps(outcome))
        os._exit(0)
    return {
        "outcome": outcome,
        "operations": faults.operations,
        "faults": faults.faults,
        "kept": [(str(path), told) for path, told in faults.kept.values()],
        "failed": faults.failed,
    }


def main() -> None:
    library, model, rows, directory, scenario = sys.argv[1:6]
    root = Path(directory)
    torch.set_num_threads(1)
    made = config(model, rows, scenario)
    straight, work = root / "straight", root / "work"
    straight.mkdir()
    os.chdir(straight)
    begin(made)
    prepared(work, made, scenario)
    told = root / "told.json"

    def broken() -> None:
        told.write_text(json.dumps(faulted(Faults(Path(library), work), made)))

    # In a child: the filter cannot be taken away again, and the resumes need none.
    if problem := forked(broken):
        raise SystemExit(problem)
    found = json.loads(told.read_text())
    if found["outcome"]["type"] != "done":
        raise SystemExit(str(found["outcome"]))
    failed = found["failed"]
    for place, fault in found["kept"]:
        problem = forked(lambda place=place: resumed(Path(place), made, straight, COMPARED[scenario]))
        if problem:
            failed.append(f"{fault}: on resume: {problem}")
    shown = {name: found[name] for name in ("operations", "faults")}
    sys.stdout.write(json.dumps({**shown, "states": len(found["kept"]), "failed": failed}))


if __name__ == "__main__":
    main()
