"""From YAML, flags and --set to frozen dataclasses, with every problem told at once.

A configuration is a tree of sections. Each leaf remembers where it came from (file and line, or flag), so
that an error can point there. Names of other tools are accepted and answered with ours. What the
sections mean is not known here: each room keeps the dataclass of what it configures.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graft.dialects import ALIASES, SWITCHES, own_path, own_value
from graft.errors import ConfigError
from graft.sections import (
    accepts,
    describe_type,
    field_types,
    holds_names,
    options,
    section_of,
    unknown_variants,
)

T = TypeVar("T")


@dataclasses.dataclass
class Settings:
    """Values by dotted path, each with its origin.

    Attributes:
        values: "training.batch_size" -> 8.
        origins: "training.batch_size" -> "run.yaml line 14" or "--batch-size".
        notes: What was read under another name, for the user to see.
        problems: What is wrong so far; raised together by `build`.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[ConfigError] = dataclasses.field(default_factory=list)

    def put(self, path: str, value: Any, origin: str) -> None:
        """Set one value; a foreign name becomes ours and leaves a note.

        A name in `ALIASES` is understood alone or inside a section ("adapter.lora_alpha").
        """
        if isinstance(value, datetime.date):  # what YAML makes of 2026-11-30; fields have it as text
            value = value.isoformat()
        leaf = path.rsplit(".", 1)[-1]
        if leaf in SWITCHES and _as_bool(value) is not None:
            if _as_bool(value) not in SWITCHES[leaf]:
                self.notes.append(f"{path} ({origin}) changes nothing here: it is so unless asked for")
                return
            ours, value = SWITCHES[leaf][_as_bool(value)]
            self.notes.append(f"{path} ({origin}) is {ours} here; set to {value!r}")
            path = ours
        elif (ours := own_path(path)) != path:
            self.notes.append(f"{path} ({origin}) is {ours} here")
            path = ours
        try:
            ours = own_value(path, value)
        except ConfigError as error:
            self.problems.append(ConfigError(error.what, where=origin, fix=error.fix))
            return
        if ours is not value:
            self.notes.append(f"{path}: {value} ({origin}) is {ours} here")
            value = ours
        # load_in_4bit with bnb_4bit_quant_type: nf4 says one thing twice; of repeated flags the last wins.
        agrees = (leaf in SWITCHES or leaf in ALIASES) and self.values.get(path) == value
        if path in self.values and not agrees and not origin.startswith("--"):
            where = f"{self.origins[path]} and {origin}"
            self.problems.append(ConfigError(f"{path} is given twice", where=where, fix="keep one of them"))
        self.values[path] = value
        self.origins[path] = origin

    def update(self, other: Settings) -> None:
        """Lay other settings over these; later ones win."""
        for path in other.values:
            for known in [known for known in self.values if known.startswith(path + ".")]:
                del self.values[known]
            for section in _parents(path):
                if self.values.get(section) is None:
                    self.values.pop(section, None)
        self.values.update(other.values)
        self.origins.update(other.origins)
        self.notes += other.notes
        self.problems += other.problems


def closest(name: str, names: Iterable[str]) -> str:
    """The name most like `name`, or "" where none is near."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else ""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A fix for an unknown name: the closest one, or the list."""
    names = sorted(names)
    near = closest(name, names)
    return f"did you mean {near!r}?" if near else f"one of: {', '.join(names)}"


