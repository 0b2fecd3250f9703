"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two test workers share two cores; more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, data and tokenizers beside the project; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared models and data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tinystories(shared: Path) -> Path:
    """A real pretrained Llama of 656K parameters."""
    return shared / "models" / "tinystories-656k"
