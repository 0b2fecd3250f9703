"""Norms and gated MLPs that keep less for the backward pass: instances that stand in for a model's own.

What transformers' modules leave behind for each token of a block of Llama's kind, in numbers: the norm's
input once more in float32, its output, silu(gate), and silu(gate) * up. The stand-ins keep the norm's input,
gate and up, which are needed in any case, and make the rest again by the same operations: outputs have the
same bits, gradients too but for the order in which a norm's parts join that of the residual. Where graft has
kernels for them (bfloat16 on a CPU) they make each in one pass, and a norm's sums come in another order.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graft import kernels
from graft.errors import ModelError
from graft.kernels.cpu.elementwise import is_compiled
from graft.kernels.reference_elementwise import rms_norm
from graft.models.recipes import Cheap, Recipes, autocast_now
from graft.models.stand_in import StandIn
from graft.models.tiled import TiledMLP

_NORM = re.compile(r"(?:RMS|Layer)Norm$")

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""The children of an MLP that computes down_proj(act_fn(gate_proj(x)) * up_proj(x))."""

_CHUNK_ELEMENTS = 1 << 17
"""Numbers that a norm's backward pass works on at a time, so that they stay in a core's cache."""


class LeanNorm(StandIn):
    """A norm over the last dimension that keeps its input, in the input's dtype, and nothing else."""

    def __init__(self, original: nn.Module, recipes: Recipes) -> None:
        super().__init__(original, recipes)
        self.__dict__["eps"] = _eps_of_rms(original)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size), as the original has it."""
        if not torch.is_grad_enabled():
            result: Tensor = self.original(x)
            return result
        trained = [p for p in self.original.parameters() if p.requires_grad]
        if self.eps is not None and not trained and is_compiled(x):
            weight, eps = self.weight, self.eps
            output: Tensor = _RmsNorm.apply(x, weight, eps)
            self.recipes.note("norm", output, lambda x: kernels.call("rms_norm", x, weight, eps=eps), x)
            return output
        output = _Recomputed.apply(x, self.original, *trained)
        self.recipes.note("norm", output, self.original, x)
        return output


def _eps_of_rms(module: Any) -> float | None:
    """What a norm adds to its mean square, where it is plain RMSNorm in bfloat16, by a probe to the bit."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or parameters.keys() != {"weight"}:
        return None
    weight = parameters["weight"]
    if not is_compiled(weight):
        return None
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    with torch.no_grad():
        return eps if torch.equal(module(x), rms_norm(x, weight, eps=eps)) else None


