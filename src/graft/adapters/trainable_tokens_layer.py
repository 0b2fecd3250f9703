"""Rows of an embedding that stand in the place of the base's, and the same rows in a tied output head.

Shapes: ids any shape, rows (n, dimension), hidden (..., dimension), logits (..., tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.lora_update import is_fresh
from graft.models.layers import BaseLayer


class TokenRows(nn.Module):
    """A few rows of an embedding.

    Args:
        base: The embedding.
        indices: Numbers of the tokens.
        leaf: What the rows are called in files.
    """

    additive = False
    may_wait = True
    """A row whose token was not seen has no gradient."""

    indices: Tensor
    order: Tensor

    def __init__(self, base: BaseLayer, indices: tuple[int, ...], leaf: str) -> None:
        super().__init__()
        self._leaf = leaf
        chosen = torch.tensor(indices, dtype=torch.long)
        if base.device.type == "meta":  # where only shapes are asked for, or the rows come from a file
            rows = torch.zeros(len(indices), base.out_features)
        else:
            rows = base.dense_weight(None).t()[chosen.to(base.device)].float().cpu()
        self.rows = nn.Parameter(rows.contiguous().clone())
        self.register_buffer("indices", chosen, persistent=False)
        self.register_buffer("order", chosen.argsort(), persistent=False)

    @property
    def num_parameters(self) -> int:
        """Numbers in the rows."""
        return self.rows.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The rows by the name that PEFT files give them."""
        return {self._leaf: self.rows}

    def tied_layer(self) -> TiedRows:
        """The same rows in an output head that shares the embedding's weight."""
        return TiedRows(self)

    def _found(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids are among the tokens, and which row each of all ids would have."""
        sorted_indices = self.indices[self.order]
        place = torch.searchsorted(sorted_indices, ids).clamp_(max=len(sorted_indices) - 1)
        return sorted_indices[place] == ids, self.order[place]

    def _scaled(self, rows: Tensor, base: BaseLayer, dtype: torch.dtype) -> Tensor:
        """Rows as the embedding puts them out: rounded to its dtype, then multiplied as Gemma does."""
        rows = rows.to(dtype)
        return rows if base.output_scale == 1 else rows * torch.tensor(base.output_scale).to(rows)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Put the rows in the place of the base's.

        Args:
            x: Token ids, any shape.
            base_output: x.shape + (dimension,).
            base: The embedding.
        """
        if torch.compiler.is_compiling():
            return self.reference_forward(x, base_output, base)
        hits, places = self._found(x)
        rows = functional.embedding(places[hits], self.rows)
        return base_output.index_put((hits,), self._scaled(rows, base, base_output.dtype))

    def reference_forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The same with a row for every id, whether it is used or not."""
        hits, places = self._found(x)
        rows = self._scaled(functional.embedding(places, self.rows), base, base_output.dtype)
        return torch.where(hits[..., None], rows, base_output)

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """The weight (dimension, tokens), fp32, with the rows in it; `weight` is not changed."""
        with torch.no_grad():
            return weight.index_copy(1, self.indices.to(weight.device), self.rows.t().to(weight))

    def idle(self, base: BaseLayer) -> bool:
        """Whether the rows are the base's."""
        weight = base.dense_weight(None)
        old = weight[:, self.indices.to(weight.device)].t()
        return torch.equal(self.rows.detach().to(old), old)


class TiedRows(nn.Module):
    """The rows of an embedding in the output head that shares its weight: they give their tokens' logits.

    Args:
        owner: The layer over the embedding, which has the rows.
    """

    additive = False
    may_wait = True
    indices: Tensor

    def __init__(self, owner: TokenRows) -> None:
        super().__init__()
        self.rows = owner.rows  # the same parameter: it trains from both sides
        self.register_buffer("indices", owner.indices, persistent=False)

    @property
    def num_parameters(self) -> int:
        """None of its own."""
        return 0

    def tensors(self) -> dict[str, nn.Parameter]:
        """None of its own: the embedding's layer has them."""
        return {}

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Add to the logits of the tokens what the rows differ by from the base's.

        Args:
            x: Hidden states (..., dimension).
            base_output: (..., tokens); it may be overwritten with the result.
            base: The output head.
        """
        old = base.dense_weight(None)[self.indices]
        moved = (self.rows - old.to(self.rows.dtype)).to(x.dtype)
        logits = functional.linear(x, moved).to(base_output.dtype)
        if is_fresh(base_output, base) and not torch.compiler.is_compiling():
            return base_output.index_add_(-1, self.indices, logits)
        return base_output.index_add(-1, self.indices, logits)

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """The weight (tokens, dimension), fp32, with the rows in it; `weight` is not changed."""
        with torch.no_grad():
            return weight.index_copy(0, self.indices.to(weight.device), self.rows.to(weight))

    def idle(self, base: BaseLayer) -> bool:
        """Not told here: the embedding's layer knows."""
        return False
