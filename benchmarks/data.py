"""What it takes to get from rows to packed batches, beside the tokenizer alone and beside TRL.

    python benchmarks/data.py                 # rate and packing on messages; needs ../shared
    python benchmarks/data.py --bytes 2e9     # memory too: files of a tenth, a third and all of so many bytes
    python benchmarks/data.py --small         # few rows: only that it runs

Rate: conversations made of the data beside the project (instructions, sums with their reasoning, passages of
books; 14,000, each once, then again with a number in each) are read from a JSON lines file, rendered,
tokenized, masked, stored and packed. In each round the tokenizer alone
(`encode_batch` over texts that were rendered before) has its turn first, then graft, then TRL's way where trl
and datasets are installed (a chat template for each row, packing by best fit). Ratios are taken within each
round; their median is printed.

Memory: each size is a process of its own that prepares the file and goes through an epoch of batches.
Writes results/data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SHARED = Path(__file__).parents[2] / "shared"
RESULTS = Path(__file__).parent / "results" / "data.json"
LENGTH = 1024
BATCH = 2048
"""Texts that the tokenizer alone has at a time, as many as graft gives it."""
ENDS = "<|endoftext|>"


def tokenizer() -> Any:
    """GPT-2's tokenizer with ChatML's control tokens and Qwen's template."""
    from transformers import PreTrainedTokenizerFast

    found = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / "gpt2" / "tokenizer.json"), eos_token=ENDS, pad_token=ENDS
    )
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    templates = SHARED / "tokenizers" / "chat_templates"
    found.chat_template = (templates / "qwen2.5-instruct.jinja").read_text()
    return found


def conversations() -> list[tuple[str, str]]:
    """Questions and answers, in an order of their own that is always the same."""
    datasets = SHARED / "datasets"
    found = []
    for row in json.loads((datasets / "instruct" / "alpaca_en_demo.json").read_text()):
        asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        found.append((asked, row["output"]))
    for name in ("train", "test"):
        for line in (datasets / "gsm8k" / f"{name}.jsonl").open():
            row = json.loads(line)
            found.append((row["question"], row["answer"]))
    for path in sorted((datasets / "books").glob("*.txt")):
        parts = list(passages(path.read_text()))
        found += [
            (f"Continue this passage:\n\n{a}", b) for a, b in zip(parts[::2], parts[1::2], strict=False)
        ]
    random.Random(0).shuffle(found)
    return [(asked, answer) for asked, answer in found if answer.strip()]


def passages(text: str, size: int = 500) -> Iterator[str]:
    """Paragraphs, so many together that they have `size` characters."""
    part = ""
    for paragraph in re.split(r"\n\s*\n", text):
        part += paragraph.strip() + "\n\n"
        if len(part) > size:
            yield part.strip()
            part = ""


def write_rows(path: Path, *, num_rows: int = 0, num_bytes: float = 0) -> None:
    """Write messages until there are so many rows, or so many bytes."""
    rows = conversations()
    written = number = 0
    with open(path, "w") as file:
        while written < num_bytes or number < num_rows:
            asked, answer = rows[number % len(rows)]
            again = f" ({number})" if number >= len(rows) else ""
            messages = [{"role": "user", "content": asked + again}, {"role": "assistant", "content": answer}]
            written += file.write(json.dumps({"messages": messages}) + "\n")
            number += 1


def raw(texts: list[str], tokens: Any) -> int:
    count = 0
    for begin in range(0, len(texts), BATCH):
        batch = texts[begin : begin + BATCH]
        encodings = tokens.backend_tokenizer.encode_batch(batch, add_special_tokens=False)
        count += sum(len(encoding.ids) for encoding in encodings)
    return count


def ours(path: Path, tokens: Any) -> tuple[int, float]:
    from graft.data.config import DataConfig
    from graft.data.loader import Loader
    from graft.data.prepare import prepare

    found = prepare(str(path), tokens, DataConfig(max_length=LENGTH, cache=False))
    loader = Loader(found.samples, 8, LENGTH, packing=True)
    loader.num_batches()
    return found.report.num_tokens, loader.utilisation()


