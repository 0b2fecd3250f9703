"""Texts looked for in other texts, and the characters that graft keeps for itself."""

from __future__ import annotations

import re
from collections.abc import Iterable

PRIVATE = 0xF0000
"""The first of the characters, to the last one that there is, that stand for tokens; no row may hold one."""


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of the texts, the longest first; those with one begin share it, which the search then looks for."""
    groups: dict[str, list[str]] = {}
    for text in sorted((text for text in texts if text), key=len, reverse=True):
        groups.setdefault(text[:2], []).append(text)
    parts = [
        re.escape(begin) + "(?:" + "|".join(re.escape(text[2:]) for text in group) + ")"
        for begin, group in sorted(groups.items(), key=lambda each: -len(each[0]))
    ]
    return re.compile("|".join(parts) or r"(?!)")
