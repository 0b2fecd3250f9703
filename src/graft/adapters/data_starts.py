"""What data tells of layers: moments of their inputs, gradients of their weights. For starts of adapters.

Both are matrices of a layer's size in float32, so layers are done in groups that fit a budget, with one pass
over the batches for each group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.attached import disabled
from graft.adapters.factorize import randomized_svd
from graft.models.layers import BaseLayer

GROUP_BYTES = 2 << 30
"""Largest sum of the matrices of a group; a larger matrix is a group of its own."""

IGNORED = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True)
class Pass:
    """One batch of data as a start sees it."""

    loss: Callable[[nn.Module], Tensor]
    """Runs the batch through a model; the loss, a scalar."""
    counted: Tensor | None = None
    """(rows, tokens), true where an input counts; None for everywhere."""


def pass_of(batch: Mapping[str, Any] | Pass) -> Pass:
    """A batch as a pass: a mapping is what a transformers model takes, labels among it.

    Inputs of tokens that are padding (attention_mask) or not learned (labels) do not count.
    """
    if isinstance(batch, Pass):
        return batch
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    counted = None if labels is None else labels != IGNORED
    if mask is not None and mask.dim() == 2:
        counted = mask.bool() if counted is None else counted & mask.bool()

    def loss(model: nn.Module) -> Tensor:
        found: Tensor | None = model(**batch).loss
        return torch.zeros(()) if found is None else found

    return Pass(loss, counted)


class Moments:
    """Sums over the inputs of a layer: how many, of them, and of their products.

    Args:
        width: Length of an input.
        device: Where the layer is.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, device=device)

    def add(self, inputs: Tensor) -> None:
        """Count some inputs, (n, width)."""
        wide = inputs.float()
        self.count += len(wide)
        self.total += wide.sum(0, dtype=torch.float64)
        self.products.addmm_(wide.t(), wide)

    def directions(self, number: int) -> tuple[Tensor, Tensor]:
        """The directions in which the inputs vary most, and their shares of the variance, falling.

        Args:
            number: How many at most.

        Returns:
            Orthonormal rows (k, width), and (k,); fewer than asked for where there are fewer inputs.

        Cost: a randomized decomposition in float64.
        """
        mean = self.total / max(self.count, 1)
        spread = self.products.double() - self.count * torch.outer(mean, mean)
        kept = min(number, max(self.count - 1, 0))
        _, values, rows = randomized_svd(spread, kept)
        return rows.float(), values / spread.trace().clamp(min=1e-300)


def input_moments(
    model: nn.Module, targets: Mapping[str, BaseLayer], passes: Sequence[Pass]
) -> Iterator[tuple[str, Moments]]:
    """Moments of the inputs of layers; layers that are given the same tensor share them.

    Args:
        model: Computes as its base, in eval mode; afterwards it is as it was.
        targets: The layers by path.
        passes: The data.

    Yields:
        Each path with its moments, in the order of `targets`. They are let go with the next group.
    """
    sizes = {path: 4 * base.in_features**2 for path, base in targets.items()}
    for group in _groups(sizes):
        inputs = _Inputs(targets)
        with torch.no_grad():
            for one in passes:
                inputs.begin(one)
                with _watched(model, targets, group, inputs.take):
                    one.loss(model)
        for path in group:
            yield path, inputs.moments(path)


class _Inputs:
    """Takes the inputs of layers, those of several layers that are one tensor once."""

    def __init__(self, targets: Mapping[str, BaseLayer]) -> None:
        self._targets = targets
        self._found: dict[str, Moments] = {}
        self._leaders: dict[str, str] = {}
        self._counted: Tensor | None = None
        self._latest: tuple[str, Tensor] | None = None

    def begin(self, one: Pass) -> None:
        self._counted, self._latest = one.counted, None

    def take(self, path: str, x: Tensor, output: Tensor) -> None:
        if path not in self._leaders:
            latest = self._latest
            shared = latest is not None and latest[1] is x
            self._leaders[path] = self._leaders[latest[0]] if latest is not None and shared else path
        self._latest = path, x
        if self._leaders[path] == path:
            base = self._targets[path]
            if path not in self._found:
                self._found[path] = Moments(base.in_features, base.device)
            self._found[path].add(_rows(x, self._counted))

    def moments(self, path: str) -> Moments:
        base = self._targets[path]
        found = self._found.get(self._leaders.get(path, path))
        return Moments(base.in_features, base.device) if found is None else found


def weight_gradients(
    model: nn.Module, targets: Mapping[str, BaseLayer], passes: Sequence[Pass]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients of the summed losses by the weights of layers, whatever these are stored in.

    Args:
        model: Computes as its base, in eval mode; afterwards it is as it was.
        targets: The layers by path; no embeddings.
        passes: The data.

    Yields:
        Each path with dL/dW (out, in), float32, in the order of `targets`.
    """
    sizes = {path: 4 * base.in_features * base.out_features for path, base in targets.items()}
    for group in _groups(sizes):
        gradients = _Gradients({path: targets[path] for path in group})
        with torch.enable_grad():
            for one in passes:
                with _watched(model, targets, group, gradients.take):
                    one.loss(model).backward()
        for path in group:
            yield path, gradients.found.pop(path)


class _Gradients:
    """Takes gradients of outputs and multiplies them with the inputs: sums of the weights' gradients."""

    def __init__(self, targets: Mapping[str, BaseLayer]) -> None:
        self.found = {
            path: torch.zeros(base.out_features, base.in_features, device=base.device)
            for path, base in targets.items()
        }

    def take(self, path: str, x: Tensor, output: Tensor) -> None:
        inputs = x.detach().reshape(-1, x.shape[-1])

        def add(gradient: Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1]).float()
            self.found[path].addmm_(flat.t(), inputs.float())

        if not output.requires_grad:  # nothing before it learns: the graph begins here
            output.requires_grad_()
        output.register_hook(add)


def _rows(x: Tensor, counted: Tensor | None) -> Tensor:
    x = x.detach()
    if counted is not None and counted.shape == x.shape[:-1]:
        return x[counted.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for path, size in sizes.items():
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    if group:
        yield group


@contextlib.contextmanager
def _watched(
    model: nn.Module,
    targets: Mapping[str, BaseLayer],
    group: Sequence[str],
    take: Callable[[str, Tensor, Tensor], None],
) -> Iterator[None]:
    """Within the block the model is its frozen base in eval mode, and each call of a layer is told."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, given, output: take(path, given[0], output)

    modes = [(module, module.training) for module in model.modules()]
    learning = [p for p in model.parameters() if p.requires_grad]
    handles = [targets[path].module.register_forward_hook(hook(path)) for path in group]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        with disabled(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
