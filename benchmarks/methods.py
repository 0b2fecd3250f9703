"""What a training step of each adapter method costs beside one of LoRA.

    python benchmarks/methods.py           # SmolLM2-135M's shape, ten of its blocks, 4 x 512 tokens
    python benchmarks/methods.py --small   # a tiny model: only that it runs

Every method is a process of its own that runs graft's own loop on all linears; the parent lets them make a
step in turn, so that all of them see the same machine. Ratios to LoRA's step are taken within each turn;
their median and range are printed. AdaLoRA chooses ranks in every step. Writes results/methods.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training import REAL, TINY, Process, peak_bytes, tell, token_rows, wait_for_turn

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "dora": {"rank": 16},
    "lora_fa": {"rank": 16},
    "adalora": {
        "rank": 24,
        "target_rank": 16,
        "initial_steps": 0,
        "final_steps": 0,
        "allocation_interval": 1,
    },
    "vera": {"rank": 256},
    "ia3": {},
    "loha": {"rank": 8},
    "lokr": {"rank": 16},
    "oft": {"block_size": 32},
    "qa_lora": {"rank": 16, "group_size": 32},
}
"""Of each method; LoRA's first."""


def shape_of(values: argparse.Namespace) -> tuple[int, ...]:
    shape = TINY if values.small else REAL
    return (*shape[:2], values.layers or shape[2], *shape[3:])


def contestant(values: argparse.Namespace) -> None:
    from graft.adapters.attach import attach
    from graft.adapters.base import METHODS
    from graft.data.loader import Loader
    from graft.data.masking import Sample
    from graft.models.load import load
    from graft.runs import RunDirectory
    from graft.training.choices import adapter_to_train, trained_tensors
    from graft.training.config import TrainingConfig
    from graft.training.job import Job
    from graft.training.loop import Training
    from graft.training.memory import prepared
    from graft.training.monitors import Silent

    class Turns(Silent):
        began = 0.0

        def step(self, record: dict[str, Any], num_tokens: int) -> None:
            tell(seconds=time.perf_counter() - self.began, loss=record["loss"])
            if not wait_for_turn():
                raise EOFError
            self.began = time.perf_counter()

    rows = token_rows(4, 32 if values.small else 512, shape_of(values)[-1], values.steps + 2)
    base = load(values.model)
    attach(base.model, METHODS[values.contestant].config_class(**SETTINGS[values.contestant]))
    monitor = Turns()
    with TemporaryDirectory() as place:
        config = TrainingConfig(
            batch_size=4, max_steps=values.steps + 2, lr_scheduler="constant", audit="none"
        )
        loader = Loader([Sample(row, [-100, *row[1:]]) for row in rows], 4, len(rows[0]), packing=False)
        run = RunDirectory.create(Path(place) / "run")
        trained = trained_tensors(base.model, adapter_to_train(base.model))
        job = Job(base.model, trained, loader, None, config, 1e-4, run, monitor)
        if wait_for_turn():
            monitor.began = time.perf_counter()
            with contextlib.suppress(EOFError), prepared(job):
                Training(job).run()
    tell(peak_bytes=peak_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, no file")
    parser.add_argument("--layers", type=int, default=10, help="blocks; 0 for all of the shape")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one to warm up")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", help="where the figures go instead of results/methods.json")
    parser.add_argument("--contestant", choices=list(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.small:
        values.layers = 0
    contestant(values) if values.contestant else compare(values)


def compare(values: argparse.Namespace) -> None:
    from steps import make_model

    names = ["lora", *(name for name in values.only if name != "lora")]
    times: dict[str, list[float]] = {name: [] for name in names}
    with TemporaryDirectory() as directory:
        make_model(directory, shape_of(values))
        processes = [Process(name, directory, sys.argv[1:], __file__) for name in names]
        for turn in range(values.steps + 1):
            for process in processes:
                seconds = process.step()
                if turn:
                    times[process.name].append(seconds)
        peaks = {process.name: process.finish()["peak_bytes"] for process in processes}
    figures = {}
    for name in names:
        ratios = [own / lora for own, lora in zip(times[name], times["lora"], strict=True)]
        figures[name] = {
            "over_lora": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "seconds": [round(seconds, 3) for seconds in times[name]],
            "peak_megabytes": round(peaks[name] / 1e6, 1),
        }
        print(f"{name:8s} {json.dumps(figures[name])}")
    if not values.small or values.out:
        import torch

        from graft import files

        place = Path(values.out) if values.out else Path(__file__).parent / "results" / "methods.json"
        told = {"shape": shape_of(values), "threads": torch.get_num_threads(), "torch": torch.__version__}
        told |= {"date": time.strftime("%Y-%m-%d"), "settings": SETTINGS}
        files.write_json(place, {**told, "figures": figures})


if __name__ == "__main__":
    main()
