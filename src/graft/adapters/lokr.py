"""LoKr (arXiv:2212.10650, arXiv:2309.14859) as a method: its settings, its tensors. Imports no torch.

W + scaling * kron(W1, W2), where W1 is small and W2 large, each dense or of low rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graft.adapters.settings import LowRankSettings, check_low_rank, check_placement
from graft.dialects import explained
from graft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from graft.adapters.lokr_layer import LokrLayer
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class LokrConfig(LowRankSettings):
    """Which layers get the Kronecker product of two small matrices."""

    SHORTHAND = "method"

    method: Literal["lokr"] = "lokr"
    """The adapter method."""
    rank: int = 8
    """Rank of the matrices that are of low rank; one whose rank could not be twice as large is dense."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
    decompose_both: bool = False
    """Whether the small matrix may be of low rank too."""
    decompose_factor: int = -1
    """Rows and columns of the first matrix, where it divides those of W; else the largest divisor up to the
    root of these that is not above it; -1 takes the divisor nearest to the root."""
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
        factor = self.decompose_factor
        if isinstance(factor, bool) or factor != int(factor) or (factor < 1 and factor != -1):
            raise ConfigError(
                f"decompose_factor {factor!r} is not a whole number from 1, nor -1",
                where="adapter.decompose_factor",
                fix="-1 serves most layers",
            )
        check_placement(self)


def divided(size: int, factor: int) -> tuple[int, int]:
    """A size as the product of two whole numbers, as PEFT divides it.

    Args:
        size: To be divided.
        factor: The first number where it is a divisor. Else the first is the largest divisor up to the root
            of the size that is not above it; -1 is above nothing.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = size if factor == -1 else factor
    first = max(d for d in range(1, min(bound, int(size**0.5)) + 1) if size % d == 0)
    return first, size // first


class LokrMethod:
    """LoKr behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "lokr"
    config_class = LokrConfig
    kinds = ("linear", "conv1d", "conv2d")

    def tensor_shapes(self, base: BaseLayer, config: LokrConfig) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds."""
        rows = divided(base.out_features, config.decompose_factor)
        # Of a convolution the channels are divided; the second matrix has the kernel.
        columns = divided(base.num_inputs // base.groups, config.decompose_factor)
        shapes: dict[str, tuple[int, ...]] = {}
        for number, (height, width) in enumerate(zip(rows, columns, strict=True), start=1):
            low = config.rank < max(height, width) / 2 and (number == 2 or config.decompose_both)
            kernel = base.kernel if number == 2 else ()
            if low:
                shapes |= {f"lokr_w{number}_a": (height, config.rank)}
                shapes |= {f"lokr_w{number}_b": (config.rank, width * math.prod(kernel))}
            else:
                shapes |= {f"lokr_w{number}": (height, width, *kernel)}
        return shapes

    def build_layer(
        self, base: BaseLayer, config: LokrConfig, generator: torch.Generator | None
    ) -> LokrLayer:
        """Make the layer module; without a generator its tensors are left to be filled from a file."""
        from graft.adapters.lokr_layer import LokrLayer

        layer = LokrLayer(self.tensor_shapes(base, config), config.scaling)
        if generator is not None:
            layer.fill(generator)
        return layer
