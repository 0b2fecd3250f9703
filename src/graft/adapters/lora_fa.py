"""LoRA-FA (arXiv:2308.03303) as a method: LoRA whose lora_A stays as it was drawn. Imports no torch.

W + scaling * B A with A frozen: the update stays in the row space of A, the backward pass needs A x, rank
numbers for each token, in place of x, and half of the optimizer's state goes. Files are LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graft.adapters.lora import LoraMethod
from graft.adapters.settings import LowRankSettings, check_low_rank, check_placement, check_start
from graft.dialects import explained

if TYPE_CHECKING:
    import torch

    from graft.adapters.conv_layer import LoraConv
    from graft.adapters.lora_layer import LoraLinear
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class LoraFaConfig(LowRankSettings):
    """Which layers get a low-rank update whose first factor is random and frozen."""

    SHORTHAND = "method"

    method: Literal["lora_fa"] = "lora_fa"
    """The adapter method."""
    rank: int = 8
    """Rows of lora_A and columns of lora_B."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training; its mask is kept for the backward pass."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear" (every linear but the output head), a list of names or path
    endings, or a regular expression for the whole path; embeddings are refused."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    init: Literal["kaiming", "gaussian", "eva"] = "kaiming"
    """What lora_A is: uniform within 1/sqrt(in_features) (kaiming), normal with deviation 1/rank (gaussian),
    or the directions of the layer's inputs (eva). lora_B starts at zero."""
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
        check_start(self, "kaiming", "gaussian", "eva")
        check_placement(self)


class LoraFaMethod:
    """LoRA-FA behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "lora_fa"
    config_class = LoraFaConfig
    kinds = ("linear", "conv1d", "conv2d")
    frozen_tensors = frozenset({"lora_A.weight"})

    def tensor_shapes(self, base: BaseLayer, config: LoraFaConfig) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds; lora_A does not train."""
        return LoraMethod().tensor_shapes(base, config)

    def build_layer(
        self, base: BaseLayer, config: LoraFaConfig, generator: torch.Generator | None
    ) -> LoraLinear | LoraConv:
        """Make the layer module; without a generator its tensors are left to be filled from a file."""
        from graft.adapters.conv_layer import LoraConv
        from graft.adapters.lora_layer import LoraLinear

        layer = LoraMethod().build_layer(base, config, generator)
        assert isinstance(layer, LoraLinear | LoraConv)
        layer.trains_A = False
        layer.lora_A.requires_grad_(False)
        return layer
