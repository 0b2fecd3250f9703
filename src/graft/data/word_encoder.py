"""Many texts to ids: by graft's own byte-pair encoding where it is exact, else by the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from graft.data.encodings import Encoded, Placed, wholes
from graft.data.spelling import any_of
from graft.data.vocabulary import splits_words, stand_ins, vocabulary_of
from graft.kernels.cpu import library
from graft.kernels.cpu.words import Words

MAX_CHARACTERS = 1 << 20
"""Of a text that is read here; a longer one is left to the tokenizer."""
_CACHED_WORDS = 100_000
"""That a tokenizer remembers: a tenth of its time. Without a pre-tokenizer a word is a whole text, and to
remember those takes 200 MB for nothing."""


class WordEncoder:
    """Encodes as a tokenizer does.

    Args:
        tokenizer: A `tokenizers.Tokenizer` that puts nothing around texts. Added tokens that are a single
            private character are its control tokens.

    Cost: a tenth of the time of the tokenizer in one thread where `vocabulary_of` finds a vocabulary and the
    kernels are compiled, else the tokenizer's own. Several threads may use it at once; they take turns.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        self._stand_ins = stand_ins(state)
        self._added = any_of(self._stand_ins)
        chars = self._stand_ins.values()
        self._taken = re.compile(f"[{min(chars)}-{max(chars)}]" if chars else "(?!)")
        vocabulary = None if library.problem() else vocabulary_of(state)
        self._words = None if vocabulary is None else Words(vocabulary)
        if self._words is None and hasattr(tokenizer.model, "_resize_cache"):
            tokenizer.model._resize_cache(_CACHED_WORDS if splits_words(state) else 0)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode many texts, nothing added around them."""
        found: list[Any] = [None] * len(texts)
        if self._words is not None:
            self._read(self._words, texts, found)
        rest = [index for index, encoded in enumerate(found) if encoded is None]
        if rest:
            read = wholes(self._tokenizer, [texts[index] for index in rest])
            for index, encoded in zip(rest, read, strict=True):
                found[index] = encoded
        return found

    def _read(self, words: Words, texts: Sequence[str], found: list[Any]) -> None:
        chosen = [index for index, text in enumerate(texts) if self._may_be_read(text)]
        read = words.read([self._standing_in(texts[index]).encode() for index in chosen])
        ids, starts = read.ids.tolist(), memoryview(read.starts.data)
        begin = 0
        for index, end, done in zip(chosen, read.ends, read.done, strict=True):
            if done:
                found[index] = Placed(ids[begin:end], starts[begin:end])
            begin = end

    def _may_be_read(self, text: str) -> bool:
        return len(text) <= MAX_CHARACTERS and not (self._stand_ins and self._taken.search(text))

    def _standing_in(self, text: str) -> str:
        """The text with one character for each added token."""
        if not self._stand_ins:
            return text
        return self._added.sub(lambda added: self._stand_ins[added[0]], text)
