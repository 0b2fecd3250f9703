"""Dense layers of a model in halves on a processor that has no products of them.

There every product of bfloat16 runs in a plain loop, see `graft.kernels.wide`. A model is loaded for such a
machine with its weights in halves as ever, which is what fits, and its products made in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.kernels.wide import is_wide, wide_linear, wide_linear_backward

MIN_ROWS = 16
"""Rows of x from which making the weight wide pays; torch's plain loop keeps up with memory for fewer."""


class WideLinear(nn.Linear):
    """An `nn.Linear` whose products in halves are made in float32 where its weight is frozen.

    A weight that trains, or one on another device or in another dtype, is multiplied as torch does.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the class above
        """(..., in_features) to (..., out_features) in the input's dtype."""
        frozen = not torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters())
        if (
            frozen
            and input.dtype == self.weight.dtype
            and is_wide(input.dtype, input.device.type)
            and math.prod(input.shape[:-1]) >= MIN_ROWS
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            product: Tensor = _WideProduct.apply(input, self.weight, self.bias)
            return product
        return super().forward(input)


class _WideProduct(torch.autograd.Function):
    """The product with a frozen weight; saves nothing but the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return wide_linear(x, len(weight), lambda start, stop, out: out.copy_(weight[start:stop]), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        fill = lambda start, stop, out: out.copy_(weight[start:stop])  # noqa: E731 - shorter than a def
        return wide_linear_backward(grads[0], weight.shape[1], fill), None, None


def widen(model: Any) -> int:
    """Give a model in halves on a processor without their products layers that compute in float32, in place.

    Args:
        model: A transformers model; on other machines, devices and dtypes it stays as it is.

    Returns:
        How many linears were replaced; they keep their parameters, tied ones too.
    """
    replaced = 0
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if (
            type(module) is nn.Linear
            and isinstance(weight, Tensor)
            and is_wide(weight.dtype, weight.device.type)
        ):
            model.set_submodule(path, _in_place_of(module))
            replaced += 1
    return replaced


def _in_place_of(module: nn.Linear) -> WideLinear:
    made = WideLinear(module.in_features, module.out_features, bias=False, device="meta")
    made.weight, made.bias = module.weight, module.bias
    return made.train(module.training)
