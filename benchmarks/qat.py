"""Quality of a quantized fine-tuned model: LoRA quantized afterwards, beside quantization-aware training.

    OMP_NUM_THREADS=1 python benchmarks/qat.py   # results/qat.json, table of docs/methods/qat.md
    python benchmarks/qat.py --small             # few steps, one format, writes nothing
    python benchmarks/qat.py --table             # no training, only the page

A model of 656 thousand parameters learns nine tenths of a book. Each adapter is merged by graft.merge, LoRA's
directory quantized by graft.quantize, and the loss of it, loaded, is measured on the last tenth: a half of it
chooses the learning rate at which LoRA ships the better model in a format (seed 100), which both methods then
have; the other half is reported (seeds 0, 1 and 2).
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

import graft
from graft import files
from graft.adapters.merge import merge
from graft.data.config import DataConfig
from graft.data.loader import Loader
from graft.data.prepare import prepare
from graft.evaluate.loss import evaluate_loss

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models" / "tinystories-656k"
BOOK = SHARED / "datasets" / "tinyshakespeare" / "input.txt"
RESULTS = Path(__file__).resolve().parent / "results" / "qat.json"
PAGE = ROOT / "docs" / "methods" / "qat.md"
BEGIN, END = "<!-- written by benchmarks/qat.py -->", "<!-- end -->"

FORMS = ("nf4", "int4", "int3")
METHODS = ("lora", "qat")
RATES = (1e-3, 4e-3)
CHOOSING_SEED, SEEDS = 100, (0, 1, 2)
ADAPTER = {"rank": 16, "alpha": 32}
STEPS = 200


def parts_of_the_book(directory: Path, num_characters: int | None = None) -> dict[str, Path]:
    """Nine tenths of the book, or of its beginning, to train on, and the halves of the rest."""
    text = BOOK.read_text(encoding="utf-8")[:num_characters]
    cuts = [text.rindex("\n\n", 0, len(text) * share // 20) for share in (18, 19)]
    parts = {"train": text[: cuts[0]], "choose": text[cuts[0] : cuts[1]], "report": text[cuts[1] :]}
    for name, part in parts.items():
        (directory / f"{name}.txt").write_text(part, encoding="utf-8")
    return {name: directory / f"{name}.txt" for name in parts}


def loss_of(base: Any, data: Path) -> float:
    """Nats a token."""
    rows = prepare(str(data), base.tokenizer, DataConfig(max_length=256, packing=False), "eval").samples
    return evaluate_loss(base.model, Loader(rows, 16, 256, packing=False, shuffle=False).epoch(0)).loss


def train(method: str, form: str, rate: float, seed: int, steps: int, work: Path, data: Path) -> Path:
    """One run; returns the adapter."""
    base = graft.load(MODEL)
    config = graft.QatConfig(quant_type=form, **ADAPTER) if method == "qat" else graft.LoraConfig(**ADAPTER)
    graft.attach(base.model, config, seed=seed)
    run = graft.train(
        base,
        data=str(data),
        data_config=DataConfig(max_length=256),
        output=str(work / "run"),
        max_steps=steps,
        batch_size=8,
        learning_rate=rate,
        seed=seed,
    )
    assert run.adapter is not None
    return run.adapter


def losses(
    method: str,
    form: str,
    rate: float,
    seed: int,
    steps: int,
    forms: tuple[str, ...] = FORMS,
    num_characters: int | None = None,
) -> dict[str, dict[str, float]]:
    """Of a run: losses of what is shipped in each format, and of the live model; by part of the book."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = parts_of_the_book(work, num_characters)
        started = time.process_time()
        adapter = train(method, form, rate, seed, steps, work, data["train"])
        seconds = time.process_time() - started
        live = graft.load(MODEL)
        graft.load_adapter(live.model, adapter)
        models = {"live": live}
        if method == "lora":
            merge(adapter, work / "dense")
        for shipped in forms if method == "lora" else (form,):
            if method == "qat":
                merge(adapter, work / shipped)
            else:
                graft.quantize(work / "dense", shipped, work / shipped)
            models[shipped] = graft.load(work / shipped)
        for name, base in models.items():
            found[name] = {part: loss_of(base, data[part]) for part in ("choose", "report")}
    return {**found, "cost": {"train_cpu_seconds": round(seconds, 1)}}


def plain(forms: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Losses of the base, dense and quantized."""
    with tempfile.TemporaryDirectory() as name:
        data = parts_of_the_book(Path(name))
        return {
            form: {"report": loss_of(graft.load(MODEL, quantization=None if form == "dense" else form), path)}
            for form in ("dense", *forms)
            for path in (data["report"],)
        }


def key(method: str, form: str, rate: float, seed: int) -> str:
    """Of a run in the results; LoRA on a dense base serves all formats."""
    return f"{method}/{'all' if method == 'lora' else form}/{rate:g}/{seed}"


def campaign(path: Path) -> dict[str, Any]:
    """Make the runs that the results have not yet."""
    results: dict[str, Any] = files.read_json(path) if path.exists() else {"machine": machine(), "runs": {}}
    results.setdefault("base", plain(FORMS))

    def made(method: str, form: str, rate: float, seed: int) -> dict[str, dict[str, float]]:
        name = key(method, form, rate, seed)
        if name not in results["runs"]:
            results["runs"][name] = losses(method, form, rate, seed, STEPS)
            print(name, results["runs"][name], flush=True)
            files.write_json(path, results)
        run: dict[str, dict[str, float]] = results["runs"][name]
        return run

    for form in FORMS:
        tried = {rate: made("lora", form, rate, CHOOSING_SEED)[form]["choose"] for rate in RATES}
        rate = min(tried, key=lambda rate: tried[rate])
        for seed in SEEDS:
            for method in METHODS:
                made(method, form, rate, seed)
        results.setdefault("rates", {})[form] = rate
        files.write_json(path, results)
    return results


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    return {"cpu": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each format."""
    head = "| stored as | base | LoRA, quantized afterwards | QAT | QAT - LoRA, by seed |"
    lines = [head, "|---|---|---|---|---|"]
    for form in FORMS:
        if form not in results.get("rates", {}):
            continue
        runs = {method: _runs(results, method, form) for method in METHODS}
        apart = ", ".join(f"{b - a:+.4f}" for a, b in zip(runs["lora"], runs["qat"], strict=True))
        cells = [f"{results['base'][form]['report']:.3f}", *(_spread(runs[method]) for method in METHODS)]
        lines.append(f"| {form} | {' | '.join(cells)} | {apart} |")
    rate = results["rates"][FORMS[0]]
    live = [results["runs"][key("lora", "", rate, seed)]["live"]["report"] for seed in SEEDS]
    lines.append(f"| (dense) | {results['base']['dense']['report']:.3f} | {_spread(live)} | | |")
    return "\n".join(lines) + "\n"


def _runs(results: dict[str, Any], method: str, form: str) -> list[float]:
    rate = results["rates"][form]
    return [results["runs"][key(method, form, rate, seed)][form]["report"] for seed in SEEDS]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def main() -> None:
    """Run what is missing, write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few steps, one format, writes nothing")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.small:
        for method in METHODS:
            found = losses(method, "nf4", 1e-3, 0, 2, ("nf4",), 20_000)
            print(f"{method}, nf4: {found['nf4']['report']:.3f}")
        return
    results = files.read_json(args.results) if args.table else campaign(args.results)
    text = table(results)
    print(text)
    if args.results == RESULTS:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        files.write_text(PAGE, f"{before}{BEGIN}\n\n{text}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
