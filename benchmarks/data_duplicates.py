"""Duplicates among a million short rows: seconds, memory, recall and precision, beside datasketch and rensa.

    python benchmarks/data_duplicates.py            # results/data_duplicates.json
    python benchmarks/data_duplicates.py --rows 100000 --sample 5000

Rows are instructions with answers of 20 to 60 words, put together from stretches of the texts of
../shared/datasets/instruct; 5 % repeat an earlier row, 5 % do so with one or two words changed. Each kind
runs in a process of its own over rows that are made as they are read, as in training; the time of making
them is measured alone and taken off. Recall and precision are those of pairs: brute-force Jaccard similarity
of a sample, found through an inverted index of all shingles. The peers get the same shingles of the same
sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from graft.data.examples import Pair, Text
from graft.data.filters.duplicates import BATCH, Duplicates
from graft.data.filters.words import PASSED_OVER

RESULTS = Path(__file__).parent / "results"
TEXTS = Path(__file__).resolve().parents[2] / "shared" / "datasets" / "instruct" / "alpaca_en_demo.json"
THRESHOLD = 0.8
WORD = re.compile(rf"[^\W_]+|[^\w\s{re.escape(''.join(PASSED_OVER))}]|_")
"""Runs of letters and digits; any sign that is no punctuation of sentences."""


def vocabulary(texts: Path) -> list[str]:
    """The words of the instructions and answers, in their order."""
    rows = json.loads(texts.read_text())
    return " ".join(f"{row['instruction']} {row['output']}" for row in rows).split()


def rows(words: list[str], count: int, seed: int = 0) -> Iterator[list[str]]:
    """Rows as words; a repeat is of one of the last 20,000 that were kept back."""
    chance = random.Random(seed)
    earlier: list[list[str]] = []
    for _ in range(count):
        draw = chance.random()
        if earlier and draw < 0.10:
            row = list(chance.choice(earlier))
            if draw < 0.05:
                for _ in range(chance.randint(1, 2)):
                    row[chance.randrange(len(row))] = chance.choice(words)
        else:
            row, size = [], chance.randint(20, 60)
            while len(row) < size:
                begin = chance.randrange(len(words) - 8)
                row += words[begin : begin + chance.randint(2, 8)]
            row = row[:size]
            if len(earlier) < 20_000:
                earlier.append(row)
            else:
                earlier[chance.randrange(20_000)] = row
        yield row


def examples(words: list[str], count: int) -> Iterator[Pair]:
    """The same as prompt and completion."""
    for line, row in enumerate(rows(words, count), 1):
        yield Pair(" ".join(row[: len(row) // 3]), " ".join(row[len(row) // 3 :]), f"rows.jsonl:{line}")


def measure(kind: str, count: int, texts: Path) -> dict[str, float]:
    """One kind in this process; "none" only makes the rows."""
    words = vocabulary(texts)
    stream = examples(words, count)
    duplicates = None if kind == "none" else Duplicates(kind, THRESHOLD)  # type: ignore[arg-type]
    start, processor = time.perf_counter(), time.process_time()
    while batch := list(islice(stream, BATCH)):
        if duplicates is not None:
            duplicates.find_all(batch)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "num_exact": duplicates.num_exact if duplicates else 0,
        "num_near": duplicates.num_near if duplicates else 0,
        "num_contradictions": duplicates.num_contradictions if duplicates else 0,
    }


def in_fresh_process(kind: str, count: int, texts: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--kind", kind, "--rows", str(count), "--texts", str(texts)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def shingles(text: str) -> set[str]:
    """Word 3-grams by Python's own means."""
    found = WORD.findall(text.lower())
    return {" ".join(found[at : at + 3]) for at in range(max(1, len(found) - 2))}


def true_repeats(sets: list[set[str]]) -> list[bool]:
    """Whether each row is like one that stays before it, by the Jaccard similarity itself."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    repeats = []
    for row, one in enumerate(sets):
        shared: Counter[int] = Counter()
        for shingle in one:
            shared.update(rows_of[shingle])
        found = any(
            both / (len(one) + len(sets[other]) - both) >= THRESHOLD for other, both in shared.items()
        )
        repeats.append(found)
        if not found:
            for shingle in one:
                rows_of[shingle].append(row)
    return repeats


def by_graft(texts: list[str], _: list[set[str]]) -> list[bool]:
    duplicates = Duplicates("near", THRESHOLD)
    return [bool(found) for found in duplicates.find_all([Text(t, f"t:{i}") for i, t in enumerate(texts)])]


def by_datasketch(_: list[str], sets: list[set[str]]) -> list[bool]:
    """MinHash and MinHashLSH, candidates taken as they are: text-dedup's way."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    repeats = []
    for row, one in enumerate(sets):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in one])
        repeats.append(bool(index.query(sketch)))
        if not repeats[-1]:
            index.insert(str(row), sketch)
    return repeats


def by_rensa(_: list[str], sets: list[set[str]]) -> list[bool]:
    """RMinHashDeduplicator, which compares candidates by their signatures."""
    from rensa import RMinHashDeduplicator

    index = RMinHashDeduplicator(THRESHOLD, 128, use_lsh=True)
    return [not kept for kept in index.add_pairs((str(row), list(one)) for row, one in enumerate(sets))]


def compare(words: list[str], count: int) -> dict[str, dict[str, float]]:
    """Recall and precision of graft and the peers on a sample; seconds for 100,000 rows, shingles not
    counted for peers."""
    texts = [" ".join(row) for row in rows(words, count, seed=1)]
    sets = [shingles(text) for text in texts]
    truth = true_repeats(sets)
    ways: dict[str, Callable[[list[str], list[set[str]]], list[bool]]] = {"graft": by_graft}
    ways |= {
        name: way for name, way in (("datasketch", by_datasketch), ("rensa", by_rensa)) if find_spec(name)
    }
    by_graft(texts[:100], [])  # tables are made once
    figures = {}
    for name, way in ways.items():
        start = time.perf_counter()
        found = way(texts, sets)
        seconds = time.perf_counter() - start
        hits = sum(a and b for a, b in zip(truth, found, strict=True))
        figures[name] = {
            "seconds_per_100k_rows": seconds * 100_000 / count,
            "recall": hits / sum(truth),
            "precision": hits / max(1, sum(found)),
            "found": sum(found),
            "true": sum(truth),
        }
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=20_000)
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--kind", choices=("none", "exact", "near"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.kind:
        print(json.dumps(measure(given.kind, given.rows, given.texts)))
        return
    figures = {kind: in_fresh_process(kind, given.rows, given.texts) for kind in ("none", "exact", "near")}
    for kind in ("exact", "near"):
        for unit in ("seconds", "processor_seconds"):
            figures[kind][f"own_{unit}"] = figures[kind][unit] - figures["none"][unit]
        print(f"{kind:6}", {name: round(value, 1) for name, value in figures[kind].items()})
    sample = compare(vocabulary(given.texts), given.sample)
    for name, row in sample.items():
        print(f"{name:10}", {key: round(value, 4) for key, value in row.items()})
    peers = {name: version(name) for name in sample if name != "graft"}
    found: dict[str, Any] = {
        "machine": f"{processor()}, {os.cpu_count()} cores, shared; one thread",
        "python": platform.python_version(),
        "peers": peers,
        "rows": given.rows,
        "threshold": THRESHOLD,
        "figures": figures,
        "sample_rows": given.sample,
        "sample": sample,
    }
    given.out.mkdir(exist_ok=True)
    (given.out / "data_duplicates.json").write_text(json.dumps(found, indent=2) + "\n")


def processor() -> str:
    """The processor by the name the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
