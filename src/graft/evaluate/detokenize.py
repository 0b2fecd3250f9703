"""Tokens back to text as they arrive: pieces that never split a character, stop strings across pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 8
"""Prompt tokens decoded along, so that the first new piece keeps its leading space."""

UNFINISHED = "\ufffd"
"""What tokenizers write for bytes that do not make a character yet."""


class Detokenizer:
    """Turns a growing row of tokens into text, piece by piece.

    The pieces joined are the continuation of the prompt's text: special tokens are left out, and a character
    whose bytes are spread over several tokens is held back until it is whole.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: The tokens before the first one; only the last few are looked at.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0
        self._known = self._decode(self._ids).rstrip(UNFINISHED)
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, which may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith(UNFINISHED) or len(text) <= len(self._known):
            return ""
        piece = text[len(self._known) :]
        self._start, self._read = self._read, len(self._ids)
        self._known = self._decode(self._ids[self._start : self._read])
        return piece

    def finish(self) -> str:
        """Return what was held back; unfinished characters come as U+FFFD."""
        piece = self._decode(self._ids[self._start :])[len(self._known) :]
        self._start, self._read, self._known = len(self._ids), len(self._ids), ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        return _decode(self._tokenizer, ids)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # Clean-up would change text that was already given out.
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Text of `tokens` as it stands after `prompt`, special tokens left out: all the pieces at once."""
    before = list(prompt[-CONTEXT_TOKENS:])
    known = _decode(tokenizer, before).rstrip(UNFINISHED)
    return _decode(tokenizer, [*before, *tokens])[len(known) :]


class StopFinder:
    """Finds the first of several strings in a text that arrives in pieces.

    Args:
        stops: The strings; none of them is ever given out, nor what follows it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text that can no longer be part of a stop string."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back because a stop string could have begun there."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
