"""Time of one optimizer step on the adapters of two models, and bytes of state for each number.

    python benchmarks/optimizers.py          # a minute
    python benchmarks/optimizers.py --small  # only that it runs

The tensors are those of rank-16 adapters on the linear layers of a 1B Llama, 224 of 8192 to 71680 numbers,
8.4 million in all, and of SmolLM2-135M, 420 of 3072 to 24576, 4.9 million. Gradients lie ready, as after a
backward pass, no optimizer clips, and each clears them. The contestants take turns in one process; the median
of their times and the median of the ratios to torch's fused AdamW are printed, of the wall clock and of the
processor's time, which other work on the machine disturbs less. "one flat buffer" is torch's fused kernel
over a single tensor, with gradients added into one by the backward pass. Writes results/optimizers.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft import files
from graft.training.config import TrainingConfig
from graft.training.optim import Optimizer

RANK = 16
SHAPES = {"llama-1b": (2048, 4480, 512, 16), "smollm2-135m": (576, 1536, 192, 30)}
"""Width, inner width, width of keys, layers; the first one's inner width makes 8.4 million numbers."""

RATE = 1e-4


def make_parameters(shape: str, most_layers: int = 100) -> dict[str, nn.Parameter]:
    width, inner, keys, layers = SHAPES[shape]
    linears = [(width, width), (width, keys), (width, keys), (width, width)]
    linears += [(width, inner), (width, inner), (inner, width)]
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(min(layers, most_layers)):
        for index, (wide, high) in enumerate(linears):
            for leaf, size in (("lora_A", (RANK, wide)), ("lora_B", (high, RANK))):
                found[f"{layer}.{index}.{leaf}"] = nn.Parameter(torch.randn(size, generator=generator) / 50)
    return found


def of_graft(params: dict[str, nn.Parameter], name: str) -> tuple[Callable[[], None], Callable[[], int]]:
    config: Any = {"optimizer": name, "learning_rate": RATE, "max_grad_norm": 0.0}
    optimizer = Optimizer(params, TrainingConfig(**config))
    return lambda: optimizer.step(RATE, 1.0), lambda: optimizer.state_bytes


def of_torch(
    params: dict[str, nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> tuple[Callable[[], None], Callable[[], int]]:
    optimizer = make(list(params.values()))

    def num_bytes() -> int:
        # bitsandbytes keeps the maps, which all tensors share, in the state of each.
        held = [
            value
            for state in optimizer.state.values()
            for part, value in state.items()
            if torch.is_tensor(value) and "qmap" not in part
        ]
        return sum(value.numel() * value.element_size() for value in held)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step, num_bytes


def of_one_buffer(params: dict[str, nn.Parameter]) -> tuple[Callable[[], None], Callable[[], int]]:
    sizes = [p.numel() for p in params.values()]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params.values()]))
    gradients = torch.zeros_like(flat)
    views = list(gradients.split(sizes))
    optimizer = torch.optim.AdamW([flat], lr=RATE, fused=True)
    flat.grad = gradients

    def step() -> None:
        # A backward pass adds to gradients that are there; those that are not it sets, at no cost.
        gradients.zero_()
        torch._foreach_add_(views, [p.grad.view(-1) for p in params.values() if p.grad is not None])
        optimizer.step()

    return step, lambda: 8 * flat.numel()


def contestants(shape: str, layers: int) -> dict[str, tuple[Any, Callable[[], None], Callable[[], int]]]:
    makers: dict[str, Callable[[dict[str, nn.Parameter]], Any]] = {
        "torch AdamW fused": lambda p: of_torch(p, lambda q: torch.optim.AdamW(q, lr=RATE, fused=True)),
        "torch AdamW foreach": lambda p: of_torch(p, lambda q: torch.optim.AdamW(q, lr=RATE, foreach=True)),
    }
    makers["one flat buffer"] = of_one_buffer
    for name in ("adamw", "adamw_8bit", "sgd", "lion"):
        makers[f"graft {name}"] = lambda p, name=name: of_graft(p, name)  # type: ignore[misc]
    try:
        import bitsandbytes

        makers["bitsandbytes AdamW8bit"] = lambda p: of_torch(
            p, lambda q: bitsandbytes.optim.AdamW8bit(q, lr=RATE)
        )
    except ImportError:
        pass
    found = {}
    for name, make in makers.items():
        params = make_parameters(shape, layers)
        found[name] = (params, *make(params))
    return found


def compare(shape: str, layers: int, turns: int) -> dict[str, Any]:
    rivals = contestants(shape, layers)
    gradients = {n: torch.randn_like(p) / 1000 for n, p in next(iter(rivals.values()))[0].items()}
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    processor: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(turns + 3):
        for name, (params, step, _) in rivals.items():
            for key, parameter in params.items():
                parameter.grad = gradients[key]
            started, used = time.perf_counter(), time.process_time()
            step()
            if turn >= 3:
                processor[name].append(time.process_time() - used)
                wall[name].append(time.perf_counter() - started)
    num = sum(p.numel() for p in gradients.values())
    rows = {}
    for name in rivals:
        ratios = [
            statistics.median(a / b for a, b in zip(taken[name], taken["torch AdamW fused"], strict=True))
            for taken in (wall, processor)
        ]
        rows[name] = {
            "milliseconds": round(1000 * statistics.median(wall[name]), 2),
            "processor_milliseconds": round(1000 * statistics.median(processor[name]), 2),
            "ratio_to_fused": round(ratios[0], 2),
            "processor_ratio_to_fused": round(ratios[1], 2),
            "state_bytes_per_number": round(rivals[name][2]() / num, 2),
        }
        print(
            f"{shape:13} {name:24} {rows[name]['milliseconds']:8.2f} ms {ratios[0]:6.2f} x, processor "
            f"{rows[name]['processor_milliseconds']:8.2f} ms {ratios[1]:6.2f} x"
            f"  {rows[name]['state_bytes_per_number']:.2f} bytes"
        )
    return {"numbers": num, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="two layers, few turns, no file")
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args()
    layers, turns = (2, 3) if args.small else (100, args.turns)
    found = {shape: compare(shape, layers, turns) for shape in SHAPES}
    if not args.small:
        machine = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        path = Path(__file__).parent / "results" / "optimizers.json"
        files.write_json(path, {**machine, "turns": turns, "shapes": found})


if __name__ == "__main__":
    main()
