"""Processor time of what watching a run costs: a measurement of its spectra, a viewer of its live page.

    python benchmarks/monitors.py          # a minute
    python benchmarks/monitors.py --small  # only that it runs

Processor time of this process, so that other work on the machine counts little; the least of three turns.
Writes results/monitors.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from graft import files
from graft.training.spectrum import Update, measure
from graft.training.watch import Watch

MODELS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "4M, 4 blocks": (4, [(256, 256), (256, 128), (256, 128), (256, 256), (256, 704), (256, 704), (704, 256)]),
    "0.5B, 24 blocks": (
        24,
        [(896, 896), (896, 128), (896, 128), (896, 896), *[(896, 4864)] * 2, (4864, 896)],
    ),
    "8B, 32 blocks": (
        32,
        [(4096, 4096), *[(4096, 1024)] * 2, (4096, 4096), *[(4096, 14336)] * 2, (14336, 4096)],
    ),
}
"""Blocks, and (in, out) of the linears of one."""


def spectra_seconds(blocks: int, shapes: list[tuple[int, int]], rank: int) -> float:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{block}.{number}": Update(
            torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator), 1.0
        )
        for block in range(blocks)
        for number, (inner, outer) in enumerate(shapes)
    }
    norms = dict.fromkeys(found, 1.0)
    times = []
    for _ in range(3):
        started = time.process_time()
        measure(found, norms)
        times.append(time.process_time() - started)
    return min(times)


def viewers_share(viewers: int, steps: int, pause: float) -> float:
    """Processor time of writing the logs and serving them, as a share of the time that passes."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder), 0)
        port = int(watch.address.rstrip("/").rpartition(":")[2])
        line = {"loss": 1.0, "learning_rate": 0.1, "filler": "x" * 300}
        _write(Path(folder), {"step": 0, **line})
        watch.start(0, steps)
        spent = [0.0] * viewers

        def look(number: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/events")
            answer = connection.getresponse()
            while answer.readline():
                spent[number] = time.thread_time()

        threads = [threading.Thread(target=look, args=(number,)) for number in range(viewers)]
        for thread in threads:
            thread.start()
        began, processor = time.perf_counter(), time.process_time()
        for step in range(1, steps + 1):
            _write(Path(folder), {"step": step, **line})
            time.sleep(pause)
        passed = time.perf_counter() - began
        used = time.process_time() - processor - sum(spent)
        watch.close("finished")
        for thread in threads:
            thread.join()
    return used / passed


def _write(folder: Path, line: dict[str, Any]) -> None:
    for name in ("timings", "metrics"):
        with open(folder / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    models = dict(list(MODELS.items())[:1]) if small else MODELS
    found: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "spectra_processor_seconds": {
            f"{name}, rank {rank}": round(spectra_seconds(*model, rank), 4)
            for name, model in models.items()
            for rank in (16, 64)
            if not (rank == 64 and name.startswith("8B"))
        },
    }
    steps = 5 if small else 100
    shares = {n: round(viewers_share(n, steps, 0.01 if small else 0.1), 4) for n in (0, 1, 3)}
    found["share_of_a_core_by_viewers"] = {str(n): share for n, share in shares.items()}
    print(json.dumps(found, indent=2))
    if not small:
        files.write_json(Path(__file__).parent / "results" / "monitors.json", found)


if __name__ == "__main__":
    main()