def read_yaml(path: str | os.PathLike[str]) -> Settings:
    """Read a YAML file into settings.

    Args:
        path: The file. Only plain data: no tags, no aliases (an alias can make a small file explode).

    Raises:
        ConfigError: Missing file, bad syntax, a duplicate key, a tag or an alias; with the line.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError("no such file", where=str(path), fix=did_you_mean(path.name, siblings)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), fix="check the file") from error
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(
                    f"the alias *{event.anchor} is not accepted",
                    where=_place(path, event.start_mark),
                    fix="write the value out",
                )
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"not YAML: {problem}", where=_place(path, mark), fix="mend the syntax there"
        ) from error
    settings = Settings()
    if root is not None:
        _walk(root, "", path.name, settings)
    return settings


def _place(path: Path, mark: Any) -> str:
    return str(path) if mark is None else f"{path} line {mark.line + 1} column {mark.column + 1}"


def _walk(node: Any, path: str, file: str, settings: Settings) -> None:
    import yaml

    where = f"{file} line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        loader = yaml.SafeLoader("")
        try:
            value = loader.construct_object(node, deep=True)
        except yaml.constructor.ConstructorError as error:
            settings.problems.append(
                ConfigError(f"{path or 'the file'}: {error.problem}", where=where, fix="use plain values")
            )
            return
        if not path:
            settings.problems.append(
                ConfigError(
                    f"a mapping is needed, not {value!r}", where=where, fix="see `graft train --help`"
                )
            )
            return
        settings.put(path, value, where)
        return
    seen: set[str] = set()
    if path and not node.value:
        settings.put(path, {}, where)
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in seen:
            line = f"{file} line {key_node.start_mark.line + 1}"
            settings.problems.append(
                ConfigError(f"{key!r} is given twice", where=line, fix="keep one of them")
            )
        seen.add(key)
        _walk(value_node, f"{path}.{key}" if path else key, file, settings)


def read_assignments(assignments: Iterable[str]) -> Settings:
    """Read `--set section.key=value` words; values are read as YAML.

    Raises:
        ConfigError: A word without `=`, or a value that is not YAML.
    """
    import yaml

    settings = Settings()
    for word in assignments:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"{word!r} is not section.key=value", where="--set", fix="--set training.seed=1"
            )
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{text!r} is not a YAML value", where=f"--set {path}", fix="quote it"
            ) from error
        if isinstance(value, dict):
            for key, inner in value.items():
                settings.put(f"{path}.{key}", inner, f"--set {path}")
        else:
            settings.put(path, value, f"--set {path}")
    return settings


def build(cls: type[T], settings: Settings) -> T:
    """Make a configuration dataclass from settings.

    Args:
        cls: A frozen dataclass whose fields are plain values or other such dataclasses (sections). Its
            `fill_in`, where it has one, may add values that follow from others.
        settings: Values by dotted path.

    Returns:
        The dataclass, with nested sections built; sections that were not given take their defaults.

    Raises:
        ConfigError: Unknown names, wrong types, values out of range: all of them in one error.
    """
    fill_in = getattr(cls, "fill_in", None)
    settings = fill_in(settings) if fill_in else settings
    problems = list(settings.problems)
    for section, path, chosen, kinds in list(unknown_variants(cls, settings.values)):
        what = f"unknown {path.replace('.', ' ')} {chosen!r}"
        problems.append(ConfigError(what, where=settings.origins[path], fix=did_you_mean(chosen, kinds)))
        for inner in [known for known in settings.values if f"{known}.".startswith(f"{section}.")]:
            del settings.values[inner]  # which fields it may have is not known
    tree = _nest(settings, cls, problems)
    value = _construct(cls, tree, "", settings, problems)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration", problems=problems)
    assert value is not None
    return value


def _nest(settings: Settings, cls: type, problems: list[ConfigError]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in settings.values.items():
        names, kind, node = path.split("."), cls, tree
        for depth, name in enumerate(names):
            fields = field_types(kind, settings.values)
            if name not in fields:
                problems.append(_unknown(path, ".".join(names[:depth]), name, fields, settings))
                break
            section = section_of(fields[name])
            if depth < len(names) - 1 and holds_names(fields[name]):
                node[name] = {**(node.get(name) or {}), ".".join(names[depth + 1 :]): value}
                break
            if depth == len(names) - 1:
                if isinstance(value, dict) and section is None and not holds_names(fields[name]):
                    problems.append(
                        ConfigError(f"{path} takes a value, not a section", where=settings.origins[path])
                    )
                    break
                node[name] = value
            elif section is None:
                where = settings.origins[path]
                problems.append(ConfigError(f"{'.'.join(names[: depth + 1])} is not a section", where=where))
                break
            else:
                inner = node.get(name)
                node[name] = inner if isinstance(inner, dict) else _shorthand(section, inner)
                node, kind = node[name], section
    return tree


def _shorthand(section: type, value: Any) -> dict[str, Any]:
    """A section may be written as one word for its field of that role (`quantization: nf4`)."""
    name = getattr(section, "SHORTHAND", None)
    return {name: value} if name and isinstance(value, str) else {}


def _construct(
    cls: type[T], tree: dict[str, Any], path: str, settings: Settings, problems: list[ConfigError]
) -> T | None:
    import pydantic

    values: dict[str, Any] = {}
    fields, before = field_types(cls, settings.values), len(problems)
    for name, value in tree.items():
        full = f"{path}.{name}" if path else name
        section = section_of(fields[name])
        if section is not None and isinstance(value, str) and getattr(section, "SHORTHAND", None):
            value = _shorthand(section, value)
        if section is not None and isinstance(value, dict):
            values[name] = _construct(section, value, full, settings, problems)
            continue
        try:
            _refuse_bool(value, fields[name])
            values[name] = pydantic.TypeAdapter(fields[name]).validate_python(_untext(value, fields[name]))
        except (pydantic.ValidationError, TypeError) as error:
            several = error.errors() if isinstance(error, pydantic.ValidationError) else [{"msg": str(error)}]
            told = "; ".join(sorted({item["msg"] for item in several}))
            problems.append(
                ConfigError(
                    f"{full} = {value!r}: {told[0].lower()}{told[1:]}",
                    where=_origin(settings, full),
                    fix=f"{full} takes {describe_type(fields[name])}",
                )
            )
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        error.where = _origin(settings, error.where)
        problems.append(error)
    except TypeError as error:
        problems.append(
            ConfigError(f"{path or 'the configuration'}: {error}", where=path, fix="add what is missing")
        )
    return None


def _origin(settings: Settings, path: str) -> str:
    inner = (origin for known, origin in settings.origins.items() if known.startswith(f"{path}."))
    return settings.origins.get(path) or next(inner, path)


def _refuse_bool(value: Any, kind: Any) -> None:
    # Python counts true as 1; who writes it means something else.
    items = value if isinstance(value, list | tuple) else [value]
    if bool not in options(kind) and any(isinstance(item, bool) for item in items):
        raise TypeError("a truth value (true, yes, on) is no number")


def _untext(value: Any, kind: Any) -> Any:
    # YAML 1.1 reads 1e-4 as a string; where a number is wanted it is one.
    if isinstance(value, str) and not accepts(kind, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _unknown(path: str, parent: str, name: str, fields: Mapping[str, Any], settings: Settings) -> ConfigError:
    near = closest(name, fields)
    if near:
        fix = f"did you mean {parent + '.' if parent else ''}{near}?"
    else:
        homes = (ours for ours in ALIASES.values() if ours.rsplit(".", 1)[-1] == name and ours != path)
        home = next(homes, "")
        fix = f"did you mean {home}?" if home else f"one of: {', '.join(fields)}"
    return ConfigError(f"unknown name {path!r}", where=settings.origins[path], fix=fix)


def _as_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(str(value).lower())


def _parents(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:depth]) for depth in range(1, len(names))]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested values, for a file."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_dict(cls: type[T], values: Mapping[str, Any], origin: str) -> T:
    """Make a configuration from the nested values that `to_dict` wrote.

    Raises:
        ConfigError: The values do not fit the dataclass.
    """
    return build(cls, flattened(values, origin))


def flattened(values: Mapping[str, Any], origin: str) -> Settings:
    """Nested values by their dotted paths, each with the same origin."""
    settings = Settings()

    def walk(mapping: Mapping[str, Any], path: str) -> None:
        for name, value in mapping.items():
            full = f"{path}.{name}" if path else name
            if isinstance(value, Mapping) and value:
                walk(value, full)
            else:
                settings.values[full] = value
                settings.origins[full] = origin

    walk(values, "")
    return settings
