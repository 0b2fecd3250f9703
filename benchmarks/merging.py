"""What is left of a QLoRA adapter in each way of merging it, and the memory that merging takes.

    OMP_NUM_THREADS=1 python benchmarks/merging.py      # what the results have not yet; a few minutes
    python benchmarks/merging.py --small                # few steps, one model, writes nothing
    python benchmarks/merging.py --table                # no measuring, only the pages

Adapters of rank 16 over all linears of NF4 bases are trained on nine tenths of a book, for a few steps and
for many; every candidate of graft.merge is then compared with the live model on the last tenth. Loss is that
of the written directory, or of the live model, on the same rows. Memory is what a fresh process holds at most
(its own, not pages of files) beyond what it held before the call, for a model with random weights in shards
of 32 MiB; PEFT's merge_and_unload and save_pretrained of the same adapter beside it. Writes
results/merging.json and .md and the tables of docs/merging.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

import graft
from graft import files
from graft.adapters.merge import merge
from graft.adapters.merge_base import open_base
from graft.adapters.merged_files import write_merged
from graft.data.config import DataConfig
from graft.data.loader import Loader
from graft.data.prepare import prepare
from graft.evaluate.loss import evaluate_loss

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results" / "merging.json"
PAGE = ROOT / "docs" / "merging.md"
BEGIN, END = "<!-- written by benchmarks/merging.py -->", "<!-- end -->"
MIB = 2**20

MODELS = {
    "builtin": "builtin",
    "tinystories-656k": str(SHARED / "models" / "tinystories-656k"),
}
BOOK = SHARED / "datasets" / "tinyshakespeare" / "input.txt"
LENGTHS = {"10 steps": 10, "60 steps": 60}
SETTINGS = {"batch_size": 4, "learning_rate": 1e-3, "seed": 0}
ROW = 128
"""Tokens of a row of training."""

CODES = ("nf4", "int8")
SHARD_BYTES = 32 * MIB


def split(directory: Path, num_characters: int = 16_000) -> tuple[Path, Path]:
    """Nine tenths of the book to train on, and the beginning of the rest."""
    text = BOOK.read_text(encoding="utf-8")
    cut = text.rindex("\n\n", 0, len(text) * 9 // 10)
    made = directory / "train.txt", directory / "held-out.txt"
    for path, part in zip(made, (text[:cut], text[cut:][:num_characters]), strict=True):
        path.write_text(part, encoding="utf-8")
    return made


def loss_of(base: Any, data: Path) -> float:
    """Nats a token."""
    rows = prepare(str(data), base.tokenizer, DataConfig(max_length=ROW, packing=False), "eval").samples[:32]
    return evaluate_loss(base.model, Loader(rows, 8, ROW, packing=False, shuffle=False).epoch(0)).loss


def measure(
    model: str, num_steps: int, steps: str, train: Path, held_out: Path, work: Path
) -> list[dict[str, Any]]:
    """Train an adapter; a row for the base and for each candidate, in 4 and in 8 bits."""
    base = graft.load(MODELS[model], quantization="nf4")
    plain = loss_of(base, held_out)
    graft.attach(base.model, graft.LoraConfig(rank=16, alpha=32))
    run = graft.train(
        base,
        data=str(train),
        data_config=DataConfig(max_length=ROW),
        output=str(work / "run"),
        max_steps=num_steps,
        **SETTINGS,
    )
    live = graft.load(MODELS[model], quantization="nf4")
    graft.load_adapter(live.model, run.adapter)
    facts = {"model": model, "adapter": steps}
    same = {"kl": 0.0, "flips": 0.0, "survival": 1.0}
    rows = [{**facts, "written as": "(live model)", **same, "loss": loss_of(live, held_out)}]
    for codes in CODES:
        how: dict[str, Any] = {"into": "requantized", "quantization": codes, "allow_no_op": True}
        report = merge(run.adapter, work / codes, data=held_out, **how)
        losses = written_losses(run.adapter, codes, held_out, work)
        if codes == CODES[0]:
            effect = {"kl": report.adapter_kl, "flips": report.adapter_flips, "survival": 0.0, "loss": plain}
            rows.append({**facts, "written as": "(base alone)", **effect})
        for item in report.candidates:
            if codes == CODES[0] or item.name.startswith("requantized"):
                figures = {name: getattr(item, name) for name in ("kl", "flips", "survival", "error")}
                size = {"mib": item.num_bytes / MIB}
                told = {"written as": f"{item.name}, {item.stored_as}", "loss": losses[item.name]}
                rows.append({**facts, **told, **size, **figures})
    return rows


def written_losses(adapter: Path, codes: str, held_out: Path, work: Path) -> dict[str, float]:
    """Nats a token of each candidate, written and loaded."""
    found = open_base(adapter, None, None, force_base=False, scratch=work / "none")
    losses = {}
    for form in found.forms("requantized", codes):
        out = work / f"{codes}-{form.name}"
        write_merged(found.weights, form, out, found.tokenizer, found.dtype)
        losses[form.name] = loss_of(graft.load(out), held_out)
    return losses


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | adapter | written as | MiB | KL | flips | survival | error | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{row['mib']:.1f}" if "mib" in row else ""
        error = f"{row['error']:.2f}" if "error" in row else ""
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else ""
        figures = f"{row['kl']:.2g} | {row['flips']:.1%} | {row['survival']:.1%} | {error} | {loss}"
        lines.append(f"| {row['model']} | {row['adapter']} | {row['written as']} | {size} | {figures} |")
    return "\n".join(lines) + "\n"


SHAPES: dict[str, dict[str, int]] = {
    "600 MiB": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 8192},
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 8192},
}


def make_model(directory: Path, shape: str, shard_bytes: int) -> None:
    """Random bfloat16 weights with the tokenizer of the built-in base, and a QLoRA adapter beside them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from graft.adapters.attached import trained_tensors
    from graft.models.save import save_model

    sizes = {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model("qwen2", max_position_embeddings=4096, **SHAPES[shape], **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = graft.load("builtin").tokenizer
    save_model(model, tokenizer, directory / "base", max_shard_bytes=shard_bytes)
    del model
    base = graft.load(directory / "base", quantization="nf4")
    graft.attach(base.model, graft.LoraConfig(rank=16))
    with torch.no_grad():
        for tensor in trained_tensors(base.model).values():
            tensor.add_(0.01 * torch.randn(tensor.shape))
    graft.save_adapter(base.model, directory / "adapter")


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def merged_by(case: str, directory: Path) -> None:
    """Merge the adapter in a directory into the base beside it."""
    out = directory / case.replace(" ", "-")
    shards: dict[str, Any] = {"max_shard_bytes": SHARD_BYTES}
    if case == "graft, all":
        (directory / "text.txt").write_text("Once upon a time there was a king. " * 8, encoding="utf-8")
        merge(directory / "adapter", out, data=directory / "text.txt", **shards)
    elif case == "graft, write":
        found = open_base(directory / "adapter", None, None, force_base=False, scratch=directory / "none")
        form = next(form for form in found.forms("dequantized", None) if form.name == "dequantized")
        write_merged(found.weights, form, out, found.tokenizer, found.dtype, **shards)
    else:
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(base, directory / "adapter").merge_and_unload()
        model.save_pretrained(out, max_shard_size=SHARD_BYTES)


def peak(case: str, directory: Path) -> float:
    """MiB beyond what was held before, in this process; a small merge has imported everything.

    Counted is memory of its own: pages of files, libraries among them, come and go with what others do.
    """
    merged_by(case, directory / "warm")
    before, most, done = _status_mib("RssAnon"), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _status_mib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    merged_by(case, directory / "measured")
    done.set()
    watcher.join()
    return most - before


CASES = ("graft, write", "graft, all", "peft")


def memory(shape: str, shard_bytes: int, cases: tuple[str, ...] = CASES) -> dict[str, Any]:
    """Peaks in fresh processes."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_model(directory / "warm", "small", MIB)
        make_model(directory / "measured", shape, shard_bytes)
        shards = [path.stat().st_size for path in (directory / "measured" / "base").glob("*.safetensors")]
        found: dict[str, float] = {}
        for case in cases:
            command = [sys.executable, "-W", "ignore", __file__, "--case", case, "--directory", temporary]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(f"{case}: {done.stderr[-2000:]}")
            found[case] = float(done.stdout.splitlines()[-1])
        return {
            "model_mib": sum(shards) / MIB,
            "num_shards": len(shards),
            "largest_shard_mib": max(shards) / MIB,
            "peak_mib": found,
        }


def told(found: dict[str, Any]) -> str:
    names = {
        "graft, write": "graft, folding and writing alone",
        "graft, all": "graft, with every candidate measured on a short text",
        "peft": "PEFT, merge_and_unload and save_pretrained",
    }
    lines = [
        f"A model of {found['model_mib']:.0f} MiB in {found['num_shards']} shards, the largest of "
        f"{found['largest_shard_mib']:.0f} MiB:",
        "",
        "| | peak, MiB | of the model |",
        "|---|---|---|",
    ]
    for case, value in found["peak_mib"].items():
        lines.append(f"| {names[case]} | {value:.0f} | {value / found['model_mib']:.0%} |")
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any]) -> None:
    """The results and the tables, here and in the page on merging."""
    files.write_json(RESULTS, record)
    shown = f"{table(record['rows'])}\n{told(record['memory'])}"
    files.write_text(RESULTS.with_suffix(".md"), f"# Merging\n\n{record['text']}\n\n{shown}")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    files.write_text(PAGE, f"{head}{BEGIN}\n{shown}{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few steps of one model; writes nothing")
    parser.add_argument("--table", action="store_true", help="write the pages from what is there")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(peak(given.case, given.directory))
        return
    if given.table:
        write(files.read_json(RESULTS))
        return
    if given.small:
        print(table(one("builtin", "10 steps", small=True)), told(memory("small", MIB, CASES[:1])), sep="\n")
        return
    text = "KL and flips against the live model on held-out text, in float32; loss in nats a token."
    record: dict[str, Any] = {"text": text, "machine": f"torch {torch.__version__}, {platform.machine()}"}
    known = files.read_json(RESULTS) if RESULTS.exists() else {}
    record |= {"memory": known.get("memory") or memory("600 MiB", SHARD_BYTES), "rows": known.get("rows", [])}
    write(record)
    for model in MODELS:
        for steps in LENGTHS:
            if not any((row["model"], row["adapter"]) == (model, steps) for row in record["rows"]):
                record["rows"] += one(model, steps)
                write(record)
    print(table(record["rows"]), told(record["memory"]), sep="\n")


def one(model: str, steps: str, *, small: bool = False) -> list[dict[str, Any]]:
    """The rows of one adapter."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        train, held_out = split(work, 2_000) if small else split(work)
        return measure(model, 2 if small else LENGTHS[steps], steps, train, held_out, work)


if __name__ == "__main__":
    main()
