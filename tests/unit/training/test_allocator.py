"""The heap under tensors: its holes go back to the system, and only as often as is worth it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

from graft.training import allocator
from graft.training.allocator import MOST_IN_HEAP_BYTES, TidyKept, tensors_in_heap

PROGRAM = """
import json, sys, torch
from graft.training.allocator import give_back, tensors_in_heap
from graft.training.monitors import memory_bytes
torch.set_num_threads(1)
assert tensors_in_heap(below=int(sys.argv[1]))
before = memory_bytes()
kept = [torch.ones(1 << 20) for _ in range(60)]
full = memory_bytes()
del kept[1::2]  # holes between what stays
holed = memory_bytes()
give_back()
print(json.dumps([full - before, holed - before, memory_bytes() - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's heap")
@pytest.mark.parametrize("below", [1 << 20, MOST_IN_HEAP_BYTES])
def test_holes_are_given_back(below: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(below)], capture_output=True, text=True, check=True
    )
    full, holed, after = (size / 2**20 for size in json.loads(done.stdout))
    assert full == pytest.approx(240, abs=15)
    # In the heap holes hold memory until they are given back; pages of their own go at once.
    assert holed == pytest.approx(240 if below > 4 << 20 else 120, abs=15)
    assert after == pytest.approx(120, abs=15)


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_user_has_chosen_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    assert not tensors_in_heap(below=MOST_IN_HEAP_BYTES)


def test_as_often_as_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held, needed, given = [0], [0], []

    def give_back() -> None:
        given.append(held[0])
        held[0] = needed[0]

    monkeypatch.setattr(allocator, "give_back", give_back)
    monkeypatch.setattr(allocator, "memory_bytes", lambda: held[0])
    monkeypatch.setattr(allocator, "LOOK_BYTES", 800)
    store = TidyKept(stride_bytes=1000)

    def step(holds: int, needs: int) -> list[int]:
        """What was held each time that holes were given back, at two looks."""
        held[0], needed[0] = holds, needs
        before = len(given)
        for _ in range(2):
            handle = store.put(torch.zeros(100))  # 400 bytes
            store.get(handle)
        return given[before:]

    assert step(5000, 5000) == []  # the first look: up to 6000 from now on
    assert step(6000, 5000) == []
    assert step(6001, 5500) == [6001]  # up to 6500
    assert step(6500, 5500) == []
    assert step(6501, 4000) == [6501]  # it does not fall
    assert step(6499, 4000) == []
