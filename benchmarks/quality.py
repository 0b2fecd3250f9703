"""How well full, LoRA, QLoRA and LoRA with embeddings learn three tasks, beside PEFT on the same batches.

    OMP_NUM_THREADS=1 python benchmarks/quality.py              # whatever results/quality.json has not yet
    OMP_NUM_THREADS=1 python benchmarks/quality.py --peer peft --methods lora
    python benchmarks/quality.py --table                        # no training, only results/quality.md

Each run is one of examples/*.yaml with another method and seed. A run that is in the results is not made
again, so the campaign can be stopped and continued. The peer trains with PEFT's layers, transformers' forward
and a plain torch loop, on the batches of graft's loader with the same schedule; the same code measures both.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality_tasks import MEASURES, UNITS
from torch.nn import functional

from graft import files
from graft.adapters.attach import attach
from graft.config import Settings, build, read_yaml
from graft.data.loader import Batch, Loader
from graft.data.prepare import prepare
from graft.models.load import load, random_model
from graft.training.build import run_from_config
from graft.training.config import RunConfig
from graft.training.job import num_steps
from graft.training.schedule import Schedule

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "quality.json"

EMBEDDINGS_AND_NORMS = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": None, "training.learning_rate": 3e-3},
    "lora": {},
    "qlora": {"quantization.quant_type": "nf4"},
    "lora+": {"adapter.modules_to_save": EMBEDDINGS_AND_NORMS},
}
"""What each method changes in an example's configuration."""

REFERENCE = {
    "grimm": {"base": [2.51], "lora": [1.83], "lora+": [1.76], "full": [1.73]},
    "clinc150": {"base": [0.0], "lora": [68.5], "lora+": [73.8], "full": [76.0]},
    "e2e": {"base": [0.0], "lora": [53.9, 0.83], "lora+": [49.8, 0.79], "full": [51.1, 0.77]},
}
"""PEFT 0.21.2 elsewhere, one seed, with rows, prompts and lengths of its own: near, not the same protocol."""


# One run.


@dataclass(frozen=True)
class Trained:
    model: Any
    tokenizer: Any
    num_trained: int


def run_config(task: str, method: str, seed: int, output: str, changes: dict[str, Any]) -> RunConfig:
    """An example's configuration with another method and seed, and no evaluation on the way."""
    settings = read_yaml(ROOT / "examples" / f"{task}.yaml")
    changed = Settings()
    for path, value in {
        **METHODS[method],
        "output": output,
        "training.seed": seed,
        "data.eval": None,
        "training.eval_steps": None,
        "training.save_steps": 1_000_000,
        **changes,
    }.items():
        changed.put(path, value, "benchmarks/quality.py")
    settings.update(changed)
    return build(RunConfig, settings)


def train_with_graft(config: RunConfig) -> Trained:
    """Train through graft's own entry and open what it wrote, as a user would."""
    from graft.adapters.peft_format import load_adapter

    run = run_from_config(config)
    base = load(config.model.name if run.model is None else str(run.model), quantization=config.quantization)
    if run.adapter is not None:
        load_adapter(base.model, run.adapter)
    return Trained(base.model, base.tokenizer, run.metrics["num_trained"])


