"""The figures of each step beside loss and gradient norm: groups of tensors, speed, memory, spectra."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.adapters.attached import adapter_tensors, adapters_of
from graft.data.loader import Batch
from graft.kernels.wide import is_wide
from graft.training.flops import ProductRate, StepCost, product_rate, step_cost
from graft.training.groups import Treatment
from graft.training.monitors import memory_bytes, peak_memory_bytes
from graft.training.recompute import every
from graft.training.spectra import Spectra

if TYPE_CHECKING:
    from graft.training.job import Job


class Figures:
    """Called by the loop at each step; `figures_of` makes it.

    Args:
        groups: Names of tensors by the group that is shown.
        rates: Learning rate of each group over that of the run.
        cost: Operations of a step.
        rate: What the machine does in products.
        spectra: Measures the adapter.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        rates: Mapping[str, float],
        cost: StepCost,
        rate: ProductRate,
        spectra: Spectra,
    ) -> None:
        self._groups, self._rates, self._cost = groups, rates, cost
        self.product_rate, self.spectra = rate, spectra

    def by_group(self, learning_rate: float, norms: Mapping[str, Tensor]) -> dict[str, Any]:
        """Learning rate and gradient norm of each group of tensors; nothing where there is one group only.

        Args:
            learning_rate: Of the run at this step.
            norms: Of each tensor's gradient; empty where the step is skipped before they are known.
        """
        if len(self._groups) < 2:
            return {}
        sums = [
            self._norm([norms[name] for name in names if name in norms]) for names in self._groups.values()
        ]
        found = torch.stack(sums).tolist() if norms else [math.nan] * len(sums)
        return {
            "groups": {
                group: {
                    "learning_rate": learning_rate * self._rates[group],
                    "grad_norm": norm if math.isfinite(norm) else None,
                }
                for group, norm in zip(self._groups, found, strict=True)
            }
        }

    @staticmethod
    def _norm(norms: list[Tensor]) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def timing(self, step: int, seconds: float, batches: Sequence[Batch]) -> dict[str, Any]:
        """The line of a step in timings.jsonl."""
        rate = self._cost.of(batches) / max(seconds, 1e-9)
        memory = memory_bytes()
        return {
            "step": step,
            "seconds": seconds,
            "num_tokens": sum(batch.num_tokens for batch in batches),
            "num_padded_tokens": sum(batch.input_ids.numel() for batch in batches),
            "memory_bytes": memory,
            "peak_memory_bytes": max(memory, peak_memory_bytes()),  # the system counts its peak now and then
            "flops_per_second": rate,
            "achieved": rate / self.product_rate.flops_per_second,
            "clock_seconds": time.time(),
        }


def figures_of(job: Job, treated: Mapping[str, Treatment], num_steps: int) -> Figures:
    """What is shown of a run.

    Args:
        job: Its objects.
        treated: How each trained tensor is treated.
        num_steps: Of the whole run.

    Raises:
        ConfigError: Spectra are asked for where there are none.

    Cost: 30 ms of products; for later see `Spectra`.
    """
    named = groups(treated)
    trained = {id(p) for p in job.parameters.values()}
    adapter = next(
        (
            found
            for name, found in adapters_of(job.model).items()
            if trained & {id(p) for p in adapter_tensors(job.model, name).values()}
        ),
        None,
    )
    model: Any = job.model
    batch = next(job.loader.epoch(0))
    device = next(iter(job.parameters.values())).device
    dtype = job.autocast or model.get_input_embeddings().weight.dtype
    if is_wide(dtype, device.type):
        dtype = torch.float32
    rate = product_rate(model, dtype, device, batch.input_ids.numel())
    return Figures(
        named,
        {group: treated[names[0]].rate for group, names in named.items()},
        step_cost(
            model,
            job.parameters,
            bool(every(job.config.gradient_checkpointing)),
            job.objective.base_passes if job.objective else 0,
            tiled=job.config.mlp_tile is not None,
        ),
        rate,
        Spectra(model, adapter, job.config.spectrum_steps, num_steps),
    )


def groups(treatments: Mapping[str, Treatment]) -> dict[str, list[str]]:
    """Names of tensors by the group that they are treated with, split where a group has several rates.

    Args:
        treatments: Of each trained tensor.
    """
    rates: dict[str, set[float]] = {}
    for treated in treatments.values():
        rates.setdefault(treated.group, set()).add(treated.rate)
    found: dict[str, list[str]] = {}
    for name, treated in treatments.items():
        several = len(rates[treated.group]) > 1
        label = f"{treated.group} at {treated.rate:g} of the rate" if several else treated.group
        found.setdefault(label, []).append(name)
    return found
