"""VeRA (arXiv:2310.11454) as a method: its settings, its tensors, how a layer is built. Imports no torch.

W + diag(b) B diag(d) A, where A (rank, in) and B (out, rank) are random, frozen and the same for all layers,
which take of them as many columns of A and rows of B as they have inputs and outputs; b and d train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graft.adapters.settings import SameEverywhere, check_dropout, check_placement, check_rank, is_number
from graft.dialects import explained
from graft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from graft.adapters.vera_layer import Projection, VeraLayer
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class VeraConfig(SameEverywhere):
    """Which layers get two trained vectors around a random pair of matrices that all of them share."""

    SHORTHAND = "method"

    method: Literal["vera"] = "vera"
    """The adapter method."""
    rank: int = 256
    """Rows of the shared A and columns of the shared B; a layer trains out_features + rank numbers."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training."""
    d_initial: float = 0.1
    """What all of d starts at; b starts at zero."""
    projection_seed: int = 0
    """Which random A and B: the same number, rank and largest layer give the same pair."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear" (every linear but the output head), a list of names or path
    endings, or a regular expression for the whole path; embeddings are refused."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: heads, embeddings, norms."""

    def __post_init__(self) -> None:
        check_rank(self.rank, "adapter.rank")
        check_dropout(self.dropout)
        if not is_number(self.d_initial) or not self.d_initial:
            raise ConfigError(
                f"d_initial {self.d_initial!r} is not a number other than zero",
                where="adapter.d_initial",
                fix="0.1 or less serves; at zero b would never get a gradient",
            )
        if isinstance(self.projection_seed, bool) or not 0 <= self.projection_seed < 2**63:
            raise ConfigError(
                f"projection_seed {self.projection_seed!r} is no seed",
                where="adapter.projection_seed",
                fix="a whole number from 0",
            )
        check_placement(self)


class VeraMethod:
    """VeRA behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "vera"
    config_class = VeraConfig
    kinds = ("linear", "conv1d")

    def tensor_shapes(self, base: BaseLayer, config: VeraConfig) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds."""
        return {"vera_lambda_b": (base.out_features,), "vera_lambda_d": (config.rank,)}

    def shared_shapes(self, bases: Sequence[BaseLayer], config: VeraConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the pair: as wide and as high as the largest layer.

        Args:
            bases: All layers of the adapter.
            config: Its settings.
        """
        widest = max(base.in_features for base in bases)
        highest = max(base.out_features for base in bases)
        return {"vera_A": (config.rank, widest), "vera_B": (highest, config.rank)}

    def build_shared(self, bases: Sequence[BaseLayer], config: VeraConfig) -> Projection:
        """Draw the pair."""
        from graft.adapters.vera_layer import Projection

        return Projection(*self.shared_shapes(bases, config).values(), seed=config.projection_seed)

    def build_layer(
        self, base: BaseLayer, config: VeraConfig, generator: torch.Generator | None
    ) -> VeraLayer:
        """Make the layer module; it draws nothing, and is given the pair afterwards."""
        from graft.adapters.vera_layer import VeraLayer

        return VeraLayer(base.in_features, base.out_features, config.rank, config.dropout, config.d_initial)
