"""The same bits in every run: operations that have no deterministic form are refused by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graft.errors import TrainingError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS reads it when it is first used, and sums in a fixed order with this value."""


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only, and put its settings back afterwards.

    Args:
        on: Whether to do anything.

    Yields:
        Nothing.

    Raises:
        TrainingError: An operation has no deterministic form on this device; it is named.
        RuntimeError: Any other that what is done raises.
    """
    if not on:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warns, benchmark = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        _refuse(error)
        raise
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark


def _refuse(error: RuntimeError) -> None:
    if found := re.search(r"(\S+) does not have a deterministic implementation", str(error)):
        raise TrainingError(
            f"{found[1]} has no deterministic form on this device",
            where="training.deterministic",
            fix="leave training.deterministic out, or train a model that does without the operation",
        ) from error
    if WORKSPACE in str(error):
        raise TrainingError(
            "matrix products were made in this process before deterministic ones were asked for",
            where="training.deterministic",
            fix=f"start the program with {WORKSPACE}=:4096:8 in its environment",
        ) from error
