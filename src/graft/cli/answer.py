"""How the command line answers: text for people, or one JSON object on stdout with --json."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from graft.errors import ConfigError, GraftError


def line(text: str = "") -> None:
    """A line on stdout; half of a surrogate pair, which no output can hold, as its escape."""
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line on stderr, beside the answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


_given: list[bool] = []


def begin() -> None:
    """Forget the answer of the command before this one in the process."""
    _given.clear()


def was_given() -> bool:
    """Whether the command has had its answer, so that a signal that comes now changes nothing."""
    return bool(_given)


def success(as_json: bool, fields: dict[str, Any], text: str) -> None:
    """The answer of a verb that did what it was asked.

    Args:
        as_json: Whether `--json` was given; then stdout holds one object and nothing else.
        fields: What the object says besides `"ok": true`; NaN and infinity become null.
        text: The same for people.
    """
    _given.append(True)
    if as_json:
        line(json.dumps({"ok": True, **_finite(fields)}, ensure_ascii=False))
    else:
        line(text)


def verdict(as_json: bool, error: GraftError | None, fields: dict[str, Any], text: str) -> None:
    """The answer of a verb that looks whether something will do.

    Args:
        as_json: Whether `--json` was given; the object then has `"ok"` and, where it will not do, `error`.
        error: Why it will not do; None where it does.
        fields: What the object says besides.
        text: The same for people.
    """
    if error is None:
        success(as_json, fields, text)
        return
    _given.append(True)
    told = {"ok": False, "error": describe(error), **_finite(fields)}
    line(json.dumps(told, ensure_ascii=False) if as_json else text)


def failure(error: GraftError, as_json: bool) -> None:
    """An error of the user's: what, where, fix."""
    if as_json:
        line(json.dumps({"ok": False, "error": describe(error)}, ensure_ascii=False))
    else:
        note(f"{type(error).__name__}: {error}")


def describe(error: GraftError) -> dict[str, Any]:
    """An error's fields, for JSON."""
    told: dict[str, Any] = {
        "type": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "fix": error.fix,
    }
    if isinstance(error, ConfigError) and error.problems:
        told["problems"] = [describe(problem) for problem in error.problems]
    return told


def usage_failure(error: Any, as_json: bool) -> None:
    """A flag or argument that does not exist or is missing."""
    command = error.ctx.command_path if getattr(error, "ctx", None) else "graft"
    failure(ConfigError(error.format_message(), where="command line", fix=f"see `{command} --help`"), as_json)


def internal_failure(error: Exception, as_json: bool) -> None:
    """A mistake of ours."""
    told = f"{type(error).__name__}: {error}"
    fix = "this is a fault in graft: run it again with --debug and report what it prints"
    if as_json:
        line(
            json.dumps(
                {"ok": False, "error": {"type": "InternalError", "what": told, "where": "", "fix": fix}}
            )
        )
    else:
        note(f"InternalError: {told}\n  fix:   {fix}")


def table(rows: list[list[str]]) -> str:
    """Rows as aligned columns; the first row is the head, the first column is text, the others figures."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
