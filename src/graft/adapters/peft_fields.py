"""Values of an adapter_config.json: read with their types checked, and shown in errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft.errors import AdapterError


class Field:
    """Reads typed fields of a configuration, naming file and field where the type is wrong.

    Args:
        raw: The content of the file.
        path: The file.
    """

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def read(self, name: str, kind: Callable[[Any], Any], default: Any) -> Any:
        """The value of a field; the default where it is missing or null.

        Args:
            name: The field.
            kind: Makes the value ours, or raises a TypeError that says what is wanted.
            default: In its place.

        Raises:
            AdapterError: The value is of another type.
        """
        value = self.raw.get(name)
        if value is None:
            return default
        try:
            return kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterError(
                f"{name} = {shown(value)} is not {error}",
                where=f"{self.path}: {name}",
                fix="mend adapter_config.json, or save the adapter again",
            ) from error


def whole(value: Any) -> int:
    """A whole number.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def number(value: Any) -> float:
    """A finite number.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("a finite number")
    return float(value)


def flag(value: Any) -> bool:
    """A truth value.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def names(value: Any) -> str | tuple[str, ...]:
    """A name or an expression, or a list of names."""
    return value if isinstance(value, str) else list_of_names(value)


def list_of_names(value: Any) -> tuple[str, ...]:
    """A list of names.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise TypeError("a list of names")
    return tuple(value)


def integers(value: Any) -> tuple[int, ...]:
    """A whole number or several."""
    return tuple(whole(item) for item in (value if isinstance(value, list) else [value]))


def pattern(kind: Callable[[Any], float]) -> Callable[[Any], tuple[str, ...]]:
    """A mapping of patterns to numbers, as "regex=number" items."""

    def read(value: Any) -> tuple[str, ...]:
        if not isinstance(value, dict):
            raise TypeError("a mapping of patterns to numbers")
        return tuple(f"{key}={kind(number)!r}" for key, number in value.items())

    return read


def tokens(value: Any) -> tuple[int, ...]:
    """Numbers of tokens, plain or under the name of the one embedding that they are of.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(value, dict):
        if len(value) != 1:
            raise TypeError("a list of tokens of one embedding")
        value = next(iter(value.values()))
    if not isinstance(value, list):
        raise TypeError("a list of tokens")
    return tuple(whole(item) for item in value)


def one_of(*words: str) -> Callable[[Any], str]:
    """One of some words."""

    def read(value: Any) -> str:
        if value not in words:
            raise TypeError(f"one of {', '.join(words)}")
        return str(value)

    return read


def chosen_ranks(value: Any) -> tuple[str, ...]:
    """AdaLoRA's lists of which ranks are left, by the name of a layer's lora_E, as "path=rank" items.

    Raises:
        TypeError: It is something else.
    """
    fits = isinstance(value, dict) and all(
        isinstance(left, list) and all(isinstance(one, bool) for one in left) for left in value.values()
    )
    if not fits:
        raise TypeError("a mapping of names to lists of true and false")
    return tuple(f"{name.removesuffix('.lora_E')}={sum(left)}" for name, left in value.items())


def shown(value: Any) -> str:
    """A value as JSON, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(number: float) -> int | float:
    """A whole number without its point."""
    return int(number) if number == int(number) else number
