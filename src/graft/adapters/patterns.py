"""How names and regular expressions select module paths, in bounded time whatever the expression."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import regex  # type: ignore[import-untyped]

from graft.errors import TargetError

MAX_SECONDS = 1.0
"""What a target expression may take over all paths of a model before it is refused."""

MAX_LENGTH = 100_000
"""Longest expression accepted, in characters."""


class Pattern:
    """A regular expression with a time budget over all its uses.

    Args:
        source: The expression.
        where: The field that it comes from, for errors.
        seconds: The budget.

    Raises:
        TargetError: Not a regular expression, or far too long.
    """

    def __init__(
        self, source: str, where: str = "adapter.target_modules", *, seconds: float = MAX_SECONDS
    ) -> None:
        self.source = source
        self.where = where
        self._seconds = self._left_seconds = seconds
        if len(source) > MAX_LENGTH:
            raise TargetError(
                f"a regular expression of {len(source):,} characters",
                where=where,
                fix=f"at most {MAX_LENGTH:,}; list the names instead",
            )
        try:
            self._compiled: Any = regex.compile(source)
        except (regex.error, RecursionError, OverflowError) as error:
            raise TargetError(
                f"{_shown(source)} is not a regular expression: {error}",
                where=where,
                fix="mend it, or list the names of the layers",
            ) from error

    def matches(self, path: str) -> bool:
        """Whether the expression matches the whole path.

        Raises:
            TargetError: The expression has used up its time.
        """
        start = time.monotonic()
        try:
            found = self._compiled.fullmatch(path, timeout=max(self._left_seconds, 1e-3))
        except TimeoutError as error:
            raise TargetError(
                f"the regular expression {_shown(self.source)} takes more than {self._seconds:g} s",
                where=self.where,
                fix="it backtracks without end; remove nested repetitions, or list the names of the layers",
            ) from error
        self._left_seconds -= time.monotonic() - start
        return found is not None


def suffixes(path: str) -> Iterator[str]:
    """The path and every ending of it that starts at a name: a.b.c, b.c, c."""
    while path:
        yield path
        _, _, path = path.partition(".")


def first_match(items: Sequence[str], path: str) -> Iterator[str]:
    """The first of the "regex=value" items whose expression matches the end of a path, if any.

    The expression may start at the path's beginning or after a dot, as in PEFT's rank_pattern. One made of
    names and dots alone is compared as text.
    """
    for item in items:
        source = item.rpartition("=")[0]
        if _PLAIN(source):
            found = path == source or path.endswith(f".{source}")
        else:
            where = "adapter.rank_pattern or adapter.alpha_pattern"
            found = Pattern(rf"(?:.*\.)?(?:{source})", where, seconds=0.05).matches(path)
        if found:
            yield item
            return


_PLAIN = re.compile(r"[\w.\-]+").fullmatch


class Selector:
    """Which paths a target or exclusion setting selects, and which of its names never did.

    Args:
        setting: A regular expression for the whole path, or names that paths must end with.
        where: The field, for errors.
    """

    def __init__(self, setting: str | Iterable[str], where: str) -> None:
        self._pattern = Pattern(setting, where) if isinstance(setting, str) and setting else None
        self._names = set() if isinstance(setting, str) else set(setting)
        names = [setting] if isinstance(setting, str) and setting else setting
        self._unused = dict.fromkeys(names)

    def selects(self, path: str) -> bool:
        """Whether the path is selected."""
        if self._pattern is not None:
            if not self._pattern.matches(path):
                return False
            self._unused.clear()
            return True
        found = [ending for ending in suffixes(path) if ending in self._names]
        for ending in found:
            self._unused.pop(ending, None)
        return bool(found)

    def selects_inside(self, path: str) -> bool:
        """Whether the path, or a module that holds it, is selected."""
        names = path.split(".")
        return any(self.selects(".".join(names[:end])) for end in range(1, len(names) + 1))

    @property
    def unused(self) -> list[str]:
        """The names, or the expression, that selected nothing so far, in their order."""
        return list(self._unused)


def _shown(source: str) -> str:
    return repr(source if len(source) <= 80 else source[:77] + "...")
