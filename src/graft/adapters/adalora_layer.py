"""The AdaLoRA layer: y = W x + scaling * P diag(E) Q x, and what is written of it.

Shapes: x (..., in), y (..., out), Q = lora_A (rank, in), E = lora_E (rank, 1), P = lora_B (out, rank).
Triplet i is row i of Q, number i of E and column i of P.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.lora_update import LoraUpdate, begun_update, is_fresh
from graft.models.layers import BaseLayer

if TYPE_CHECKING:
    from graft.adapters.adalora import AdaLoraConfig

DEVIATION = 0.02
"""Of the normal values that P and Q start with."""


class AdaLoraLayer(nn.Module):
    """The triplets of a linear layer, dense or quantized, in either layout.

    Args:
        in_features: Length of x.
        out_features: Length of y.
        rank: Triplets; a layer that lost all of its own has none.
        scaling: Factor on P diag(E) Q.
        dropout: Share of x set to zero in training, for the update only.
    """

    kept: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, dtype=torch.float32))
        # Of each triplet whether the allocator leaves it its E: 1 or 0.
        self.register_buffer("kept", torch.ones(rank, 1, dtype=torch.float32), persistent=False)

    def fill(self, generator: torch.Generator) -> None:
        """Give P and Q their first values; E stays zero."""
        with torch.no_grad():
            self.lora_A.normal_(std=DEVIATION, generator=generator)
            self.lora_B.normal_(std=DEVIATION, generator=generator)

    @property
    def num_parameters(self) -> int:
        """Numbers in P, E and Q, of triplets without an E too."""
        return self.lora_A.numel() + self.lora_B.numel() + self.lora_E.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_E": self.lora_E}

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides: which triplets are left."""
        return {"kept": self.kept}

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Q (rank, in) and P diag(E) (out, rank), whose product times scaling is the update."""
        return self.lora_A.detach(), self.lora_B.detach() * self.lora_E.detach().t()

    @property
    def may_wait(self) -> bool:
        """Whether the allocator has taken every triplet: gradients may be zero."""
        return not bool(self.kept.any())

    @property
    def left(self) -> Tensor:
        """Of each triplet whether files must have it: it is kept, or acts all the same. Bool (rank,)."""
        return ((self.kept != 0) | (self.lora_E != 0)).detach().view(-1).cpu()

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: (..., in), the input of the base layer.
            base_output: (..., out); it may be overwritten with the result.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.
        """
        if not len(self.lora_E):
            return base_output
        if torch.compiler.is_compiling():
            return self.reference_forward(x, base_output, base)
        x = self._dropped(x.to(base_output.dtype))
        fresh = is_fresh(base_output, base)
        update: Tensor = LoraUpdate.apply(
            x, base_output, self.lora_A * self.lora_E, self.lora_B, self.scaling, fresh
        )
        return update

    def begin(self, x: Tensor) -> Callable[[Tensor, BaseLayer], Tensor] | None:
        """Do what needs no base output; see `LoraLinear.begin`."""
        if not len(self.lora_E):
            return None
        return begun_update(x, lambda: (self.lora_A * self.lora_E, self.lora_B), self.scaling, self._dropped)

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations, as the equation is written."""
        x = self._dropped(x.to(base_output.dtype))
        down = functional.linear(x, self.lora_A.to(x.dtype)) * self.lora_E.view(-1).to(x.dtype)
        return base_output + functional.linear(down, self.lora_B.to(x.dtype)) * self.scaling

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * P diag(E) Q.

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        down, up = (factor.to(weight.device) for factor in self.plain_factors())
        return torch.addmm(weight, up, down, alpha=self.scaling)


def found_ranks(
    layers: Mapping[str, AdaLoraLayer], config: AdaLoraConfig
) -> tuple[AdaLoraConfig, dict[str, dict[str, Tensor]]]:
    """Settings with the rank that each layer has left, and the tensors of these ranks.

    Args:
        layers: By path.
        config: Their settings.
    """
    tensors = {}
    for path, layer in layers.items():
        left = layer.left.to(layer.lora_E.device)
        tensors[path] = {
            "lora_A": layer.lora_A.detach()[left],
            "lora_B": layer.lora_B.detach()[:, left],
            "lora_E": layer.lora_E.detach()[left],
        }
    fewer = {path: rank for path in layers if (rank := len(tensors[path]["lora_E"])) != config.rank}
    pattern = tuple(f"{path}={rank}" for path, rank in fewer.items())
    return dataclasses.replace(config, rank_pattern=pattern), tensors


def as_lora(
    layers: Mapping[str, AdaLoraLayer], config: AdaLoraConfig
) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """The same function as plain LoRA: lora_B = P diag(E), an alpha for each rank, no layers without one.

    Args:
        layers: By path.
        config: Their settings.
    """
    from graft.adapters.lora import LoraConfig

    _, found = found_ranks(layers, config)
    found = {path: parts for path, parts in found.items() if len(parts["lora_E"])}
    tensors = {
        path: {
            "lora_A.weight": parts["lora_A"],
            "lora_B.weight": parts["lora_B"] * parts["lora_E"].t(),
        }
        for path, parts in found.items()
    }
    ranks = {path: len(parts["lora_E"]) for path, parts in found.items()}
    scaling = next((layer.scaling for layer in layers.values()), 1.0)
    return (
        LoraConfig(
            rank=config.rank,
            alpha=scaling * config.rank,
            dropout=config.dropout,
            target_modules=tuple(found),
            modules_to_save=config.modules_to_save,
            rank_pattern=tuple(f"{path}={rank}" for path, rank in ranks.items() if rank != config.rank),
            alpha_pattern=tuple(
                f"{path}={scaling * rank!r}" for path, rank in ranks.items() if rank != config.rank
            ),
        ),
        tensors,
    )
