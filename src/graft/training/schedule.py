"""Learning-rate schedules: plain functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math


def learning_rate_at(
    step: int, *, peak: float, num_steps: int, warmup_steps: int, shape: str, min_ratio: float = 0.0
) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: From 0 to num_steps - 1.
        peak: The highest learning rate.
        num_steps: Optimizer steps of the whole run.
        warmup_steps: Steps of linear rise; the first one already moves (1 / warmup_steps of the peak).
        shape: "cosine", "linear" or "constant" after the warm-up.
        min_ratio: Floor of cosine and linear, as a share of the peak.

    Returns:
        The learning rate; cosine and linear reach `min_ratio * peak` at the end of the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    share = (1 + math.cos(math.pi * progress)) / 2 if shape == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * share)
