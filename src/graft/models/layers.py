"""The one view that adapters have of a base layer, whatever stores its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.kernels.wide import is_wide, wide_linear
from graft.models.packed_layers import decoded, is_packed, packed_sizes
from graft.quant.linear import QuantizedLinear
from graft.quant.tensor import shifted

Kind = Literal["linear", "conv1d", "embedding", "conv2d"]


@final
@dataclass(frozen=True, eq=False)
class BaseLayer:
    """A layer of the base model seen as one matrix `(out_features, in_features)`.

    Build it with `BaseLayer.of`. An adapter never asks which quantizer or which layout is below.
    """

    module: nn.Module
    """The layer itself; calling it gives the base output."""

    kind: Kind
    """linear (dense or quantized), conv1d (GPT-2's transposed linear), embedding or conv2d."""

    in_features: int
    """Length of the input vector; the number of rows of an embedding; of a conv2d the numbers under its
    kernel, which are in_channels / groups times those of a channel, channels slowest."""

    out_features: int
    """Length of the output vector; the dimension of an embedding; the output channels of a conv2d."""

    quantized: bool
    """Whether the weight is stored in codes and cannot be replaced in place."""

    @staticmethod
    def of(module: nn.Module) -> BaseLayer | None:
        """View a module as a base layer.

        Args:
            module: `nn.Linear`, transformers' `Conv1D`, `nn.Embedding`, `nn.Conv2d`, graft's
                `QuantizedLinear`, or a linear that another library packed.

        Returns:
            The view, or None for any other module.
        """
        # Imported on use: transformers takes seconds.
        from transformers.pytorch_utils import Conv1D

        if isinstance(module, QuantizedLinear):
            return BaseLayer(module, "linear", module.in_features, module.out_features, quantized=True)
        if (sizes := packed_sizes(module)) is not None:
            return BaseLayer(module, "linear", *sizes, quantized=True)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or is_packed(weight):
            return None
        if isinstance(module, nn.Conv2d) and weight.dim() == 4:
            return BaseLayer(module, "conv2d", weight[0].numel(), len(weight), quantized=False)
        if weight.dim() != 2:
            return None
        rows, columns = weight.shape
        if isinstance(module, nn.Linear) and (rows, columns) == (module.out_features, module.in_features):
            return BaseLayer(module, "linear", columns, rows, quantized=False)
        if isinstance(module, Conv1D):
            return BaseLayer(module, "conv1d", rows, columns, quantized=False)
        if isinstance(module, nn.Embedding):
            return BaseLayer(module, "embedding", rows, columns, quantized=False)
        return None

    @property
    def bias(self) -> Tensor | None:
        """The bias `(out_features,)`, or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def device(self) -> torch.device:
        """Where the stored weight lives."""
        return next(tensor.device for tensor in (*self.module.parameters(), *self.module.buffers()))

    @property
    def output_scale(self) -> float:
        """What the layer multiplies its output by: Gemma 3 scales its embedding, everything else has 1."""
        return float(getattr(self.module, "scalar_embed_scale", 1.0))

    @property
    def affine_block(self) -> int | None:
        """Inputs in a block with a shift of its own, where rows are whole blocks; None for other weights."""
        config = self.module.config if isinstance(self.module, QuantizedLinear) else None
        whole = config is not None and config.affine and self.in_features % config.blocksize == 0
        return config.blocksize if config is not None and whole else None

    def shifted(self, added: Tensor) -> nn.Module:
        """A quantized layer that does the same with a number added to all weights of each block.

        Args:
            added: (out_features, blocks in a row), float32.

        Returns:
            A new layer with the same codes; its scales and shifts are in float32.
        """
        assert isinstance(self.module, QuantizedLinear), "only quantized weights have blocks"
        assert self.affine_block is not None, "only affine blocks have a shift"
        weight = shifted(self.module.quantized_weight, added.reshape(-1))
        made = QuantizedLinear.from_quantized(weight, self.module.bias, self.module.compute_dtype)
        return made.train(self.module.training)

    def dense_weight(self, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """The weight as `(out_features, in_features)`, without gradient.

        Args:
            dtype: What to return; None keeps the dtype that the layer computes in.

        Returns:
            The dense weight; it may share memory with the layer, so do not write to it.

        Cost: a quantized weight is decoded on every call, a conv1d weight is a transposed view.
        """
        if self.quantized:
            if isinstance(self.module, QuantizedLinear):
                return self.module.dense_weight(dtype or self.module.compute_dtype)
            weight = decoded(self.module, self.in_features, self.out_features)
            return weight if dtype is None else weight.to(dtype)
        weight = self._weight.detach()
        if self.kind == "conv2d":
            weight = weight.flatten(1)
        elif self.kind != "linear":
            weight = weight.t()
        return weight if dtype is None else weight.to(dtype)

    def product(self, rows: Tensor) -> Tensor:
        """Rows times W', without the bias and without gradient, computed in the dtype of the layer.

        Args:
            rows: `(n, in_features)`, few of them.

        Returns:
            `(n, out_features)` in the dtype of rows.

        Cost: as a forward pass of n tokens; a quantized weight is decoded in parts or not at all.
        """
        with torch.no_grad():
            if isinstance(self.module, QuantizedLinear):
                made = self.module.product(rows, None, self.module.compute_dtype or self.module.dtype)
                return made.to(rows.dtype)
            weight = self.dense_weight(None)
            if is_wide(weight.dtype, weight.device.type):
                fill = lambda start, stop, out: out.copy_(weight[start:stop])  # noqa: E731 - one line
                return wide_linear(rows.float(), self.out_features, fill).to(rows.dtype)
            return (rows.to(weight.dtype) @ weight.t()).to(rows.dtype)

    def replace_weight(self, weight: Tensor) -> None:
        """Write a weight back in place, in the module's own layout and dtype; tied weights stay tied.

        Args:
            weight: `(out_features, in_features)`, any floating dtype.
        """
        assert not self.quantized, "a quantized weight is written by quantizing a new layer"
        assert weight.shape == (self.out_features, self.in_features), tuple(weight.shape)
        with torch.no_grad():
            self._weight.copy_(self.laid_out(weight))

    def laid_out(self, weight: Tensor) -> Tensor:
        """A weight `(out_features, in_features)` in the module's own layout."""
        if self.kind == "conv2d":
            return weight.reshape(self._weight.shape)
        return weight if self.kind == "linear" else weight.t()

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would put out with another weight and no bias; differentiable, not for embeddings.

        Args:
            x: (..., in_features), or (..., channels, height, width) for a conv2d: an input of the layer.
            weight: (n, in_features) in the dtype of x, where n may be any number but for a conv2d in groups.

        Returns:
            (..., n), or (..., n, height, width).
        """
        if self.kind != "conv2d":
            return functional.linear(x, weight)
        # torch's own way from a weight to an output, with the stride, dilation and padding of the layer.
        module: Any = self.module
        made: Tensor = module._conv_forward(x, weight.unflatten(1, module.weight.shape[1:]), None)
        return made

    def spread(self, vector: Tensor) -> Tensor:
        """A vector with a number for each feature (input or output), shaped to meet inputs or outputs.

        Args:
            vector: As many numbers as x or y has features (channels of a conv2d), in any shape.
        """
        return vector.reshape(-1, 1, 1) if self.kind == "conv2d" else vector.reshape(-1)

    @property
    def num_inputs(self) -> int:
        """Features of an input: in_features, or all input channels of a conv2d."""
        return int(self._conv.in_channels) if self.kind == "conv2d" else self.in_features

    @property
    def groups(self) -> int:
        """Groups of channels of a conv2d that do not mix; 1 for all other layers."""
        return int(self._conv.groups) if self.kind == "conv2d" else 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Height and width of the kernel of a conv2d; empty for all other layers."""
        return tuple(self._conv.kernel_size) if self.kind == "conv2d" else ()

    @property
    def _conv(self) -> Any:
        return self.module

    @property
    def _weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight
