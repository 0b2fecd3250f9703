"""AdaLoRA (arXiv:2303.10512) as a method: its settings, its budget, how a layer is built. Imports no torch.

W + scaling * P diag(E) Q, with P = lora_B (out, rank), E = lora_E (rank, 1) and Q = lora_A (rank, in). P and
Q are held near orthonormal by a penalty, so that E are about the singular values of the update. While the run
goes on the least important triplets of all layers together lose their E: rank goes where it is worth most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graft.adapters.patterns import first_match
from graft.adapters.settings import (
    MAX_RANK,
    check_alpha,
    check_dropout,
    check_placement,
    check_rank,
    is_number,
    pair,
)
from graft.dialects import explained
from graft.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from graft.adapters.adalora_layer import AdaLoraLayer
    from graft.adapters.rank_allocator import RankAllocator
    from graft.models.layers import BaseLayer

RANK_OFFSET = 1e-5
"""Added to the rank that alpha is divided by, as the files of the authors' and PEFT's code mean it."""

INITIAL_SHARE, FINAL_SHARE = 10, 3
"""Without settings: the first 1/10 of a run keeps every rank, the last 3/10 train the ranks found."""


@dataclass(frozen=True)
class AdaLoraPlace:
    """The settings of one layer."""

    rank: int
    """Triplets of the layer."""
    scaling: float
    """The factor on P diag(E) Q; the same whatever rank a layer has."""
    dropout: float


@explained
@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """Which layers share a budget of ranks, how large it is at first and in the end."""

    SHORTHAND = "method"

    method: Literal["adalora"] = "adalora"
    """The adapter method."""
    rank: int = 12
    """Rank of every layer at the start (PEFT's init_r)."""
    target_rank: int = 8
    """Mean rank of the layers in the end; single layers have more or less, down to none."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank, with the rank at the start."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training."""
    initial_steps: int | None = None
    """Steps before the first rank is taken away; null takes a tenth of the run."""
    final_steps: int | None = None
    """Steps in which the ranks found stay; null takes three tenths of the run."""
    total_steps: int | None = None
    """Steps of the whole schedule; null takes those of the run."""
    allocation_interval: int = 10
    """Steps from one choice of ranks to the next."""
    beta1: float = 0.85
    """Decay of the smoothed sensitivity of each number."""
    beta2: float = 0.85
    """Decay of its smoothed uncertainty."""
    orthogonal_weight: float = 0.5
    """Weight of the penalty that holds P and Q near orthonormal, which is added to the loss."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear" (every linear but the output head), a list of names or path
    endings, or a regular expression for the whole path; embeddings are refused."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: heads, embeddings, norms."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks at the start for some layers, each "regex=rank", at most `rank`: those that an earlier run
    found."""
    save_as: Literal["adalora", "lora"] = "adalora"
    """What files hold: AdaLoRA as PEFT has it, or plain LoRA of the ranks found, for tools that know only
    that; the function is the same."""

    def __post_init__(self) -> None:
        check_rank(self.rank, "adapter.rank")
        check_rank(self.target_rank, "adapter.target_rank")
        check_alpha(self.alpha, "adapter.alpha")
        check_dropout(self.dropout)
        if self.target_rank > self.rank:
            raise ConfigError(
                f"target_rank {self.target_rank} is above rank {self.rank}: ranks are only taken away",
                where="adapter.target_rank",
                fix="half to two thirds of rank is usual",
            )
        for item in self.rank_pattern:
            rank = pair(item, "adapter.rank_pattern")[1]
            if rank != int(rank) or not 0 <= rank <= min(self.rank, MAX_RANK):
                raise ConfigError(
                    f"{item!r} is not a whole rank from 0 to {self.rank}",
                    where="adapter.rank_pattern",
                    fix="no layer starts with more than adapter.rank",
                )
        self._check_numbers()
        check_placement(self)

    def _check_numbers(self) -> None:
        for name, least in (("initial_steps", 0), ("final_steps", 0), ("total_steps", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value != int(value) or value < least):
                _refuse(name, value, f"a whole number from {least}, or left out")
        if isinstance(self.allocation_interval, bool) or self.allocation_interval < 1:
            _refuse("allocation_interval", self.allocation_interval, "a whole number from 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                _refuse(name, value, "between 0 and 1")
        if not is_number(self.orthogonal_weight) or self.orthogonal_weight < 0:
            _refuse("orthogonal_weight", self.orthogonal_weight, "a number from 0")

    def at(self, path: str) -> AdaLoraPlace:
        """The settings of one layer.

        Args:
            path: Dotted path of the layer in the model.
        """
        rank = self.rank
        for item in first_match(self.rank_pattern, path):
            rank = int(pair(item, "adapter.rank_pattern")[1])
        return AdaLoraPlace(rank, self.alpha / (self.rank + RANK_OFFSET), self.dropout)


def _refuse(name: str, value: object, wanted: str) -> None:
    raise ConfigError(f"{name} {value!r} is out of range", where=f"adapter.{name}", fix=f"{wanted}")


@dataclass(frozen=True)
class BudgetSchedule:
    """How many ranks all layers together may have after each step (section 3.3 of the paper)."""

    first: int
    """At the start."""
    target: int
    """In the end."""
    initial_steps: int
    """Steps with all of the first."""
    final_steps: int
    """Steps at the end, in which nothing is chosen any more."""
    total_steps: int
    interval: int
    """Steps from one choice to the next."""

    @classmethod
    def of(cls, config: AdaLoraConfig, ranks: Mapping[str, int], num_steps: int) -> BudgetSchedule:
        """The schedule of a run.

        Args:
            config: The settings.
            ranks: Of each layer at the start.
            num_steps: Optimizer steps of the run.

        Raises:
            ConfigError: No step is left to take ranks away in.
        """
        total = config.total_steps or num_steps
        initial = total // INITIAL_SHARE if config.initial_steps is None else config.initial_steps
        final = total * FINAL_SHARE // INITIAL_SHARE if config.final_steps is None else config.final_steps
        if initial + final >= total:
            raise ConfigError(
                f"of {total} steps the first {initial} and the last {final} leave every rank as it is: none "
                "is left to take ranks away in",
                where="adapter.initial_steps",
                fix="lower adapter.initial_steps or adapter.final_steps, or train for longer",
            )
        first = sum(ranks.values())
        target = min(first, config.target_rank * len(ranks))
        return cls(first, target, initial, final, total, config.allocation_interval)

    @property
    def last_choice(self) -> int:
        """The step after which ranks are chosen for the last time."""
        return self.total_steps - self.final_steps

    def budget(self, step: int) -> int:
        """Ranks after a step: all at first, then falling with the cube of what is left of the time."""
        if step <= self.initial_steps:
            return self.first
        left = max(0.0, 1 - (step - self.initial_steps) / (self.last_choice - self.initial_steps))
        return int((self.first - self.target) * left**3 + self.target)

    def is_due(self, step: int) -> bool:
        """Whether ranks are chosen after a step."""
        falling = self.initial_steps < step < self.last_choice
        return step == self.last_choice or (falling and step % self.interval == 0)


class AdaLoraMethod:
    """AdaLoRA behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "adalora"
    config_class = AdaLoraConfig
    kinds = ("linear", "conv1d")

    def tensor_shapes(self, base: BaseLayer, config: AdaLoraPlace) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds."""
        rank = config.rank
        return {
            "lora_A": (rank, base.in_features),
            "lora_B": (base.out_features, rank),
            "lora_E": (rank, 1),
        }

    def build_layer(
        self, base: BaseLayer, config: AdaLoraPlace, generator: torch.Generator | None
    ) -> AdaLoraLayer:
        """Make the layer module; without a generator its tensors are left to be filled from a file."""
        from graft.adapters.adalora_layer import AdaLoraLayer

        layer = AdaLoraLayer(base.in_features, base.out_features, config.rank, config.scaling, config.dropout)
        if generator is not None:
            layer.fill(generator)
        return layer

    def steer(
        self, layers: Mapping[str, AdaLoraLayer], config: AdaLoraConfig, num_steps: int, *, settled: bool
    ) -> RankAllocator:
        """What chooses the ranks while a run goes on; see `graft.adapters.base.Steering`."""
        from graft.adapters.rank_allocator import RankAllocator

        ranks = {path: len(layer.lora_E) for path, layer in layers.items()}
        return RankAllocator(layers, config, BudgetSchedule.of(config, ranks, num_steps), settled=settled)

    def stored(
        self, layers: Mapping[str, AdaLoraLayer], config: AdaLoraConfig
    ) -> tuple[Any, dict[str, dict[str, Tensor]]]:
        """What files hold: only the ranks that are left, as AdaLoRA or as LoRA.

        Args:
            layers: By path.
            config: Their settings.

        Returns:
            The settings to be written, and the tensors of each layer by their names.
        """
        from graft.adapters.adalora_layer import as_lora, found_ranks

        if config.save_as == "lora":
            return as_lora(layers, config)
        return found_ranks(layers, config)
