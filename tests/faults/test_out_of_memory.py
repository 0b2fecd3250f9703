"""Memory that really runs out: a process under a limit splits its step and gets the same result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import json, resource, sys
import torch
from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.data.loader import Loader
from graft.data.masking import Sample
from graft.errors import TrainingError
from graft.models.load import load
from graft.runs import RunDirectory
from graft.training.config import TrainingConfig
from graft.training.job import Job
from graft.training.loop import Training
from graft.training.memory import prepared
from graft.training.monitors import Silent

directory, place, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
base = load(directory)
attach(base.model, LoraConfig(rank=4), seed=1)
ids = torch.randint(3, 250, (4, 512), generator=torch.Generator().manual_seed(0)).tolist()
loader = Loader([Sample(row, [-100, *row[1:]]) for row in ids], 4, 512, packing=False)
run = RunDirectory.create(place)
job = Job(base.model, adapter_tensors(base.model), loader, None, TrainingConfig(max_steps=2, audit="none"),
          1e-3, run, Silent())
if room:
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + room * 2**20,) * 2)
try:
    with prepared(job):
        position = Training(job).run()
    losses = [json.loads(line)["loss"] for line in run.metrics_path.read_text().splitlines()]
    print(json.dumps({"splits": position.splits, "losses": losses}))
except TrainingError as error:
    print(json.dumps({"refused": error.what}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space as Linux has them")
def test_a_limit_of_the_address_space(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    model = tiny_dir("llama", **sizes, max_position_embeddings=512)

    def run(room: int) -> dict[str, object]:
        words = [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / f"run{room}"), str(room)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return found

    free, tight, nothing = run(0), run(90), run(3)
    assert free["splits"] == []
    assert tight["splits"]
    assert tight["losses"] == pytest.approx(free["losses"], rel=1e-6)
    assert "a single row of 512 tokens does not fit" in str(nothing.get("refused"))
