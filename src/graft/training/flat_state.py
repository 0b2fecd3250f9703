"""The state of named tensors in pages: updating them, and giving out and taking back each tensor's parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from graft.errors import CheckpointError
from graft.training.pages import Page, Part, Span, Work
from graft.training.store import Store

STEP = "step"
"""The part of a state that counts updates; a number of its own, in no page."""


@dataclass(frozen=True)
class Pending:
    """A tensor of the state that is put together when it is asked for.

    Attributes:
        dtype: Of it.
        shape: Of it.
        load: Makes it, in host memory, as a copy.
    """

    dtype: torch.dtype
    shape: torch.Size
    load: Callable[[], Tensor]


class FlatState:
    """Named tensors, the pages that their state lies in, and where the pages are.

    Args:
        parameters: The tensors by name, on one device; one that is not contiguous becomes so.
        pages: From `lay_out`.
        store: Holds them, in their order.
    """

    def __init__(self, parameters: Mapping[str, Parameter], pages: Sequence[Page], store: Store) -> None:
        self._parameters, self._pages, self._store = parameters, pages, store
        self._homes: dict[str, list[tuple[int, Span]]] = {}
        for index, page in enumerate(pages):
            for span in page.spans:
                self._homes.setdefault(span.name, []).append((index, span))
        self._owners = [[parameters[span.name] for span in page.spans] for page in pages]
        self._counts: dict[str, int] = {}
        self._flat: dict[int, tuple[list[int], list[Tensor]]] = {}

    @torch.no_grad()
    def step(self, learning_rate: float, factors: Mapping[str, float]) -> None:
        """Update every tensor that has a gradient once.

        Args:
            learning_rate: Of tensors whose rate is 1.
            factors: What gradients are multiplied by before, by name; those without stay as they are.
        """
        counts = self._counts
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                counts[name] = counts.get(name, 0) + 1
        due = [index for index, owners in enumerate(self._owners) if any(p.grad is not None for p in owners)]
        for index, buffer in self._store.visit(due):
            work = self._work(index, buffer, learning_rate)
            if factors:
                torch._foreach_mul_(work.gradients, [factors.get(span.name, 1.0) for span in work.spans])
            self._pages[index].kind.rule.update(work)

    def _work(self, index: int, buffer: Tensor, learning_rate: float) -> Work:
        page, owners = self._pages[index], self._owners[index]
        views, values, spans = page.views(buffer), self._values(index), page.spans
        pieces = views.pieces
        served = [place for place, owner in enumerate(owners) if owner.grad is not None]
        if len(served) < len(spans):
            spans, owners = tuple(spans[p] for p in served), [owners[p] for p in served]
            values = [values[place] for place in served]
            pieces = {name: [pieces[name][place] for place in served] for name in pieces}
        flat = [_stretch(o.grad, span) for o, span in zip(owners, spans, strict=True) if o.grad is not None]
        counts = [self._counts[span.name] for span in spans]
        rate = learning_rate * page.kind.rate
        return Work(spans, values, flat, views.parts, pieces, counts, rate, page.kind.weight_decay)

    def _values(self, index: int) -> list[Tensor]:
        """Flat views of a page's stretches, made again where a tensor's memory is another one."""
        owners = self._owners[index]
        if index not in self._flat or self._flat[index][0] != [owner.data_ptr() for owner in owners]:
            for owner in owners:
                if not owner.is_contiguous():
                    owner.data = owner.data.contiguous()
            spans = zip(owners, self._pages[index].spans, strict=True)
            views = [_stretch(owner.detach(), span) for owner, span in spans]
            self._flat[index] = [owner.data_ptr() for owner in owners], views
        return self._flat[index][1]

    # State by name.

    def parts(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each part of a tensor's state, once it has one."""
        parameter = self._parameters[name]
        rule = self._rule_parts(name)
        found = {STEP: (torch.Size(), torch.float32)} if self._counted(name) else {}
        return found | {part.name: (_shape(part, parameter), part.dtype or parameter.dtype) for part in rule}

    def state(self, name: str) -> dict[str, Pending]:
        """The parts of a tensor's state; none before its first update."""
        if name not in self._counts:
            return {}
        rule = {part.name: part for part in self._rule_parts(name)}
        return {
            what: Pending(dtype, shape, partial(self._gather, name, rule.get(what), shape))
            for what, (shape, dtype) in self.parts(name).items()
        }

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit.

        Raises:
            CheckpointError: A part is missing, too many, or of another shape or dtype.
        """
        _check_parts(name, self.parts(name), state)
        # Without a count of its own, a state that is there has seen an update.
        self._counts[name] = int(state[STEP]) if STEP in state else 1
        for index, span in self._homes[name]:
            views = self._pages[index].views(self._store.page(index, change=True))
            for part in self._rule_parts(name):
                stored = state[part.name].reshape(-1)[span.of_tensor(part)]
                views.parts[part.name][span.within(part)].copy_(stored)

    def in_order(self) -> Iterator[str]:
        """Names of the tensors as their state lies in the pages."""
        return iter(self._homes)

    def _gather(self, name: str, part: Part | None, shape: torch.Size) -> Tensor:
        if part is None:
            return torch.tensor(float(self._counts[name]), dtype=torch.float32)
        dtype = part.dtype or self._parameters[name].dtype
        found = torch.empty(shape.numel(), dtype=dtype, device="cpu")
        for index, span in self._homes[name]:
            views = self._pages[index].views(self._store.page(index, change=False))
            found[span.of_tensor(part)].copy_(views.parts[part.name][span.within(part)])
        return found.view(shape)

    def _rule_parts(self, name: str) -> tuple[Part, ...]:
        return self._pages[self._homes[name][0][0]].kind.rule.parts

    def _counted(self, name: str) -> bool:
        return self._pages[self._homes[name][0][0]].kind.rule.counts


def _stretch(tensor: Tensor, span: Span) -> Tensor:
    flat = (tensor if tensor.is_contiguous() else tensor.contiguous()).view(-1)
    return flat if span.end - span.begin == flat.numel() else flat[span.begin : span.end]


def _shape(part: Part, parameter: Tensor) -> torch.Size:
    if part.numbers == 1:
        return parameter.shape
    return torch.Size([math.ceil(parameter.numel() / part.numbers)])


def _check_parts(
    name: str, wanted: Mapping[str, tuple[torch.Size, torch.dtype]], state: Mapping[str, Tensor]
) -> None:
    for part in dict.fromkeys([*wanted, *state]):
        value = state.get(part)
        if part not in wanted:
            what = "belongs to another optimizer"
        elif value is None or (value.shape, value.dtype) != wanted[part]:
            shape, dtype = wanted[part]
            what = f"is missing or not {dtype} of shape {tuple(shape)}"
        else:
            continue
        raise CheckpointError(
            f"optimizer state {name}|{part} {what}",
            fix="the checkpoint belongs to another configuration; start a new run",
        )
