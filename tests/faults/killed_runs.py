"""Trains in forked children that are killed with SIGKILL at random times, and resumes until they are done.

    python killed_runs.py MODEL ROWS DIRECTORY KILLS SEED [every | SETTING ...]

Run in a process of its own: torch is imported once, each child is a fork and so starts at once. "every" takes
the runs of `EVERY` in turn. Prints one JSON object: kills, runs, the phases in which they hit, the kills of
each kind of run, and what differs from an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from graft.config import build, read_assignments
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig

COMPARED = (
    "metrics.jsonl",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/graft.json",
    "model/model.safetensors",
)

EVERY = {
    "adamw, cosine, packed": ["training.min_lr_ratio=0.1"],
    "adamw_8bit, linear": [
        "optimizer=adamw_8bit",
        "adapter.rank=128",
        "lr_scheduler=linear",
        "data.packing=false",
    ],
    "lion, wsd": [
        "optimizer=lion",
        "learning_rate=1e-3",
        "lr_scheduler=wsd",
        "gradient_accumulation_steps=3",
    ],
    "sgd, constant": [
        "optimizer=sgd",
        "sgd_momentum=0.9",
        "lr_scheduler=constant",
        "gradient_accumulation_steps=1",
    ],
    "restarts, early stopping": [
        "lr_scheduler=cosine_with_restarts",
        "early_stopping_patience=2",
        "eval_steps=2",
    ],
    "inverse root, best of three": ["lr_scheduler=inverse_sqrt", "keep_best_checkpoints=3", "eval_steps=3"],
    "float16, adamw_8bit": ["model.dtype=float16", "optimizer=adamw_8bit", "adapter.rank=128"],
    "full": ["adapter=", "quantization=", "learning_rate=1e-3", "lora_plus_ratio=1"],
}
"""Settings by what a run is of; a name without a section is of training."""


SECTIONS = ("adapter=", "quantization=")


def config(model: str, rows: str, out: Path, more: list[str]) -> RunConfig:
    words = [
        f"model.name={model}",
        f"data.train={rows}",
        f"data.eval={rows}",
        "data.max_length=64",
        f"output={out}",
        "quantization=nf4",
        *([] if "adapter=" in more else ["adapter.rank=4", "adapter.dropout=0.1"]),
        "training.batch_size=1",
        "training.gradient_accumulation_steps=2",
        "training.learning_rate=1e-2",
        "training.max_steps=10",
        "training.eval_steps=4",
        "training.save_steps=2",
        "training.load_best_at_end=true",
        *(word if "." in word.partition("=")[0] or word in SECTIONS else f"training.{word}" for word in more),
    ]
    return build(RunConfig, read_assignments(words))


def child(made: RunConfig, out: Path) -> None:
    torch.set_num_threads(1)
    if (out / "run.json").exists():
        resume(out)
    else:
        run_from_config(made)


def start(made: RunConfig, out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(made, out)
            status = 0
        finally:
            os._exit(status)
    return pid


def phase(out: Path) -> str:
    if not (out / "run.json").exists():
        return "before the first step"
    if any((out / "checkpoints").glob(".*")):
        return "while saving"
    if (out / "adapter").exists() or any(out.glob(".adapter*")):
        return "while writing the result"
    return "between saves"


def killed_run(made: RunConfig, out: Path, generator: random.Random, longest: float, left: int) -> list[str]:
    """Kill a run at most `left` times, then let it end; returns the phases that were hit."""
    hits: list[str] = []
    while True:
        pid = start(made, out)
        if len(hits) < left:
            deadline = time.monotonic() + generator.uniform(0.0, longest)
            while time.monotonic() < deadline:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return hits
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            hits.append(phase(out))
            os.waitpid(pid, 0)
            continue
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "the last resume failed"
        return hits


def main() -> None:
    model, rows, directory, more = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[6:]
    kills, generator = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    torch.set_num_threads(1)
    kinds = EVERY if more == ["every"] else {"as given": more}
    straight, longest = {}, {}
    for number, (kind, settings) in enumerate(kinds.items()):
        straight[kind] = directory / ("straight" if kinds is not EVERY else f"straight{number}")
        began = time.monotonic()
        pid = start(config(model, rows, straight[kind], settings), straight[kind])
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, kind
        longest[kind] = time.monotonic() - began
    hits: dict[str, list[str]] = {kind: [] for kind in kinds}
    different: list[str] = []
    runs = 0
    while (left := kills - sum(map(len, hits.values()))) > 0:
        kind = list(kinds)[runs % len(kinds)]
        out = directory / f"killed{runs}"
        # At most 8 kills a run, so that some runs are killed often and several runs end.
        made = config(model, rows, out, kinds[kind])
        hits[kind] += killed_run(made, out, generator, longest[kind], min(8, left))
        different += [
            f"{kind}: {out.name}/{name}"
            for name in COMPARED
            if (straight[kind] / name).exists()
            and (out / name).read_bytes() != (straight[kind] / name).read_bytes()
        ]
        shutil.rmtree(out)
        runs += 1
    everywhere = [phase for found in hits.values() for phase in found]
    told = {
        "kills": len(everywhere),
        "runs": runs,
        "phases": {name: everywhere.count(name) for name in sorted(set(everywhere))},
        "kinds": {kind: len(found) for kind, found in hits.items()},
        "different": different,
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
