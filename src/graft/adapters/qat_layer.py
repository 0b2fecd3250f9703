"""The layer of quantization-aware training: y = Q(W + scaling * B A) x + bias over a dense base layer.

Shapes: x (..., in), y (..., out), W (out, in), lora_A (rank, in), lora_B (out, rank); N rows of x.

Q is made anew in every pass, scales included, and the product is that of the `QuantizedLinear` which a merge
writes. The gradient passes Q unchanged: with g = dL/dy, dL/dW = g' x, of which A and B need only
scaling * (g B)' x and scaling * g' (x A'), so it is never made. The gradient of x is g Q(W + scaling * B A).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graft.adapters.lora_layer import LoraLinear
from graft.adapters.lora_update import no_autocast
from graft.kernels.wide import is_wide
from graft.models.layers import BaseLayer
from graft.quant.config import QuantizationConfig
from graft.quant.layout import FLOATS
from graft.quant.linear import QuantizedLinear
from graft.quant.tensor import QuantizedTensor, quantize

_PART = 1 << 17
"""Elements of W that are summed in float64 at a time: they stay in a cache."""


class QatLayer(nn.Module):
    """A low-rank update of a dense weight that computes as the quantized sum of both.

    Args:
        update: The low-rank update, without dropout: with it there is no one weight to quantize.
        quantization: Format, block size and double quantization of the sum.
    """

    additive = False
    replaces_base = True

    def __init__(self, update: LoraLinear, quantization: QuantizationConfig) -> None:
        super().__init__()
        self.update = update
        self.quantization = quantization
        self._known: tuple[Any, QuantizedLinear] | None = None

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.update.scaling

    @scaling.setter
    def scaling(self, scaling: float) -> None:
        self.update.scaling = scaling

    @property
    def lora_A(self) -> nn.Parameter:  # noqa: N802 - the tensor's name
        """The first factor, (rank, in)."""
        return self.update.lora_A

    @property
    def num_parameters(self) -> int:
        """Numbers in both factors."""
        return self.update.num_parameters

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by the names that PEFT files give them."""
        return self.update.tensors()

    def train(self, mode: bool = True) -> QatLayer:
        """As for every module; codes that were kept for evaluation are let go."""
        self._known = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the codes that are kept for evaluation: for copies and pickles."""
        return {**self.__dict__, "_known": None}

    def forward(self, x: Tensor, base_output: Tensor | None, base: BaseLayer) -> Tensor:
        """The product with the quantized sum.

        Args:
            x: (..., in).
            base_output: Not used.
            base: The layer below.

        Returns:
            (..., out) in the dtype of x, under autocast in that of autocast.

        Raises:
            QuantError: A weight of the sum is not finite.

        Cost: W is read, summed with B A and encoded in each pass, which takes the time of the product of
        about 120 rows on a CPU, and a float32 copy of W for that time; codes are kept until the backward
        pass. In evaluation mode without gradients they are made once and kept.
        """
        if torch.compiler.is_compiling():
            return self.reference_forward(x, base_output, base)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            compute_dtype = output_dtype = torch.get_autocast_dtype(device)
        else:
            compute_dtype, output_dtype = _weight_dtype(base), x.dtype
        layer, bias = self._layer(base), base.bias
        y: Tensor = QatProduct.apply(
            x.to(compute_dtype), self.update.lora_A, self.update.lora_B, bias, self.scaling, layer
        )
        return y.to(output_dtype)

    def reference_forward(self, x: Tensor, base_output: Tensor | None, base: BaseLayer) -> Tensor:
        """The same in plain differentiable torch operations: what `forward` is tested against."""
        down, up = (factor.to(x.dtype) for factor in (self.update.lora_A, self.update.lora_B))
        dense = base.dense_weight(x.dtype) + self.scaling * (up @ down)
        through = dense + (self._decoded(base).to(x.dtype) - dense).detach()
        return functional.linear(x, through, base.bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _decoded(self, base: BaseLayer) -> Tensor:
        return self.quantized_weight(base, base.dense_weight(None)).dequantize(torch.float32)

    def quantized_weight(self, base: BaseLayer, weight: Tensor) -> QuantizedTensor:
        """Q(W + scaling * B A): what the layer computes with, and what a merge writes.

        The sum is made in float64 and rounded once to float32, so that its bits, and with them the codes, do
        not depend on the order in which a processor or a device adds.

        Args:
            base: The layer below.
            weight: Its weight (out, in) in the dtype in which it is in training; not changed.

        Raises:
            QuantError: A weight of the sum is not finite.
        """
        # Inference tensors could not be used in a backward pass later.
        with torch.inference_mode(False), torch.no_grad(), no_autocast(weight.device.type):
            made = quantize(self._sum(weight), self.quantization)
        dtype = weight.dtype if weight.dtype in FLOATS.values() else torch.float32
        return replace(made, dtype=dtype)

    def _sum(self, weight: Tensor) -> Tensor:
        """W + scaling * B A, (out, in), float32."""
        down = self.update.lora_A.detach().to(weight.device, torch.float64)
        up = self.update.lora_B.detach().to(weight.device, torch.float64) * self.scaling
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        rows = max(1, _PART // weight.shape[1])
        for start in range(0, len(weight), rows):
            stop = start + rows
            out[start:stop] = torch.addmm(weight[start:stop].double(), up[start:stop], down)
        return out

    def _layer(self, base: BaseLayer) -> QuantizedLinear:
        """The quantized layer; that of the last call in evaluation, where nothing has changed since."""
        if self.training or torch.is_grad_enabled():
            self._known = None
            return self._made(base)
        weight = base.dense_weight(None)
        held = (weight, self.update.lora_A, self.update.lora_B)
        # The sizes of the factors too: writing through `.data` leaves no trace.
        sizes = (float(torch.linalg.vector_norm(part)) for part in held[1:])
        key = (self.scaling, weight.dtype, *((part.data_ptr(), _version(part)) for part in held), *sizes)
        if self._known is None or self._known[0] != key:
            self._known = key, self._made(base)
        return self._known[1]

    def _made(self, base: BaseLayer) -> QuantizedLinear:
        return QuantizedLinear.from_quantized(self.quantized_weight(base, base.dense_weight(None)))

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """Q(W + scaling * B A), decoded.

        Args:
            base: The layer below.
            weight: Its weight (out, in), fp32; not changed.
        """
        return self.quantized_weight(base, weight).dequantize(torch.float32)


class QatProduct(Function):
    """The product with a quantized weight, and the gradients of the factors of the sum that it was made of.

    Kept for backward: x (N, in), which layers that share an input share too, and the codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        layer: QuantizedLinear,
    ) -> Tensor:
        """For x (..., in) in the dtype of the product; to (..., out)."""
        needs_factors = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if needs_factors else None, lora_A, lora_B)
        ctx.scaling, ctx.layer, ctx.bias_dtype = scaling, layer, None if bias is None else bias.dtype
        return layer.product(x, bias, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, lora_A, lora_B and, should it train, bias."""
        x, lora_A, lora_B = ctx.saved_tensors
        grad_x = grad_A = grad_B = grad_bias = None
        with no_autocast(grad.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = ctx.layer.input_gradient(grad)
            flat = grad.reshape(-1, len(lora_B))
            if x is not None:
                dtype = torch.float32 if is_wide(x.dtype, x.device.type) else x.dtype
                rows, sums = x.reshape(-1, x.shape[-1]).to(dtype), flat.to(dtype)
                if ctx.needs_input_grad[1]:
                    grad_down = (sums @ lora_B.to(dtype)).mul_(ctx.scaling)
                    grad_A = (grad_down.t() @ rows).to(lora_A.dtype)
                if ctx.needs_input_grad[2]:
                    down = rows @ lora_A.to(dtype).t()
                    grad_B = (sums.t() @ down).to(lora_B.dtype).mul_(ctx.scaling)
            if ctx.needs_input_grad[3]:
                grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_bias, None, None


def _weight_dtype(base: BaseLayer) -> torch.dtype:
    weight: Any = base.module.weight
    dtype: torch.dtype = weight.dtype
    return dtype


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