def theirs(path: Path, tokens: Any) -> tuple[int, float]:
    """What SFTTrainer does before it trains: a template and tokenizer for each row, then packing."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(path), split="train")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokens.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
        prompt = tokens.apply_chat_template(
            row["messages"][:-1], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        return {"input_ids": ids, "completion_mask": mask}

    encoded = rows.map(encode, remove_columns=rows.column_names, num_proc=os.cpu_count())
    count = sum(len(row) for row in encoded["input_ids"])
    packed = pack_dataset(encoded, LENGTH, strategy="bfd")
    return count, sum(len(row) for row in packed["input_ids"]) / (LENGTH * len(packed))


def theirs_apart(path: Path) -> tuple[int, float, float]:
    """The same in a process of its own, without its start: it leaves the tokenizer with one thread behind."""
    done = subprocess.run(
        [sys.executable, __file__, "--theirs", str(path)], check=True, capture_output=True, text=True
    )
    count, used, seconds = json.loads(done.stdout.splitlines()[-1])
    return count, used, seconds


def rate(num_rows: int, rounds: int) -> dict[str, Any]:
    tokens = tokenizer()
    with TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        write_rows(path, num_rows=num_rows)
        # Only the texts stay: half a million objects would be looked at by every collection of garbage.
        texts = [
            tokens.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in path.open()
        ]
        ways: dict[str, Callable[[], Any]] = {"tokenizer": lambda: (raw(texts, tokens), 0.0)}
        ways["graft"] = lambda: ours(path, tokens)
        if rounds > 1 and find_spec("trl") and find_spec("datasets"):
            ways["trl"] = lambda: theirs_apart(path)
        for way in list(ways)[:2]:
            ways[way]()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        used: dict[str, float] = {}
        for number in range(rounds):
            for name, way in ways.items():
                begun = time.perf_counter()
                count, used[name], *seconds = way()
                rates[name].append(count / (seconds or [time.perf_counter() - begun])[0])
            print(f"round {number + 1}: " + ", ".join(f"{n} {r[-1]:,.0f}" for n, r in rates.items()))
    median = {name: statistics.median(found) for name, found in rates.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates["graft"], rates[name], strict=True))
        for name in rates
        if name != "graft"
    }
    return {
        "num_rows": num_rows,
        "tokens_per_second": median,
        "graft_over": ratios,
        "utilisation": {name: share for name, share in used.items() if share},
    }


def measured(path: Path) -> None:
    """In a process of its own: prepare a file, go through an epoch, tell the memory."""
    from graft.data.config import DataConfig
    from graft.data.loader import Loader
    from graft.data.prepare import prepare
    from graft.training.monitors import memory_bytes

    tokens, config = tokenizer(), DataConfig(max_length=LENGTH, cache=str(path.parent / "kept"))
    small = path.parent / "small.jsonl"
    write_rows(small, num_rows=2_000)
    prepare(str(small), tokens, config)
    before = memory_bytes()
    begun = time.perf_counter()
    found = prepare(str(path), tokens, config)
    seconds, prepared = time.perf_counter() - begun, memory_bytes()
    loader = Loader(found.samples, 8, LENGTH, packing=True)
    count = sum(batch.num_tokens for batch in loader.epoch(0))
    assert count == found.report.num_tokens
    print(
        json.dumps(
            {
                "file_bytes": path.stat().st_size,
                "num_rows": found.report.num_rows,
                "num_tokens": count,
                "seconds": seconds,
                "before_bytes": before,
                "grown_by_preparing_bytes": prepared - before,
                "grown_by_an_epoch_bytes": memory_bytes() - before,
                "utilisation": loader.utilisation(),
            }
        )
    )


def memory(num_bytes: float) -> list[dict[str, Any]]:
    found = []
    for share in (0.1, 0.33, 1.0):
        with TemporaryDirectory(dir=Path.home()) as place:
            path = Path(place) / "rows.jsonl"
            write_rows(path, num_bytes=num_bytes * share)
            done = subprocess.run(
                [sys.executable, __file__, "--measured", str(path)],
                check=True,
                capture_output=True,
                text=True,
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]))
    return found


def machine() -> dict[str, Any]:
    import tokenizers

    with open("/proc/cpuinfo") as file:
        model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return {"processor": model, "cores": os.cpu_count(), "tokenizers": tokenizers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=float, default=0.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.theirs:
        tokens = tokenizer()
        begun = time.perf_counter()
        print(json.dumps([*theirs(values.theirs, tokens), time.perf_counter() - begun]))
        return
    if values.measured:
        measured(values.measured)
        return
    rows, rounds = (400, 1) if values.small else (values.rows, values.rounds)
    results = {"machine": machine(), "rate": rate(rows, rounds)}
    if values.bytes:
        results["memory"] = memory(values.bytes)
    print(json.dumps(results, indent=2))
    if not values.small:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
