"""LoRA (arXiv:2106.09685) as a method: its settings, its tensors, how a layer is built. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from graft.adapters.settings import (
    DATA,
    ITERATED,
    RANDOM,
    LowRankSettings,
    check_low_rank,
    check_placement,
    check_start,
)
from graft.dialects import explained

if TYPE_CHECKING:
    import torch

    from graft.adapters.lora_layer import LoraEmbedding, LoraLinear
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class LoraConfig(LowRankSettings):
    """Which layers get a low-rank update W + scaling * B A, and how it starts."""

    SHORTHAND = "method"

    method: Literal["lora"] = "lora"
    """The adapter method."""
    rank: int = 8
    """Rows of lora_A and columns of lora_B."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training; embeddings have none."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear" (every linear but the output head), a list of names or path
    endings, or a regular expression for the whole path."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga"] = (
        "kaiming"
    )
    """How the factors start. With B zero: A uniform within 1/sqrt(in_features) (kaiming), normal with
    deviation 1/rank (gaussian), or the directions of the layer's inputs (eva). Random with a product of zero
    (orthogonal). From the weight: its largest singular triplets (pissa), its first columns (olora), what its
    rounding lost (loftq). Along the gradient of the whole weight (lora_ga). The base never changes."""
    init_iterations: int | None = None
    """For pissa, power iterations of a randomized SVD; null takes the exact one, which is slow. For loftq,
    rounds; null is one."""
    init_batches: int = 8
    """How many batches of the training data eva and lora_ga look at."""
    eva_rho: float = 2.0
    """With eva a layer may get so many times its rank, and others less or none; 1 leaves all as they are."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that large ranks are not damped (arXiv:2312.03732)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: heads, embeddings, norms."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some layers, each "regex=rank"; matched with the end of the path, first one counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some layers, each "regex=alpha"."""
    bias: Literal["none"] = "none"
    """Biases stay frozen."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_start(self, *RANDOM, *DATA, *ITERATED, "olora")
        check_placement(self)


class LowRank(Protocol):
    """What of its settings decides about a layer's pair of factors; DoRA's and LoRA-FA's have it too."""

    @property
    def rank(self) -> int:
        """Rows of lora_A and columns of lora_B."""

    @property
    def scaling(self) -> float:
        """The factor on B A."""

    @property
    def dropout(self) -> float:
        """Share of the adapter's inputs set to zero in training."""

    @property
    def init(self) -> str:
        """How both factors start."""


class LoraMethod:
    """LoRA behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "lora"
    config_class = LoraConfig

    def tensor_shapes(self, base: BaseLayer, config: LowRank) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds."""
        down, up = (config.rank, base.in_features), (base.out_features, config.rank)
        if base.kind == "embedding":
            return {"lora_embedding_A": down, "lora_embedding_B": up}
        return {"lora_A.weight": down, "lora_B.weight": up}

    def build_layer(
        self, base: BaseLayer, config: LowRank, generator: torch.Generator | None
    ) -> LoraLinear | LoraEmbedding:
        """Make the layer module; without a generator its tensors are left to be filled.

        Raises:
            ConfigError: Its start is made from data or from another weight than the base's.
        """
        from graft.adapters.initializers import fill_lora
        from graft.adapters.lora_layer import LoraEmbedding, LoraLinear

        kind = LoraEmbedding if base.kind == "embedding" else LoraLinear
        layer = kind(base.in_features, base.out_features, config.rank, config.scaling, config.dropout)
        if generator is not None:
            fill_lora(layer, base, config, generator)
        return layer
