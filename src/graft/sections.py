"""The fields of configuration dataclasses: their types, sections, sections of several kinds."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def variants(of: Callable[[], Mapping[str, type]], default: str) -> dict[str, Any]:
    """Metadata of a section of the whole file that is one of several dataclasses.

    Which one, the value of that field tells which their SHORTHAND names.

    Args:
        of: Gives the dataclasses by that value; asked on each use.
        default: The value that is taken where none is given.
    """
    return {"variants": of, "default": default}


def field_types(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The types of a dataclass's fields; of several for a section, the one that values choose.

    Args:
        cls: The dataclass.
        values: By dotted path.
    """
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kinds = _kinds(field)
        chosen = next((value for _, value in _choices(field, kinds, values) if value in kinds), None)
        found[field.name] = kinds[chosen or field.metadata["default"]] | None if kinds else hints[field.name]
    return found


def unknown_variants(
    cls: type, values: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, Mapping[str, type]]]:
    """Values that choose a kind of section there is none of.

    Yields:
        The section, the path that holds the value, the value, and what there is.
    """
    for field in dataclasses.fields(cls):
        kinds = _kinds(field)
        for path, value in _choices(field, kinds, values):
            if value not in kinds:
                yield field.name, path, value, kinds


def _kinds(field: dataclasses.Field[Any]) -> Mapping[str, type]:
    several = field.metadata.get("variants")
    found: Mapping[str, type] = several() if several is not None else {}
    return found


def _choices(
    field: dataclasses.Field[Any], kinds: Mapping[str, type], values: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    key = getattr(next(iter(kinds.values()), None), "SHORTHAND", "")
    for path in (field.name, f"{field.name}.{key}") if kinds else ():
        if isinstance(values.get(path), str):
            yield path, values[path]


def options(kind: Any) -> tuple[Any, ...]:
    """The types that a union is made of; any other type alone."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def section_of(kind: Any) -> type | None:
    """The dataclass that a field may hold."""
    return next((o for o in options(kind) if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def holds_names(kind: Any) -> bool:
    """Whether a field holds values by names of the user's own, `columns: {prompt: question}`."""
    return typing.get_origin(kind) is Mapping


def accepts(kind: Any, wanted: type) -> bool:
    """Whether a field may hold a value of a type."""
    return any(
        option is wanted or typing.get_origin(option) in (typing.Literal, tuple) for option in options(kind)
    )


def describe_type(kind: Any) -> str:
    """A field's type in words: "a whole number", "one of 'a', 'b'"."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    told = []
    for option in options(kind):
        if typing.get_origin(option) is typing.Literal:
            told.append("one of " + ", ".join(repr(arg) for arg in typing.get_args(option)))
        elif holds_names(option):
            told.append("texts by name")
        elif typing.get_origin(option) is tuple:
            told.append(f"a list of {words.get(typing.get_args(option)[0], 'values')}")
        else:
            told.append(words.get(option, f"a section ({getattr(option, '__name__', option)})"))
    return " or ".join(told)
