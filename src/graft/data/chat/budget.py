"""What a chat template may cost: one budget of characters for all that a rendering makes and goes over.

A sandbox bounds what a template reaches, not how much it works: nested loops, doubled strings and lists that
hold themselves twice take hours and gigabytes in a few lines. Here whatever can grow or repeat is charged
before it is done, so that neither time nor memory can pass the budget unseen.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import jinja2

BUDGET = 1 << 25
"""Characters that a template may make for any conversation, however short."""
PER_CHARACTER = 64
"""Characters that it may make beyond that for each character of the conversation."""
SECONDS = 10.0
"""Time of the processor after which a rendering is stopped whatever it was charged."""

_ENTRY = 16
_ITEM = 64
_MAX_BITS = 1 << 14
_NUMBERS = re.compile(r"\d+")
_LOOKS = 256


class SpentError(jinja2.TemplateError):
    """A template did more work than it may."""


class Meter:
    """The budget of one rendering after another.

    Attributes:
        left: Characters that may still be charged.
        event: What each call and each turn of a loop costs; grows with the template, since all its text may
            stand in one loop.
    """

    def __init__(self) -> None:
        self.event = _ITEM
        self.left = self._look = 0
        self._until = 0.0
        self._size: Callable[[], int] | None = None
        self.start(lambda: 0)

    def start(self, size: Callable[[], int]) -> None:
        """Begin a rendering.

        Args:
            size: Counts the characters of the conversation; asked only when the common budget is spent.
        """
        self.left, self._size = BUDGET, size
        self._look = BUDGET - max(BUDGET // _LOOKS, 16 * self.event)
        self._until = 0.0

    def charge(self, amount: int) -> None:
        """Take characters from the budget.

        Raises:
            SpentError: There are not as many left, or the time is over.
        """
        self.left -= amount
        if self.left < self._look:
            self.look()

    def look(self) -> None:
        """Look at the clock, and at what is left.

        Raises:
            SpentError: There is nothing left, or the time is over.
        """
        now = time.thread_time()
        if not self._until:
            self._until = now + SECONDS
        if now > self._until:
            raise SpentError(f"it works for more than {SECONDS:.0f} seconds on one conversation")
        if self.left < 0 and self._size is not None:
            size, self._size = self._size, None
            self.left += PER_CHARACTER * size()
        if self.left < 0:
            raise SpentError(
                f"it does more work than {BUDGET:,} characters, and {PER_CHARACTER} for each of the "
                f"conversation"
            )
        self._look = self.left - max(BUDGET // _LOOKS, 16 * self.event)
        if self._look < 0 <= self.left:
            self._look = 0

    def each(self, items: Any) -> Any:
        """What a loop goes over, each turn charged: at once where their number is known."""
        if isinstance(items, Sized):
            self.charge(self.event * (len(items) + 1))
            return items
        return self._counted(iter(items))

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.charge(self.event)
            yield item

    def made(self, value: Any) -> Any:
        """A value that was put together, charged as if written out: parts that occur twice count twice."""
        if type(value) is str:
            self.charge(len(value))
        else:
            value_size(value, self.charge)
        return value

    def read(self, value: Any) -> Any:
        """A value that is compared or searched; its size is charged."""
        if type(value) is str:
            self.charge(len(value))
        elif isinstance(value, list | tuple | dict):
            value_size(value, self.charge)
        return value

    def sized(self, value: Any) -> Any:
        """A text that was made; it is charged."""
        if isinstance(value, str | bytes):
            self.charge(len(value))
        return value


def value_size(value: Any, charge: Callable[[int], None]) -> None:
    """Charge a value as if it were written out.

    Raises:
        SpentError: It is larger than what is left.
    """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str | bytes):
            charge(_ENTRY + len(part))
        elif isinstance(part, Mapping):
            charge(_ENTRY * (1 + len(part)))
            waiting += part.keys()
            waiting += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            charge(_ENTRY * (1 + len(part)))
            waiting += part
        else:
            charge(_ENTRY)


def characters(value: Any) -> int:
    """Characters of all texts in a value, and a few for everything else in it."""
    total = 0

    def add(amount: int) -> None:
        nonlocal total
        total += amount

    value_size(value, add)
    return total


def binary(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Charge an operation before it is done.

    Raises:
        SpentError: Its result would be too large.
    """
    if operator == "%" and isinstance(left, str | bytes):
        printf(meter, left, right)
    elif operator == "%":
        return
    elif isinstance(left, Sized) and isinstance(right, Sized):
        meter.charge(_ITEM + _weight(left) + _weight(right))
    elif operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
        many, times = (left, right) if isinstance(left, Sized) else (right, left)
        if isinstance(times, int):
            meter.charge(_ITEM + max(times, 0) * _deep(meter, many))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
        if bits > _MAX_BITS:
            raise SpentError(f"it makes a number of more than {_MAX_BITS:,} bits")


