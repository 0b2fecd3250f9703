"""The resident memory of preparing rows: it must not follow their number, in Python or outside of it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

NUM_ROWS, SETTLED = 40_000, 16_000
GROWTH = 20 << 20
"""Bytes from the 16,000th row to the 40,000th. Rows that are held take 1.5 KB each, a tokenizer that
remembers whole texts takes five and more."""

CHILD = """
import sys
from transformers import AutoTokenizer
from graft.data import store
from graft.data.config import DataConfig
from graft.data.prepare import prepare

class Listener:
    def __init__(self):
        self.seen = {}
    def say(self, text):
        pass
    def preparing(self, num_rows, num_tokens, share):
        lines = open("/proc/self/status").read().splitlines()
        (kilobytes,) = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
        self.seen[num_rows] = kilobytes << 10

store.SPILL_BYTES = 1 << 16
listener = Listener()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.eos_token = tokenizer.eos_token or "<|endoftext|>"
found = prepare(sys.argv[2], tokenizer, DataConfig(cache=False), listener=listener)
assert found.report.num_used == int(sys.argv[3])
settled = max(size for rows, size in listener.seen.items() if rows <= int(sys.argv[4]))
print(max(listener.seen.values()) - settled)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/tinystories-656k", "models/stories260k-hf"])
def test_resident_memory_does_not_follow_the_number_of_rows(name: str, shared: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [f"{draw.getrandbits(40):x}"[: draw.randrange(2, 9)] for _ in range(20_000)]
    data = tmp_path / "rows.jsonl"
    with data.open("w") as file:
        for number in range(NUM_ROWS):
            asked, answer = (" ".join(draw.choices(words, k=30)) for _ in range(2))
            file.write(json.dumps({"prompt": f"{asked} {number}?", "completion": answer}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, shared / name, data, str(NUM_ROWS), str(SETTLED)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < GROWTH
