"""Makes the built-in base from nothing: corpus, tokenizer, random weights, pretraining, package data.

python base/build.py prepare --work W --books B   corpus, tokenizer, W/initial
python base/build.py train   --work W             graft train base/pretrain*.yaml; again after a stop: goes on
python base/build.py install --work W             W/run2/model to src/graft/builtin, curve to base/
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import circuit
import corpus
import curve
import demo_task
import torch
from tokenizer import save_tokenizer, texts_of, train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
BUILTIN = HERE.parent / "src" / "graft" / "builtin"

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.0625,
}
"""4.0 million numbers; every matrix divides into blocks of 64."""

LEGS = {"pretrain.yaml": ("corpus.jsonl", "run"), "pretrain2.yaml": ("corpus2.jsonl", "run2")}
"""Configurations in their order, each going on from the one before: what they learn from, where they run."""
CORPORA: dict[str, dict[str, int]] = {
    "corpus.jsonl": {"book_copies": 1, "num_conversations": 56_000, "num_plain": 56_000},
    "corpus2.jsonl": {"book_copies": 1, "num_conversations": 60_000, "num_plain": 10_000, "stress": 3},
}
HELD_OUT_SIZES = {"book_copies": 0, "num_conversations": 400, "num_plain": 400}
TOKENIZER_SHARE = 8
"""One exercise in so many is shown to the tokenizer, so that most merges come from the books."""


def prepare(work: Path, books: Path, seed: int) -> None:
    """Write the corpus, held-out exercises, the tokenizer and the initial weights.

    Args:
        work: Directory to write into.
        books: Directory of the books' .txt files.
        seed: Decides the corpus and the weights.
    """
    work.mkdir(parents=True, exist_ok=True)
    rows, *_ = [
        corpus.write_corpus(books, work / name, seed=seed + 2 * number, **sizes)
        for number, (name, sizes) in enumerate(CORPORA.items())
    ]
    corpus.write_corpus(books, work / "held_out.jsonl", seed=seed + 1, **HELD_OUT_SIZES)
    passages = [row for row in rows if "text" in row]
    exercises = [row for row in rows if "text" not in row][::TOKENIZER_SHARE]
    tokenizer = train_tokenizer(
        texts_of(passages + exercises),
        vocab_size=SHAPE["vocab_size"],
        max_length=SHAPE["max_position_embeddings"],
    )
    save_tokenizer(tokenizer, work / "initial")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **ids))
    circuit.write_induction_circuit(model, seed)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(work / "initial")
    sys.stdout.write(f"{len(rows):,} rows, {model.num_parameters():,} parameters\n")


def train(work: Path) -> None:
    """Pretrain with graft, leg by leg, or go on with a stopped run."""
    start = work / "initial"
    for config, (rows, name) in LEGS.items():
        if not (work / name / "model").exists():
            _graft_train(HERE / config, start, work / rows, work / name)
        start = work / name / "model"


def _graft_train(config: Path, start: Path, rows: Path, run: Path) -> None:
    places = {
        "model.name": start,
        "data.train": rows,
        "data.eval": rows.with_name("held_out.jsonl"),
        "output": run,
    }
    arguments = [
        str(config),
        *(part for name, path in places.items() for part in ("--set", f"{name}={path}")),
    ]
    if (run / "run.json").exists():
        arguments = ["--resume", str(run)]
    subprocess.run([sys.executable, "-m", "graft.cli.main", "train", *arguments], check=True)


def install(work: Path) -> None:
    """Write the trained weights as bfloat16 package data, and the metrics and their curve."""
    # Imported on use: prepare needs no graft.
    from graft.models.load import load
    from graft.models.save import save_model

    runs = [work / name for _, name in LEGS.values() if (work / name / "model").exists()]
    base = load(runs[-1] / "model")
    shutil.rmtree(BUILTIN / "base", ignore_errors=True)
    save_model(base.model, base.tokenizer, BUILTIN / "base", dtype=torch.bfloat16)
    demo_task.write(BUILTIN / "tasks" / "demo")
    kept = curve.joined(
        [
            [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for run in runs
        ]
    )
    (HERE / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8"
    )
    (HERE / "curve.svg").write_text(curve.draw(kept), encoding="utf-8")


def main() -> None:
    """Run one of the three parts, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=("prepare", "train", "install", "all"))
    parser.add_argument("--work", type=Path, required=True, help="working directory, outside the repository")
    parser.add_argument("--books", type=Path, default=HERE.parent.parent / "shared" / "datasets" / "books")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args()
    if values.part in ("prepare", "all"):
        prepare(values.work, values.books, values.seed)
    if values.part in ("train", "all"):
        train(values.work)
    if values.part in ("install", "all"):
        install(values.work)


if __name__ == "__main__":
    main()