def _weight(value: Any) -> int:
    return len(value) * (1 if isinstance(value, str | bytes) else _ITEM)


def _deep(meter: Meter, value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    before = meter.left
    value_size(value, meter.charge)
    return max(before - meter.left, _ITEM)


def printf(meter: Meter, form: Any, values: Any) -> None:
    """Charge `form % values`, or a `str.format` with such values.

    Raises:
        SpentError: The result would be too large, or its width is not written in the text itself.
    """
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    if "%" in text and "*" in text:
        raise SpentError("it takes the width of a field from a value")
    fields = text.count("%") + text.count("{")
    widths = sum(int(number[:9]) for number in _NUMBERS.findall(text))
    meter.charge(_ITEM + len(text) + widths)
    if fields:
        before = meter.left
        value_size(values, meter.charge)
        meter.charge(fields * max(before - meter.left, 0))


def joined(meter: Meter, separator: Any, parts: Iterable[Any]) -> list[Any]:
    """Charge a join; what was to be joined, as a list."""
    items = []
    for part in parts:
        meter.charge(_ENTRY + (len(part) if isinstance(part, str | bytes) else 0) + len(str(separator)))
        items.append(part)
    return items


def replaced(meter: Meter, text: Any, old: Any, new: Any) -> None:
    """Charge a replacement.

    Raises:
        SpentError: The result would be too large.
    """
    if not (isinstance(text, str | bytes) and isinstance(old, type(text)) and isinstance(new, type(text))):
        meter.charge(_ITEM)
        return
    times = text.count(old) if old else len(text) + 1  # type: ignore[arg-type]
    meter.charge(_ITEM + len(text) + times * len(new))


def method(meter: Meter, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Charge a call of a method of a text, bytes or number.

    Returns:
        The arguments to call it with.

    Raises:
        SpentError: The result would be too large.
    """
    if name == "join" and len(args) == 1:
        return (joined(meter, owner, args[0]),)
    if name == "replace" and len(args) >= 2:
        replaced(meter, owner, args[0], args[1])
    elif name in ("format", "format_map"):
        if isinstance(owner, str) and re.search(r"\{[^{}]*:[^{}]*\{", owner):
            raise SpentError("it takes the width of a field from a value")
        printf(meter, owner, [*args, dict(kwargs)])
    elif name in ("ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes"):
        widths = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        tabs = owner.count("\t" if isinstance(owner, str) else b"\t") if name == "expandtabs" else 1
        meter.charge(_ITEM + sum(abs(width) for width in widths) * (tabs + 1))
    elif name == "translate" and args and isinstance(args[0], Mapping):
        longest = max((len(str(value)) for value in args[0].values()), default=0)
        meter.charge(_ITEM + len(owner) * (longest + 1))
    elif name in ("from_bytes", "maketrans"):
        raise SpentError(f"it calls {name}, which no chat template needs")
    elif isinstance(owner, str | bytes):
        meter.charge(len(owner))
    return args
