"""What chat templates find in the sandbox: globals and filters, charged where they can grow."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sized
from typing import Any

import jinja2
from jinja2.utils import Namespace

from graft.data.chat import budget
from graft.data.chat.budget import Meter, SpentError

_MAX_DIGITS = 4096
_MAX_SEPARATOR = 16
_NESTING = frozenset(("batch", "slice", "groupby", "pprint", "string"))
_HARMLESS = frozenset(
    [
        "abs",
        "attr",
        "count",
        "d",
        "default",
        "first",
        "float",
        "last",
        "length",
        "lower",
        "random",
        "round",
        "safe",
        "trim",
        "upper",
        "capitalize",
    ]
)


def charged(meter: Meter, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged before and after; the same filter where it cannot make anything larger."""
    if name in _HARMLESS:
        return filter
    at = 1 if hasattr(filter, "jinja_pass_arg") else 0

    @functools.wraps(filter)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter.charge(64)
        value, rest = _before(meter, name, args[at], args[at + 1 :], kwargs)
        return meter.sized(filter(*args[:at], value, *rest, **kwargs))

    return run


class Dict:
    """`dict`, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Make a dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class SafeNamespace(Namespace):
    """`namespace`, which stores nothing under a private name."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Written out it could hold itself, or others many times over.
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a private name is stored: {name!r}")


def raise_exception(message: str) -> None:
    """Refuse the conversation.

    Raises:
        jinja2.TemplateError: Always.
    """
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """A value as JSON, for a model and not for a web page: nothing is escaped.

    Raises:
        SpentError: The separators are long.
    """
    if separators and sum(map(len, separators)) > _MAX_SEPARATOR:
        raise SpentError(f"it writes JSON with separators of more than {_MAX_SEPARATOR} characters")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _before(meter: Meter, name: str, value: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Charge a filter before it runs.

    Raises:
        SpentError: It would make too much.
    """
    given = (*rest, *kwargs.values())
    numbers = [abs(each) for each in given if isinstance(each, int) and not isinstance(each, bool)]
    wide = [len(each) for each in given if isinstance(each, str)]
    if name == "replace" and len(rest) >= 2:
        budget.replaced(meter, str(value), str(rest[0]), str(rest[1]))
    elif name == "format":
        budget.printf(meter, value, [*rest, dict(kwargs)])
    elif name == "join":
        return budget.joined(meter, rest[0] if rest else kwargs.get("d", ""), value), rest
    elif name == "int" and isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise SpentError(f"it reads a number of more than {_MAX_DIGITS:,} digits")
    elif name in _NESTING or (name == "tojson" and (numbers or wide)):
        meter.made(value)
    if numbers or wide:
        meter.charge(64 * sum(numbers) + (sum(numbers) + sum(wide)) * _lines(name, value))
    if isinstance(value, str | bytes):
        meter.charge(len(value))
    elif isinstance(value, Sized):
        meter.charge(64 * len(value))
    elif isinstance(value, Iterator):
        return meter.each(value), rest
    return value, rest


def _lines(name: str, value: Any) -> int:
    """How often a filter may write its width or its text, at most."""
    if name == "tojson":
        return _depth(value)
    if not isinstance(value, str):
        return 1
    return len(value) + 1 if name in ("wordwrap", "urlize") else value.count("\n") + 1


def _depth(value: Any) -> int:
    """Lines times depth of a value written with indents, at most."""
    parts, depth, waiting = 0, 0, [value]
    while waiting:
        depth += 1
        inner: list[Any] = []
        for part in waiting:
            parts += 1
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list | tuple):
                inner += part
        waiting = inner
    return parts * depth
