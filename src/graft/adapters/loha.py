"""LoHa (FedPara, arXiv:2108.06098) as a method: its settings, its tensors, how a layer is built. No torch.

W + scaling * (A1 B1) o (A2 B2), the product of two low-rank matrices number by number: rank up to rank^2 from
2 rank (in + out) numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graft.adapters.settings import LowRankSettings, check_low_rank, check_placement
from graft.dialects import explained

if TYPE_CHECKING:
    import torch

    from graft.adapters.loha_layer import LohaLayer
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class LohaConfig(LowRankSettings):
    """Which layers get the product, number by number, of two low-rank matrices."""

    SHORTHAND = "method"

    method: Literal["loha"] = "loha"
    """The adapter method."""
    rank: int = 8
    """Rank of each of the two; their product has up to its square."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
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
    """Other ranks for some layers, each "regex=rank"; matched with the end of the path, first one counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some layers, each "regex=alpha"."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_placement(self)


class LohaMethod:
    """LoHa behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "loha"
    config_class = LohaConfig
    kinds = ("linear", "conv1d", "conv2d")

    def tensor_shapes(self, base: BaseLayer, config: LohaConfig) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds."""
        a, b = (base.out_features, config.rank), (config.rank, base.in_features)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    def build_layer(
        self, base: BaseLayer, config: LohaConfig, generator: torch.Generator | None
    ) -> LohaLayer:
        """Make the layer module; without a generator its tensors are left to be filled from a file."""
        from graft.adapters.loha_layer import LohaLayer

        layer = LohaLayer(base.in_features, base.out_features, config.rank, config.scaling)
        if generator is not None:
            layer.fill(generator)
        return layer
