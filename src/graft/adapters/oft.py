"""OFT (arXiv:2306.07280) as a method: its settings, its tensors, how a layer is built. Imports no torch.

y = W R' x, where R is orthogonal and block-diagonal, each block R = (I - Q)(I + Q)^-1 of a skew-symmetric Q
(Cayley), computed exactly: lengths of the rows of W and angles between them stay what they are. Or, as PEFT
has it, R = (I + Q)(I + Q + ... + Q^n), the transposed rotation but for powers of Q above n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graft.adapters.settings import SameEverywhere, check_placement
from graft.dialects import explained
from graft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from graft.adapters.oft_layer import OftLayer
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class OftConfig(SameEverywhere):
    """Which layers get a rotation of their inputs, block by block."""

    SHORTHAND = "method"

    method: Literal["oft"] = "oft"
    """The adapter method."""
    block_size: int = 32
    """Inputs that are rotated among each other; where it is no divisor of in_features, the largest divisor
    below it."""
    series_order: int | None = None
    """Highest power of Q in a series that stands for (I - Q)^-1, from 2: R = (I + Q)(I + Q + ...), PEFT's
    default (3), no exact rotation where Q is large; null computes R = (I - Q)(I + Q)^-1 exactly."""
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
        size = self.block_size
        if isinstance(size, bool) or size != int(size) or not 2 <= size <= 1024:
            raise ConfigError(
                f"block_size {size!r} is not a whole number from 2 to 1024",
                where="adapter.block_size",
                fix="16 to 64 serve most layers",
            )
        order = self.series_order
        if order is not None and (isinstance(order, bool) or order != int(order) or not 2 <= order <= 64):
            raise ConfigError(
                f"series_order {order!r} is not a whole number from 2 to 64",
                where="adapter.series_order",
                fix="leave it out for exact rotations; 3 is PEFT's",
            )
        check_placement(self)


class OftMethod:
    """OFT behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "oft"
    config_class = OftConfig
    kinds = ("linear", "conv1d")

    def tensor_shapes(self, base: BaseLayer, config: OftConfig) -> dict[str, tuple[int, ...]]:
        """Name (as in PEFT files) and shape of what one layer adds: of each Q its upper triangle."""
        width = base.in_features
        size = max(d for d in range(1, min(config.block_size, width) + 1) if width % d == 0)
        return {"oft_R.weight": (width // size, size * (size - 1) // 2)}

    def build_layer(self, base: BaseLayer, config: OftConfig, generator: torch.Generator | None) -> OftLayer:
        """Make the layer module; it draws nothing."""
        from graft.adapters.oft_layer import OftLayer

        num_blocks, num_numbers = self.tensor_shapes(base, config)["oft_R.weight"]
        return OftLayer(num_blocks, num_numbers, base.in_features, config.series_order)
