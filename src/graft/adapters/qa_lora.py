"""QA-LoRA (arXiv:2309.14717) as a method: its settings, its tensors, how a layer is built. Imports no torch.

W + scaling * B A P, where P sums each group of `group_size` inputs: the update is the same for all weights
of a group. Where a group is a block of an affine quantized base (int4, int3, int2), a merge only moves the
shifts of the blocks: the merged model is quantized as the base was, and computes what was trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graft.adapters.settings import LowRankSettings, check_low_rank, check_placement
from graft.dialects import explained
from graft.errors import AdapterError, ConfigError, TargetError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from graft.adapters.qa_lora_layer import QaLoraLayer
    from graft.models.layers import BaseLayer

DENSE_GROUP = 32
"""Inputs in a group over a base that has no affine blocks, where nothing else is asked for."""


@explained
@dataclass(frozen=True, kw_only=True)
class QaLoraConfig(LowRankSettings):
    """Which layers get a low-rank update of groups of inputs, and how it starts."""

    SHORTHAND = "method"

    method: Literal["qa_lora"] = "qa_lora"
    """The adapter method."""
    rank: int = 8
    """Rows of lora_A and columns of lora_B."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    group_size: int | None = None
    """Inputs that share one column of lora_A; null takes the blocks of an int4, int3 or int2 base, or 32."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear" (every linear but the output head), a list of names or path
    endings, or a regular expression for the whole path; embeddings are refused."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of lora_A: uniform within 1/sqrt(in_features), or normal with deviation 1/rank. B is zero."""
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
        check_placement(self)
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(
                f"group_size {size!r} is not a number of inputs",
                where="adapter.group_size",
                fix="the blocksize of the quantized base, or leave it out",
            )


class QaLoraMethod:
    """QA-LoRA behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "qa_lora"
    config_class = QaLoraConfig
    kinds = ("linear", "conv1d")

    def resolved(self, config: QaLoraConfig, targets: Mapping[str, BaseLayer]) -> QaLoraConfig:
        """The settings with the size of the groups filled in.

        Args:
            config: The settings.
            targets: All layers of the adapter by path.

        Raises:
            TargetError: The layers are in blocks of several sizes.
        """
        if config.group_size is not None or not targets:
            return config
        sizes = {base.affine_block or DENSE_GROUP: path for path, base in targets.items()}
        if len(sizes) > 1:
            told = ", ".join(f"{size} ({path})" for size, path in sizes.items())
            raise TargetError(
                f"the targets are in groups of several sizes: {told}",
                where="adapter.group_size",
                fix="set it, or leave the layers that are not quantized out of the targets",
            )
        return dataclasses.replace(config, group_size=next(iter(sizes)))

    def tensor_shapes(self, base: BaseLayer, config: QaLoraConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that one layer adds; files hold lora_A with every input.

        Raises:
            TargetError: The inputs are no whole groups.
        """
        groups = num_groups(base, config)
        return {"lora_A.weight": (config.rank, groups), "lora_B.weight": (base.out_features, config.rank)}

    def stored_shapes(self, base: BaseLayer, config: QaLoraConfig) -> dict[str, tuple[int, ...]]:
        """The same as they are in files."""
        return {
            "lora_A.weight": (config.rank, base.in_features),
            "lora_B.weight": (base.out_features, config.rank),
        }

    def build_layer(
        self, base: BaseLayer, config: QaLoraConfig, generator: torch.Generator | None
    ) -> QaLoraLayer:
        """Make the layer module; without a generator its tensors are left to be filled from a file."""
        from graft.adapters.qa_lora_layer import QaLoraLayer

        groups = num_groups(base, config)
        layer = QaLoraLayer(base.in_features, base.out_features, groups, config)
        if generator is not None:
            layer.fill(config.init, generator)
        return layer

    def stored(
        self, layers: Mapping[str, QaLoraLayer], config: QaLoraConfig
    ) -> tuple[QaLoraConfig, dict[str, dict[str, Tensor]]]:
        """What files hold: plain LoRA, with a column of lora_A for every input.

        Args:
            layers: By path.
            config: Their settings.
        """
        tensors = {}
        for path, layer in layers.items():
            down, up = layer.plain_factors()
            tensors[path] = {"lora_A.weight": down, "lora_B.weight": up}
        return config, tensors

    def restored(self, base: BaseLayer, config: QaLoraConfig, leaf: str, value: Tensor, where: str) -> Tensor:
        """A tensor of a layer from what a file holds.

        Args:
            base: The layer below.
            config: The settings of that layer.
            leaf: The tensor's name.
            value: As the file has it.
            where: The file, for errors.

        Raises:
            AdapterError: lora_A differs within a group.
        """
        if leaf != "lora_A.weight":
            return value
        groups = num_groups(base, config)
        columns = value.unflatten(1, (groups, base.in_features // groups))
        if not bool((columns == columns[..., :1]).all()):
            raise AdapterError(
                f"lora_A differs within groups of {base.in_features // groups} inputs: this is no QA-LoRA",
                where=where,
                fix="load it as LoRA: remove graft.json; the base is then not checked",
            )
        return columns[..., 0]


def num_groups(base: BaseLayer, config: QaLoraConfig) -> int:
    """How many groups the inputs of a layer make.

    Raises:
        TargetError: They are no whole groups.
    """
    size = config.group_size or base.affine_block or DENSE_GROUP
    if base.in_features % size:
        raise TargetError(
            f"{base.in_features} inputs are no whole groups of {size}",
            where="adapter.group_size",
            fix="take a divisor of the layer's inputs, or leave the layer out",
        )
    return base.in_features // size
