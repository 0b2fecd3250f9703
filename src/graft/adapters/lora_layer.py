"""The LoRA layers: y = W x + scaling * B A x over a frozen linear, and the same over an embedding.

Where both factors start at values of their own, B0 and A0, the update is scaling * (B A - B0 A0): the base
stays what it is, and the first output is its own.

Shapes: x (..., in), y (..., out), lora_A (rank, in), lora_B (out, rank); N is the number of rows of x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.lora_update import LoraUpdate, StartedUpdate, begun_update, is_fresh, joined
from graft.models.layers import BaseLayer


class LoraLinear(nn.Module):
    """The update of a linear layer, dense or quantized, in either layout.

    Args:
        in_features: Length of x.
        out_features: Length of y.
        rank: Rows of lora_A.
        scaling: Factor on B A.
        dropout: Share of x set to zero in training, for the update only.
    """

    trains_A = True  # noqa: N815 - the tensor's name
    """Whether lora_A trains; LoRA-FA leaves it as it was drawn."""

    start_A: Tensor | None  # noqa: N815 - beside lora_A
    """A0 (rank, in), where the update is measured from a start that is not zero."""
    start_B: Tensor | None  # noqa: N815 - beside lora_B
    """B0 (out, rank), with it."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @property
    def num_parameters(self) -> int:
        """Numbers that train: in lora_B and, where it does, lora_A."""
        return self.lora_B.numel() + (self.lora_A.numel() if self.trains_A else 0)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def begin_at(self, lora_A: Tensor, lora_B: Tensor, *, subtract: bool) -> None:
        """Give the factors their first values.

        Args:
            lora_A: (rank, in).
            lora_B: (out, rank).
            subtract: Whether the update is measured from them, so that it starts at zero.
        """
        with torch.no_grad():
            self.lora_A.copy_(lora_A)
            self.lora_B.copy_(lora_B)
            if subtract:
                self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def start(self) -> dict[str, Tensor]:
        """What the update is measured from, by name; empty where that is zero. It never trains."""
        if self.start_A is None or self.start_B is None:
            return {}
        return {"start_A": self.start_A, "start_B": self.start_B}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors whose product is the update but for the scaling: A and B, or [A; A0] and [B, -B0]."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return joined(self.lora_A, self.lora_B, self.start_A, self.start_B)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: (..., in), the input of the base layer.
            base_output: (..., out); it may be overwritten with the result.
            base: The layer below.

        Returns:
            (..., out) in the dtype of base_output.
        """
        if torch.compiler.is_compiling():  # which decides by itself what is fused and what is kept
            return self.reference_forward(x, base_output, base)
        if x.dtype != base_output.dtype:
            x = x.to(base_output.dtype)
        fresh = is_fresh(base_output, base)
        x = self._dropped(x)
        pair = self.lora_A, self.lora_B
        if self.start_A is not None:
            update: Tensor = StartedUpdate.apply(
                x, base_output, *pair, self.start_A, self.start_B, self.scaling, fresh
            )
        else:
            update = LoraUpdate.apply(x, base_output, *pair, self.scaling, fresh)
        return update

    def begin(self, x: Tensor) -> Callable[[Tensor, BaseLayer], Tensor] | None:
        """Do what needs no base output, so that all that is kept for the backward pass is kept by then.

        A recomputation that stops once it has everything then leaves the base product out.

        Args:
            x: As for `forward`.

        Returns:
            The rest of `forward`, as a function of base_output and base; None where it must be done in one.
        """
        if self.start_A is not None:
            return None
        return begun_update(x, lambda: (self.lora_A, self.lora_B), self.scaling, self._dropped)

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations: what `forward` is tested against."""
        x = self._dropped(x.to(base_output.dtype))
        lora_A, lora_B = self.factors
        down = functional.linear(x, lora_A.to(x.dtype))
        return base_output + functional.linear(down, lora_B.to(x.dtype)) * self.scaling

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * B A, or W + scaling * (B A - B0 A0).

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        return _folded(weight, *self.factors, self.scaling)


class LoraEmbedding(nn.Module):
    """The update of an embedding: row t changes by scaling * B A[:, t].

    Args:
        in_features: Number of rows (tokens).
        out_features: Dimension of a row.
        rank: Rows of lora_embedding_A.
        scaling: Factor on B A.
        dropout: Not used: there is no input vector to drop from.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32))
        self.lora_embedding_B = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32))

    @property
    def num_parameters(self) -> int:
        """Numbers in lora_embedding_A and lora_embedding_B."""
        return self.lora_embedding_A.numel() + self.lora_embedding_B.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add the update to the base output.

        Args:
            x: Token ids, any shape.
            base_output: x.shape + (out,), with the scale that Gemma gives its embeddings already in it.
            base: The layer below.
        """
        padding: int | None = getattr(base.module, "padding_idx", None)
        down = functional.embedding(x, self.lora_embedding_A.t(), padding)
        up = functional.linear(down, self.lora_embedding_B) * (self.scaling * base.output_scale)
        return base_output + up.to(base_output.dtype)

    reference_forward = forward

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """W + scaling * B A, where W is (out, in) = (dimension, tokens), fp32; not changed."""
        return _folded(weight, self.lora_embedding_A, self.lora_embedding_B, self.scaling)


def _folded(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    with torch.no_grad():
        return torch.addmm(weight, up.to(weight.device), down.to(weight.device), alpha=scaling)
