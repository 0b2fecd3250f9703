"""Quantization-aware training (arXiv:1712.05877) of low-rank adapters: settings, tensors. Imports no torch.

y = Q(W + scaling * B A) x, where Q rounds to the codes of a number format and back. Gradients pass Q as if
it were the identity (straight-through, arXiv:1308.3432), so those of A and B are LoRA's. What a merge
writes are the codes of Q(W + scaling * B A): the model that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graft.adapters.settings import LowRankSettings, check_low_rank, check_placement
from graft.dialects import explained
from graft.errors import ConfigError
from graft.quant.config import QuantizationConfig

if TYPE_CHECKING:
    import torch

    from graft.adapters.qat_layer import QatLayer
    from graft.models.layers import BaseLayer


@explained
@dataclass(frozen=True, kw_only=True)
class QatConfig(LowRankSettings):
    """Which layers get a low-rank update that is trained as it is after quantization, and in which format."""

    SHORTHAND = "method"

    method: Literal["qat"] = "qat"
    """The adapter method."""
    quant_type: Literal["nf4", "fp4", "e2m1", "int8", "nf3", "nf2", "int4", "int3", "int2"] = "nf4"
    """Format in which the adapted layers will be stored once merged, and in which they compute in training;
    the base is loaded dense."""
    double_quant: bool = True
    """Quantize the scales of that format too."""
    blocksize: int = 64
    """Weights that share one scale: a power of two from 32 to 4096."""
    rank: int = 8
    """Rows of lora_A and columns of lora_B."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter and are quantized: "all-linear" (every linear but the output head), a list
    of names or path endings, or a regular expression for the whole path. The others stay dense."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of lora_A: uniform within 1/sqrt(in_features), or normal with deviation 1/rank. B is zero."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that large ranks are not damped (arXiv:2312.03732)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: heads, embeddings, norms. They stay dense."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some layers, each "regex=rank"; matched with the end of the path, first one counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some layers, each "regex=alpha"."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_placement(self)
        try:
            _ = self.quantization
        except ConfigError as error:
            raise ConfigError(
                error.what, where=error.where.replace("quantization.", "adapter."), fix=error.fix
            ) from error

    @property
    def quantization(self) -> QuantizationConfig:
        """How the weight of an adapted layer is stored after the merge."""
        return QuantizationConfig(
            quant_type=self.quant_type, double_quant=self.double_quant, blocksize=self.blocksize
        )


class QatMethod:
    """Quantization-aware training behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "qat"
    config_class = QatConfig
    kinds = ("linear", "conv1d")
    ships_quantized = True

    def tensor_shapes(self, base: BaseLayer, config: QatConfig) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds: LoRA's."""
        return {
            "lora_A.weight": (config.rank, base.in_features),
            "lora_B.weight": (base.out_features, config.rank),
        }

    def build_layer(self, base: BaseLayer, config: QatConfig, generator: torch.Generator | None) -> QatLayer:
        """Make the layer module; without a generator its tensors are left to be filled from a file."""
        from graft.adapters.initializers import fill_lora
        from graft.adapters.lora_layer import LoraLinear
        from graft.adapters.qat_layer import QatLayer

        update = LoraLinear(base.in_features, base.out_features, config.rank, config.scaling)
        if generator is not None:
            fill_lora(update, base, config, generator)
        return QatLayer(update, config.quantization)
