"""Every stream of random numbers that a training step can draw from, seeded, stored and put back.

torch draws dropout masks. Python's and numpy's global streams are drawn from by forward passes of a few
transformers models (phi4_multimodal, musicgen), so they belong to a run too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Start every stream from a seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def random_state() -> dict[str, Tensor]:
    """The state of every stream by name: torch, python, numpy, cuda:0 and so on, as tensors on the CPU."""
    version, words, gauss = random.getstate()
    keys, place, has_gauss, cached = _numpy_state()
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python normal": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss]),
        "numpy normal": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states = torch.cuda.get_rng_state_all()
        found |= {f"cuda:{number}": state for number, state in enumerate(states)}
    return found


def restore_random_state(stored: Mapping[str, Tensor]) -> None:
    """Put every stream back where `random_state` found it; devices that are not here are passed over.

    Raises:
        KeyError: A stream is missing.
    """
    torch.set_rng_state(stored["torch"])
    version, *words = stored["python"].tolist()
    normal = stored["python normal"].tolist()
    random.setstate((version, tuple(words), normal[0] if normal else None))
    *keys, place, has_gauss = stored["numpy"].tolist()
    cached = stored["numpy normal"].item()
    state = ("MT19937", numpy.array(keys, dtype=numpy.uint32), place, has_gauss, cached)
    numpy.random.set_state(state)
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{number}" in stored:
            torch.cuda.set_rng_state(stored[f"cuda:{number}"], number)


def _numpy_state() -> tuple[Any, int, int, float]:
    state: Any = numpy.random.get_state(legacy=True)
    return state[1:]