class _RmsNorm(torch.autograd.Function):
    """RMSNorm under a frozen weight; keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        result: Tensor = kernels.call("rms_norm", x, weight, eps=eps)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return kernels.call("rms_norm_backward", grads[0], *ctx.saved_tensors, eps=ctx.eps), None, None


class _Recomputed(torch.autograd.Function):
    """A cheap module whose backward pass begins with its forward pass, a part of the rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, *trained: Tensor) -> Tensor:
        ctx.module, ctx.precision = module, autocast_now(x.device.type)
        ctx.save_for_backward(x, *trained)
        result: Tensor = module(x)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *trained = ctx.saved_tensors
        with torch.enable_grad(), ctx.precision():
            if trained:
                leaf = x.detach().requires_grad_()
                found = torch.autograd.grad(ctx.module(leaf), [leaf, *trained], grads[0])
                return found[0], None, *found[1:]
            rows, upper = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
            result = torch.empty_like(rows)
            size = max(1, _CHUNK_ELEMENTS // x.shape[-1])
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                leaf = rows[part].detach().requires_grad_()
                (result[part],) = torch.autograd.grad(ctx.module(leaf), leaf, upper[part])
        return result.view(x.shape), None


class GatedMLP(StandIn):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)) that keeps gate_proj's and up_proj's outputs only."""

    def __init__(self, original: nn.Module, recipes: Recipes) -> None:
        super().__init__(original, recipes)
        probe = torch.linspace(-9, 9, 256)
        is_silu = torch.equal(original.act_fn(probe), functional.silu(probe))  # type: ignore[operator]
        self.__dict__["is_silu"] = is_silu

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden size) to (..., hidden size)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        act: Cheap = self.act_fn
        if not torch.is_grad_enabled():
            result: Tensor = self.down_proj(act(gate) * up)
            return result
        again: Cheap
        if self.is_silu and is_compiled(gate):
            inner: Tensor = _SiluProduct.apply(gate, up)
            again = functools.partial(kernels.call, "silu_product")
        else:
            inner = _Gated.apply(gate, up, act)
            again = lambda gate, up: act(gate) * up  # noqa: E731 - shorter than a def
        self.recipes.note("gated", inner, again, gate, up)
        output: Tensor = self.down_proj(inner)
        return output


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up in one pass, forward and backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        result: Tensor = kernels.call("silu_product", gate, up)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor, Tensor] = kernels.call("silu_product_backward", grads[0], *ctx.saved_tensors)
        return found


class _Gated(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Cheap) -> Tensor:
        ctx.act, ctx.precision = act, autocast_now(gate.device.type)
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad = grads[0]
        with torch.enable_grad(), ctx.precision():
            leaf = gate.detach().requires_grad_()
            active = ctx.act(leaf)
            (grad_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return grad_gate, grad * active.detach(), None


@contextlib.contextmanager
def lean(
    model: nn.Module, recipes: Recipes, without: Sequence[str] = (), tile: int | None = None
) -> Iterator[int]:
    """Within the block the model's norms and gated MLPs are stand-ins; afterwards its own modules are back.

    Args:
        model: A transformers model, with adapters or without. Names of parameters stay what they are.
        recipes: Told how what is not kept is made; its hooks go around the forward pass.
        without: Paths of modules that stay as they are, with all inside: those that are run with other
            parameters than their own, which would not be there in the backward pass.
        tile: Tokens that a gated MLP works on at a time, see `TiledMLP`; None for all.

    Yields:
        How many modules were replaced.

    Raises:
        ModelError: A tile is given, and the model has no gated MLP.
    """
    replaced = {
        path: (module, stand_in)
        for path, module in model.named_modules()
        if not any(path == kept or path.startswith(f"{kept}.") for kept in without)
        and (stand_in := _stand_in(module, recipes, tile)) is not None
    }
    if tile is not None and not any(isinstance(new, TiledMLP) for _, new in replaced.values()):
        _refuse_tile(model, tile)
    try:
        for path, (_, stand_in) in replaced.items():
            model.set_submodule(path, stand_in)
        yield len(replaced)
    finally:
        for path, (module, stand_in) in replaced.items():
            module.training = stand_in.training
            model.set_submodule(path, module)


def _refuse_tile(model: nn.Module, tile: int) -> NoReturn:
    raise ModelError(
        f"no MLP of {type(model).__name__} can work on {tile} tokens at a time: none that is not trained "
        "whole is a gate, an up and a down projection and nothing else",
        where="training.mlp_tile",
        fix="leave it out; training.gradient_checkpointing=full saves memory on any model",
    )


def _stand_in(module: nn.Module, recipes: Recipes, tile: int | None) -> nn.Module | None:
    children = dict(module.named_children())
    if not children and _NORM.search(type(module).__name__):
        return LeanNorm(module, recipes)
    if children.keys() == GATED and _is_plainly_gated(module):
        return GatedMLP(module, recipes) if tile is None else TiledMLP(module, recipes, tile)
    return None


def _is_plainly_gated(module: Any) -> bool:
    """Whether an MLP computes what its children's names say; a probe through both tells, bit for bit."""
    probe = next(p for p in module.down_proj.parameters())
    width = module.gate_proj.in_features
    dtype = getattr(module.gate_proj, "compute_dtype", None) or probe.dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    x = torch.linspace(-1, 1, 2 * width, device=probe.device).view(1, 2, width).to(dtype)
    was_training = module.training
    try:
        module.eval()  # no dropout
        with torch.no_grad():
            named = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
            return bool(torch.equal(module(x), named))
    finally:
        module.train(was_training)