def train_with_peft(config: RunConfig) -> Trained:
    """The same training with PEFT: its layers and initialisation, transformers' forward, a plain loop."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert config.quantization is None
    torch.manual_seed(config.training.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    if config.adapter is not None:
        adapter = peft.LoraConfig(
            r=config.adapter.rank,
            lora_alpha=int(config.adapter.alpha),
            target_modules="all-linear",
            modules_to_save=list(config.adapter.modules_to_save) or None,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, adapter).get_base_model()
    return Trained(model, tokenizer, train_plainly(model, loader_of(config, tokenizer), config))


def loader_of(config: RunConfig, tokenizer: Any) -> Loader:
    dataset = prepare(str(config.data.train), tokenizer, config.data)
    return Loader(
        dataset.samples,
        batch_size=config.training.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        seed=config.training.seed,
        shuffle=config.data.shuffle,
        pad_id=tokenizer.pad_token_id,
    )


def train_plainly(model: Any, loader: Loader, config: RunConfig) -> int:
    """AdamW on what is not frozen; returns how many numbers that is."""
    settings, trained = config.training, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(settings.adam_beta1, settings.adam_beta2), weight_decay=0.0)
    model.train()
    step, epoch, total = 0, 0, num_steps(loader, settings)
    schedule = Schedule.of(settings, settings.learning_rate or 0.0, total)
    while step < total:
        for batch in loader.epoch(epoch):
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            batch_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == total:
                break
        epoch += 1
    model.eval()
    return sum(p.numel() for p in trained)


def batch_loss(model: Any, batch: Batch) -> torch.Tensor:
    out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())


TRAINERS = {"graft": train_with_graft, "peft": train_with_peft}


def base_model(config: RunConfig) -> Trained:
    base = load(config.model.name)
    return Trained(base.model, base.tokenizer, 0)


def train_from_random(config: RunConfig) -> Trained:
    """The control: LoRA on the same architecture with random weights. What the base knows is missing."""
    assert config.adapter is not None
    base = random_model(config.model.name, config.training.seed)
    attach(base.model, config.adapter, seed=config.training.seed)
    num_trained = train_plainly(base.model, loader_of(config, base.tokenizer), config)
    return Trained(base.model, base.tokenizer, num_trained)


def make_run(
    task: str, method: str, seed: int, by: str, split: str, changes: dict[str, Any]
) -> dict[str, Any]:
    """Train and measure once; returns the figures."""
    with tempfile.TemporaryDirectory() as directory:
        plain = method if method in METHODS else "lora"
        config = run_config(task, plain, seed, f"{directory}/run", changes)
        trainer = {"base": base_model, "random": train_from_random}.get(method, TRAINERS[by])
        started, cpu_before = time.perf_counter(), time.process_time()
        trained = trainer(config)
        done, cpu_after = time.perf_counter(), time.process_time()
        figures = MEASURES[task](trained.model, trained.tokenizer, config, split)
        return {
            **figures,
            "train_seconds": round(done - started, 1),
            "train_cpu_seconds": round(cpu_after - cpu_before, 1),
            "measure_seconds": round(time.perf_counter() - done, 1),
            "num_trained": trained.num_trained,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        }


# The campaign.


def campaign(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    results = read_results(args.results)
    wanted = [(seed, method, task) for seed in args.seeds for method in args.methods for task in args.tasks]
    for seed, method, task in wanted:
        key = f"{task}/{method}/{seed}/{args.peer or 'graft'}"
        if key in results["runs"]:
            continue
        figures = make_run(task, method, seed, args.peer or "graft", args.split, changes)
        print(f"{key}: {figures}", flush=True)
        results = read_results(args.results)
        results["runs"][key] = figures
        args.results.parent.mkdir(exist_ok=True)
        files.write_json(args.results, results)


def read_results(path: Path) -> dict[str, Any]:
    if path.exists():
        found: dict[str, Any] = files.read_json(path)
        return found
    return {"machine": machine(), "runs": {}}


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{name}, {'AVX-512 bf16' if 'avx512_bf16' in flags else 'no AVX-512 bf16'}"


# The tables.


HEAD = "| method | graft | PEFT, same batches | PEFT elsewhere, one seed | trained | CPU s, graft / PEFT |"


def table(results: dict[str, Any]) -> str:
    """Markdown: a table for each task, a row for each method, mean and deviation over the seeds."""
    host = results["machine"]
    lines = [f"Machine: {host['cpu']}, {host['num_cores']} cores, torch {host['torch']}."]
    for task, units in UNITS.items():
        lines += ["", f"### {task}: {', '.join(units)}", ""]
        lines += [HEAD]
        lines += ["|---|---|---|---|---|---|"]
        for method in ("base", "random", *METHODS):
            ours, peers = (found_runs(results, task, method, by) for by in ("graft", "peft"))
            if ours or peers:
                told = " / ".join(f"{value:g}" for value in REFERENCE[task].get(method, []))
                seconds = " / ".join(cpu_seconds(runs) for runs in (ours, peers) if runs)
                trained = f"{ours[0]['num_trained']:,}" if ours and method != "base" else ""
                cells = [method, spread(ours, units), spread(peers, units), told]
                lines += [f"| {' | '.join([*cells, trained, seconds])} |"]
    return "\n".join(lines) + "\n"


def found_runs(results: dict[str, Any], task: str, method: str, by: str) -> list[dict[str, Any]]:
    split = {key: key.split("/") for key in results["runs"]}
    return [results["runs"][key] for key, (t, m, _, b) in split.items() if (t, m, b) == (task, method, by)]


def cpu_seconds(runs: list[dict[str, Any]]) -> str:
    """Of training; wall time would tell how busy the machine was."""
    known = [run["train_cpu_seconds"] for run in runs if "train_cpu_seconds" in run]
    return f"{statistics.mean(known):.0f}" if known else "-"


def spread(runs: list[dict[str, Any]], units: list[str]) -> str:
    told = []
    for unit in units if runs else []:
        values = [run[unit] for run in runs]
        digits = 1 if statistics.mean(values) > 10 else 3
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        told.append(f"{statistics.mean(values):.{digits}f}{deviation}")
    return " / ".join(told) + (f" (n={len(runs)})" if runs else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--methods", nargs="+", choices=["base", "random", *METHODS], default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peer", choices=["peft"], help="train with this instead of graft")
    parser.add_argument("--split", choices=["dev", "test"], default="test", help="dev for choosing settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="with other results"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    if (args.set or args.split == "dev") and args.results == RESULTS:
        parser.error("other settings need --results FILE of their own")
    os.chdir(ROOT)  # the examples' paths start there
    if not args.table:
        subprocess.run(
            [sys.executable, "examples/prepare.py", *args.tasks], check=True, stdout=subprocess.DEVNULL
        )
        campaign(args, dict(item.split("=", 1) for item in args.set))
    text = table(read_results(args.results))
    print(text)
    files.write_text(args.results.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
