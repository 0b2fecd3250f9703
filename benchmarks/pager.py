"""What paging the optimizer's state costs: a step under budgets of it, over the step with all in memory.

    python benchmarks/pager.py          # some minutes
    python benchmarks/pager.py --small  # only that it runs

The tensors are those of rank-64 adapters on all linear layers of SmolLM2-135M: 420 of 12288 to 98304
numbers, 19.5 million in all. Pages go to a file in the given directory. Budgets and the unpaged optimizer
take turns in one process; ratios are taken within a turn and their median is printed, with the pages fetched
in a step. "flushed": the file is written to the disk and dropped from the system's page cache before every
step, so that what is fetched comes from the disk. Writes the rows of the optimizers that ran into
results/pager.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft import files
from graft.training.config import TrainingConfig
from graft.training.optim import Optimizer
from graft.training.store import Pager

WIDTH, INNER, KEYS, LAYERS, RANK = 576, 1536, 192, 30, 64
SHARES = (0.02, 0.1, 0.25, 0.5, 0.75)
"""Budgets, as shares of the whole state."""

RATE = 1e-4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_8bit": {},
    "sgd": {"learning_rate": RATE, "sgd_momentum": 0.9},
    "lion": {"learning_rate": RATE},
}


def make_parameters(layers: int) -> dict[str, nn.Parameter]:
    linears = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH)]
    linears += [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(layers):
        for index, (wide, high) in enumerate(linears):
            for leaf, shape in (("lora_A", (RANK, wide)), ("lora_B", (high, RANK))):
                found[f"{layer}.{index}.{leaf}"] = nn.Parameter(torch.randn(shape, generator=generator) / 50)
    return found


def timed(optimizer: Optimizer, params: dict[str, nn.Parameter], gradients: dict[str, torch.Tensor]) -> float:
    for key, parameter in params.items():
        parameter.grad = gradients[key]
    started = time.perf_counter()
    optimizer.step(RATE, 1.0)
    return time.perf_counter() - started


def drop_from_cache(optimizer: Optimizer) -> None:
    store: Any = optimizer._store
    if isinstance(store, Pager):
        handle = store._below._handle
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, layers: int, turns: int, directory: str, *, flushed: bool) -> list[dict[str, Any]]:
    plain = make_parameters(layers)
    gradients = {key: torch.randn_like(p) / 1000 for key, p in plain.items()}
    settings = {"optimizer": name, "max_grad_norm": 0.0, **OPTIMIZERS[name]}
    whole = Optimizer(plain, TrainingConfig(**settings))
    rivals = {1.0: (plain, whole)}
    num_bytes = sum(page.num_bytes for page in whole._flat._pages)
    for share in SHARES:
        params = make_parameters(layers)
        budget = int(num_bytes * share)
        config = TrainingConfig(**settings, optimizer_memory=budget)
        rivals[share] = params, Optimizer(params, config, run_directory=directory)
    seconds: dict[float, list[float]] = {share: [] for share in rivals}
    reads: dict[float, int] = {}
    for turn in range(turns + 2):
        for share, (params, optimizer) in rivals.items():
            if flushed:
                drop_from_cache(optimizer)
            store: Any = optimizer._store
            before = getattr(store, "num_reads", 0)
            taken = timed(optimizer, params, gradients)
            reads[share] = getattr(store, "num_reads", 0) - before
            if turn >= 2:
                seconds[share].append(taken)
    rows = []
    for share, (params, optimizer) in rivals.items():
        same = all(torch.equal(params[key], plain[key]) for key in plain) if share < 1 else True
        ratio = statistics.median(a / b for a, b in zip(seconds[share], seconds[1.0], strict=True))
        rows.append(
            {
                "optimizer": name,
                "flushed": flushed,
                "state_bytes": whole.state_bytes,
                "share": share,
                "milliseconds": round(1000 * statistics.median(seconds[share]), 1),
                "ratio": round(ratio, 2),
                "pages_fetched": reads[share],
                "same_bits": same,
            }
        )
        optimizer.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="two layers, few turns, no file")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="of the spill files")
    args = parser.parse_args()
    layers, turns = (2, 3) if args.small else (LAYERS, args.turns)
    path = Path(__file__).parent / "results" / "pager.json"
    rows = files.read_json(path)["rows"] if path.exists() else []
    rows = [row for row in rows if row["optimizer"] not in args.optimizers]
    for name in args.optimizers:
        for flushed in (False, True):
            for row in measure(name, layers, turns, args.directory, flushed=flushed):
                rows.append({**row, "turns": turns})
                print(
                    f"{name:11} {'flushed' if flushed else 'cached':8} {row['share']:5.0%} of "
                    f"{row['state_bytes'] / 1e6:6.1f} MB {row['milliseconds']:8.1f} ms {row['ratio']:6.2f} x "
                    f"{row['pages_fetched']:4} pages  {'same bits' if row['same_bits'] else 'OTHER BITS'}"
                )
    if not args.small:
        machine = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        files.write_json(path, {**machine, "rows": rows})


if __name__ == "__main__":
    main()
