"""What a text becomes: token ids, and where in the text each of them begins."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol


class Encoded(Protocol):
    """A text's tokens."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        ...

    @property
    def starts(self) -> Sequence[int]:
        """Where each token begins in the text, in characters."""
        ...

    def before(self, place: int) -> int:
        """How many tokens begin before a place of the text."""
        ...


class Placed:
    """Tokens whose places are known.

    Args:
        ids: Token ids.
        starts: Where each begins, ascending.
    """

    __slots__ = ("ids", "starts")

    def __init__(self, ids: list[int], starts: Sequence[int]) -> None:
        self.ids = ids
        self.starts = starts

    def before(self, place: int) -> int:
        """How many tokens begin before a place of the text."""
        return bisect_left(self.starts, place)


class Whole:
    """What a tokenizer itself makes of a text.

    Args:
        encoding: A `tokenizers.Encoding`.
        size: Characters of the text.
    """

    __slots__ = ("_encoding", "_size", "_starts", "ids")

    def __init__(self, encoding: Any, size: int) -> None:
        self.ids: list[int] = encoding.ids
        self._encoding = encoding
        self._size = size
        self._starts: list[int] | None = None

    @property
    def starts(self) -> list[int]:
        """Where each token begins in the text, in characters."""
        if self._starts is None:
            self._starts = [start for start, _ in self._encoding.offsets]
        return self._starts

    def before(self, place: int) -> int:
        """How many tokens begin before a place of the text."""
        if self._starts is None:
            if place <= 0 or place >= self._size:
                return len(self.ids) if place > 0 else 0
            # Listing all places is slow; where tokens on both sides meet at this one, the count is clear.
            token = self._encoding.char_to_token(place)
            meets = token is not None and self._encoding.token_to_chars(token)[0] == place
            if meets and (token == 0 or self._encoding.token_to_chars(token - 1)[0] < place):
                count: int = token
                return count
        return bisect_left(self.starts, place)


def wholes(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """What a tokenizer itself makes of texts, nothing added around them."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [Whole(encoding, len(text)) for encoding, text in zip(encodings, texts, strict=True)]
