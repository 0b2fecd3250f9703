"""DoRA (arXiv:2402.09353) as a method: its settings, its tensors, how a layer is built. Imports no torch.

W' = m (W + scaling * B A) / ||W + scaling * B A||, with one magnitude m and one norm for each row of W, that
is for each output. The norm is a constant in the backward pass (section 4.3 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graft.adapters.lora import LoraMethod
from graft.adapters.settings import RANDOM, LowRankSettings, check_low_rank, check_placement, check_start
from graft.dialects import explained

if TYPE_CHECKING:
    import torch

    from graft.adapters.dora_layer import DoraLayer
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class DoraConfig(LowRankSettings):
    """Which layers get a low-rank update of their directions and magnitudes of their own."""

    SHORTHAND = "method"

    method: Literal["dora"] = "dora"
    """The adapter method."""
    rank: int = 8
    """Rows of lora_A and columns of lora_B."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs set to zero in training, for what the adapter changes; costs a second product with
    the base weight."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear" (every linear but the output head), a list of names or path
    endings, or a regular expression for the whole path."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    init: Literal["kaiming", "gaussian", "orthogonal", "eva"] = "kaiming"
    """How the factors start. With B zero: A uniform within 1/sqrt(in_features) (kaiming), normal with
    deviation 1/rank (gaussian), or the directions of the layer's inputs (eva). Random with a product of zero
    (orthogonal). The magnitudes are the norms of the rows of W."""
    init_batches: int = 8
    """How many batches of the training data eva looks at."""
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

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_start(self, *RANDOM, "eva")
        check_placement(self)


class DoraMethod:
    """DoRA behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "dora"
    config_class = DoraConfig
    kinds = ("linear", "conv1d", "embedding", "conv2d")

    def tensor_shapes(self, base: BaseLayer, config: DoraConfig) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds."""
        pair = LoraMethod().tensor_shapes(base, config)
        width = base.out_features
        return {**pair, "lora_magnitude_vector": (1, width, 1, 1) if base.kind == "conv2d" else (width,)}

    def build_layer(
        self, base: BaseLayer, config: DoraConfig, generator: torch.Generator | None
    ) -> DoraLayer:
        """Make the layer module; without a generator its tensors are left to be filled from a file."""
        from graft.adapters.dora_layer import DoraLayer

        update: Any = LoraMethod().build_layer(base, config, generator)
        return DoraLayer(update, base, config.dropout)
