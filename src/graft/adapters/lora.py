"""LoRA (arXiv:2106.09685) as a method: its settings, its tensors, how a layer is built. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from graft.adapters.settings import (
    DATA,
    ITERATED,
    RANDOM,
    SUBTRACTED,
    LowRankSettings,
    check_low_rank,
    check_placement,
    check_start,
)
from graft.adapters.trainable_tokens import check_tokens, row_shape
from graft.dialects import explained
from graft.errors import ConfigError, TargetError

if TYPE_CHECKING:
    import torch

    from graft.adapters.conv_layer import LoraConv
    from graft.adapters.lora_layer import LoraEmbedding, LoraLinear
    from graft.adapters.trainable_tokens_layer import TokenRows
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
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train too: those of the layers that carry an adapter, or all of the model."""
    trainable_token_indices: tuple[int, ...] = ()
    """Numbers of tokens whose rows of the input embedding train too, in full; it is no target then."""
    lora_bias: bool = False
    """Give lora_B a bias; embeddings have none, and a layer without a bias cannot take it in a merge."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_start(self, *RANDOM, *DATA, *ITERATED, "olora")
        check_placement(self)
        check_tokens(self.trainable_token_indices, "adapter.trainable_token_indices")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(
                f"bias {self.bias!r} is not known", where="adapter.bias", fix="none, all or lora_only"
            )
        if self.init in SUBTRACTED and (self.lora_bias or self.bias != "none"):
            raise ConfigError(
                f"init {self.init!r} is measured from a start, which layers with trained biases do not have",
                where="adapter.init",
                fix="leave bias and lora_bias out, or take init kaiming",
            )
        for name, set_ in (("bias", self.bias == "lora_only"), ("lora_bias", self.lora_bias)):
            if set_ and not self.target_modules:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} cannot act: target_modules is empty",
                    where=f"adapter.{name}",
                    fix=f"leave {name} out, or name targets",
                )


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


ROWS = "token_adapter.trainable_tokens_delta"
"""What PEFT's files call rows of an embedding that train beside LoRA."""


def rows_of(base: BaseLayer, config: LowRank) -> tuple[int, ...]:
    """The tokens whose rows of an embedding train; none of another layer.

    Args:
        base: The layer.
        config: Its settings; those of DoRA know no such rows.
    """
    indices: tuple[int, ...] = getattr(config, "trainable_token_indices", ())
    return indices if base.kind == "embedding" else ()


def trained_biases(base: BaseLayer, config: LowRank) -> tuple[bool, bool]:
    """Whether lora_B of a layer has a bias, and whether the base's bias trains.

    Args:
        base: The layer.
        config: Its settings; those of DoRA and LoRA-FA know no biases.

    Raises:
        TargetError: An embedding is to have one.
    """
    lora_bias: bool = getattr(config, "lora_bias", False)
    if base.kind == "embedding":
        if lora_bias:
            raise TargetError(
                "lora_bias on an embedding: what it looks up has no bias",
                where="adapter.lora_bias",
                fix="leave lora_bias out, or the embedding",
            )
        return False, False
    return lora_bias, getattr(config, "bias", "none") != "none" and base.bias is not None


class LoraMethod:
    """LoRA behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "lora"
    config_class = LoraConfig
    kinds = ("linear", "conv1d", "embedding", "conv2d")

    def tensor_shapes(self, base: BaseLayer, config: LowRank) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds.

        Raises:
            TargetError: A convolution in groups, or with settings that it does not take.
        """
        if indices := rows_of(base, config):
            return {ROWS: row_shape(base, indices, "adapter.trainable_token_indices")}
        down, up = (config.rank, base.in_features), (base.out_features, config.rank)
        lora_bias, base_bias = trained_biases(base, config)
        if base.kind == "conv2d":
            refuse_conv(base, config, biases=lora_bias or base_bias)
            return {
                "lora_A.weight": (config.rank, base.num_inputs, *base.kernel),
                "lora_B.weight": (*up, 1, 1),
            }
        if base.kind == "embedding":
            return {"lora_embedding_A": down, "lora_embedding_B": up}
        shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": down, "lora_B.weight": up}
        if lora_bias:
            shapes["lora_B.bias"] = (base.out_features,)
        if base_bias:
            shapes["base_layer.bias"] = (base.out_features,)
        return shapes

    def build_layer(
        self, base: BaseLayer, config: LowRank, generator: torch.Generator | None
    ) -> LoraLinear | LoraEmbedding | LoraConv | TokenRows:
        """Make the layer module; without a generator its tensors are left to be filled.

        Raises:
            ConfigError: Its start is made from data or from another weight than the base's.
        """
        if indices := rows_of(base, config):
            from graft.adapters.trainable_tokens_layer import TokenRows

            return TokenRows(base, indices, ROWS)
        from graft.adapters.conv_layer import LoraConv
        from graft.adapters.initializers import fill_lora
        from graft.adapters.lora_layer import LoraEmbedding, LoraLinear

        sizes = base.in_features, base.out_features, config.rank, config.scaling, config.dropout
        lora_bias, base_bias = trained_biases(base, config)
        layer: LoraLinear | LoraEmbedding | LoraConv
        if base.kind == "conv2d":
            layer = LoraConv(base.num_inputs, base.kernel, *sizes[1:])
        elif lora_bias or base_bias:
            from graft.adapters.lora_bias_layer import LoraBaseBiasLinear, LoraBiasLinear

            biased = LoraBaseBiasLinear if base_bias else LoraBiasLinear
            layer = biased(*sizes, lora_bias=lora_bias, base_bias=base.bias if base_bias else None)
        else:
            layer = (LoraEmbedding if base.kind == "embedding" else LoraLinear)(*sizes)
        if generator is not None:
            fill_lora(layer, base, config, generator)
        return layer


def refuse_conv(base: BaseLayer, config: LowRank, *, biases: bool) -> None:
    """Refuse a convolution that an update of low rank does not fit, or settings that are of linears only.

    Args:
        base: A convolution.
        config: The settings of that layer.
        biases: Whether these train biases.

    Raises:
        TargetError: That is so.
    """
    fix = "take it out of the targets"
    if base.groups > 1:
        what, fix = (
            f"a convolution in {base.groups} groups has no update of low rank",
            f"{fix}; loha takes it",
        )
    elif config.init not in ("kaiming", "gaussian"):
        what = f"a convolution has no start {config.init!r}: it is kaiming or gaussian"
    elif biases:
        what = "the bias of a convolution does not train"
    else:
        return
    raise TargetError(what, where="adapter.target_modules", fix=fix)
