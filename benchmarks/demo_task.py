"""The demo's claim: on the built-in base, LoRA and QLoRA learn the demo task as full fine-tuning does.

    OMP_NUM_THREADS=1 python benchmarks/demo_task.py     # three seeds; whatever the results do not have yet

Each method runs with the demo's own settings. The control is LoRA on a randomly initialised copy of the base
with the same settings: what it reaches is owed to the task alone. Results: results/demo_task.json and .md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch

from graft import files
from graft.adapters.peft_format import load_adapter
from graft.config import Settings, build, read_yaml
from graft.evaluate.generate import GenerationConfig
from graft.evaluate.tasks import evaluate_file
from graft.models.load import load, random_model
from graft.models.save import save_model
from graft.training.build import run_from_config
from graft.training.config import RunConfig

RESULTS = Path(__file__).parent / "results"
METHODS = ("full", "lora", "qlora", "lora on random weights")
TASK = Path(str(resources.files("graft"))) / "builtin" / "tasks" / "demo"


def train_and_measure(method: str, seed: int, work: Path, max_steps: int | None) -> dict[str, float]:
    """Train once with the demo's settings; exact match on the evaluation rows, in percent."""
    model = "builtin"
    if method == "lora on random weights":
        copy = random_model("builtin", seed=seed)
        model = str(work / "random")
        save_model(copy.model, copy.tokenizer, model)
    settings = read_yaml(TASK / f"{method.split()[0]}.yaml")
    given = Settings()
    for path, value in {
        "model.name": model,
        "data.train": str(TASK / "train.jsonl"),
        "data.eval": str(TASK / "eval.jsonl"),
        "training.seed": seed,
        "output": str(work / "run"),
    }.items():
        given.put(path, value, "benchmark")
    if max_steps is not None:
        given.put("training.max_steps", max_steps, "benchmark")
    settings.update(given)
    config = build(RunConfig, settings)
    began = time.monotonic()
    run = run_from_config(config)
    seconds = time.monotonic() - began
    if run.adapter is None:
        base = load(str(run.model))
    else:
        base = load(model, quantization=config.quantization, dtype=config.model.dtype)
        load_adapter(base.model, run.adapter)
    found = evaluate_file(
        base.model,
        base.tokenizer,
        TASK / "eval.jsonl",
        ["exact_match"],
        generation=GenerationConfig(max_new_tokens=48),
        batch_size=50,
    )
    return {"exact_match": 100 * found.metrics["exact_match"], "train_seconds": round(seconds, 1)}


def table(runs: dict[str, dict[str, float]]) -> str:
    """Mean and standard deviation of each method over the seeds."""
    lines = ["| method | exact match, % | seeds |", "|---|---|---|"]
    for method in METHODS:
        values = [run["exact_match"] for name, run in runs.items() if name.startswith(f"{method}/")]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown = ", ".join(f"{value:.1f}" for value in values)
            lines.append(f"| {method} | {statistics.mean(values):.1f} +- {spread:.1f} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--max-steps", type=int, default=None, help="for a quick look; not written to the results"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    values = parser.parse_args()
    path = RESULTS / "demo_task.json"
    known = files.read_json(path) if path.exists() and not values.fresh else {"runs": {}}
    known["machine"] = {
        "processor": "AMD EPYC, AVX-512"
        if "avx512" in Path("/proc/cpuinfo").read_text()
        else platform.machine(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for seed in values.seeds:
        for method in values.methods:
            name = f"{method}/{seed}"
            if name in known["runs"] and values.max_steps is None:
                continue
            with tempfile.TemporaryDirectory() as work:
                known["runs"][name] = train_and_measure(method, seed, Path(work), values.max_steps)
            print(name, known["runs"][name], flush=True)
            if values.max_steps is None:
                RESULTS.mkdir(exist_ok=True)
                if path.exists() and not values.fresh:  # another process may have added to it
                    known["runs"] = files.read_json(path)["runs"] | known["runs"]
                files.write_json(path, known)
                files.write_text(RESULTS / "demo_task.md", table(known["runs"]))
    print(table(known["runs"]))


if __name__ == "__main__":
    main()
