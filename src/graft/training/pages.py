"""How the state of an optimizer lies in pages, and what an update rule is given of one.

A page holds the state of neighbouring stretches of tensors that are treated alike: for each part of the state
one array, one after another in a flat buffer of bytes. Stretches begin at whole blocks of the rule, so that a
rule works on them wherever a tensor is cut: a block of 16 numbers is a whole number of vectors of any
processor, and torch's fused kernels compute the numbers behind the last whole vector with other roundings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

GRAIN = 4096
"""Pages hold a multiple of so many numbers (but the last ones of a treatment): whole blocks of every rule."""


@dataclass(frozen=True)
class Part:
    """One part of a state, such as a moment.

    Attributes:
        name: By which a checkpoint knows it.
        dtype: None for that of the tensor.
        numbers: Numbers of the tensor for each value of it: 1, or those of a block.
        fill: What it holds before the first update.
    """

    name: str
    dtype: torch.dtype | None = None
    numbers: int = 1
    fill: float = 0.0


class Rule(Protocol):
    """An update rule: what state it keeps, and one step with it."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of its state that lie in pages."""

    @property
    def block(self) -> int:
        """Numbers that lie under one scale, or that a vector holds."""

    @property
    def numbers(self) -> int:
        """Numbers that it updates at once on a CPU, where memory is no concern."""

    @property
    def counts(self) -> bool:
        """Whether it needs the number of updates, as bias correction does."""

    def update(self, work: Work) -> None:
        """Update the values and the state of stretches, each number once."""


class Span(NamedTuple):
    """A stretch of a tensor, flattened, and where its state begins in a page, in numbers."""

    name: str
    begin: int
    end: int
    place: int

    def within(self, part: Part) -> slice:
        """Its values in the array of a part."""
        return slice(self.place // part.numbers, -(-(self.place + self.end - self.begin) // part.numbers))

    def of_tensor(self, part: Part) -> slice:
        """The same values in the array of the whole tensor."""
        return slice(self.begin // part.numbers, -(-self.end // part.numbers))


class Kind(NamedTuple):
    """What the stretches of a page have in common."""

    rule: Rule
    rate: float
    weight_decay: float
    dtype: torch.dtype

    def bytes_per_number(self) -> float:
        """Bytes of state for each number."""
        return sum((part.dtype or self.dtype).itemsize / part.numbers for part in self.rule.parts)


class Page:
    """Stretches of one kind.

    Args:
        kind: Of them.
        spans: The stretches.
        num_numbers: Including those that fill up blocks.
    """

    def __init__(self, kind: Kind, spans: tuple[Span, ...], num_numbers: int) -> None:
        self.kind, self.spans, self.num_numbers = kind, spans, num_numbers
        ends = [0]
        for part in kind.rule.parts:
            ends.append(ends[-1] + num_numbers // part.numbers * (part.dtype or kind.dtype).itemsize)
        self._places = dict(
            zip((p.name for p in kind.rule.parts), zip(ends, ends[1:], strict=False), strict=True)
        )
        self.num_bytes = ends[-1]
        self._last: tuple[int, Views] | None = None

    def views(self, buffer: Tensor) -> Views:
        """The parts in a buffer (num_bytes,) uint8 that holds this page."""
        if self._last is None or self._last[0] != buffer.data_ptr():
            parts = {
                part.name: buffer[slice(*self._places[part.name])].view(part.dtype or self.kind.dtype)
                for part in self.kind.rule.parts
            }
            pieces = {
                part.name: [parts[part.name][span.within(part)] for span in self.spans]
                for part in self.kind.rule.parts
            }
            self._last = buffer.data_ptr(), Views(parts, pieces)
        return self._last[1]

    def clear(self, buffer: Tensor) -> None:
        """Make a buffer what the page is before the first update."""
        views = self.views(buffer)
        for part in self.kind.rule.parts:
            views.parts[part.name].fill_(part.fill)


class Views(NamedTuple):
    """Arrays of a page by part: whole, and by stretch."""

    parts: dict[str, Tensor]
    pieces: dict[str, list[Tensor]]


@dataclass
class Work:
    """What a rule is given: stretches of one page that have gradients.

    Attributes:
        spans: The stretches.
        values: Of the tensors, flat, by stretch.
        gradients: Likewise; they may be overwritten.
        parts: The whole page's arrays, by part.
        pieces: The stretches' arrays, by part.
        counts: Updates of each stretch, this one included.
        rate: The learning rate.
        weight_decay: Decoupled; 0 for none.
    """

    spans: tuple[Span, ...]
    values: list[Tensor]
    gradients: list[Tensor]
    parts: dict[str, Tensor]
    pieces: dict[str, list[Tensor]]
    counts: list[int]
    rate: float
    weight_decay: float

    def only(self, index: int) -> Work:
        """One of the stretches alone."""
        one = slice(index, index + 1)
        pieces = {name: pieces[one] for name, pieces in self.pieces.items()}
        values, gradients, counts = self.values[one], self.gradients[one], self.counts[one]
        return Work(
            self.spans[one], values, gradients, self.parts, pieces, counts, self.rate, self.weight_decay
        )


def lay_out(
    parameters: Mapping[str, Parameter], kinds: Mapping[str, Kind], numbers: Mapping[Kind, int]
) -> Iterator[Page]:
    """Cut tensors into pages, kind by kind, in the order of each kind's first tensor.

    Args:
        parameters: The tensors by name.
        kinds: Of each.
        numbers: Numbers in a page at most, by kind; multiples of `GRAIN`.
    """
    for kind in dict.fromkeys(kinds[name] for name in parameters):
        alike = ((name, p.numel()) for name, p in parameters.items() if kinds[name] == kind)
        yield from _pages(kind, alike, numbers[kind])


def _pages(kind: Kind, tensors: Iterable[tuple[str, int]], most: int) -> Iterator[Page]:
    block = kind.rule.block
    spans: list[Span] = []
    place = 0
    for name, size in tensors:
        begin = 0
        while begin < size:
            if place == most:
                yield Page(kind, tuple(spans), place)
                spans, place = [], 0
            end = min(size, begin + most - place)
            spans.append(Span(name, begin, end, place))
            place += math.ceil((end - begin) / block) * block
            begin = end
    if spans:
        yield Page(kind, tuple(spans), place)
