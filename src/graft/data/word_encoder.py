"""Many texts to ids: by graft's own byte-pair encoding where it is exact, else by the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from graft.data.encodings import Encoded, Placed, Whole
from graft.data.vocabulary import left_texts, vocabulary_of
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

    Cost: a twentieth of the tokenizer's time where `vocabulary_of` finds a vocabulary and graft's kernels are
    compiled, else the tokenizer's own. Several threads may use it at once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        self._left = left_texts(state)
        vocabulary = None if library.problem() else vocabulary_of(state)
        self._words = None if vocabulary is None else Words(vocabulary)
        if self._words is None and hasattr(tokenizer.model, "_resize_cache"):
            splits = (state["pre_tokenizer"] or {"type": "Metaspace"})["type"] != "Metaspace"
            tokenizer.model._resize_cache(_CACHED_WORDS if splits else 0)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode many texts, nothing added around them."""
        found: list[Any] = [None] * len(texts)
        if self._words is not None:
            self._read(self._words, texts, found)
        rest = [index for index, encoded in enumerate(found) if encoded is None]
        if rest:
            wholes = self._tokenizer.encode_batch([texts[index] for index in rest], add_special_tokens=False)
            for index, encoding in zip(rest, wholes, strict=True):
                found[index] = Whole(encoding, len(texts[index]))
        return found

    def _read(self, words: Words, texts: Sequence[str], found: list[Any]) -> None:
        chosen = [index for index, text in enumerate(texts) if self._may_be_read(text)]
        read = words.read([texts[index].encode() for index in chosen])
        ids, starts = read.ids.tolist(), memoryview(read.starts.data)
        begin = 0
        for index, end, done in zip(chosen, read.ends, read.done, strict=True):
            if done:
                found[index] = Placed(ids[begin:end], starts[begin:end])
            begin = end

    def _may_be_read(self, text: str) -> bool:
        return len(text) <= MAX_CHARACTERS and not any(each in text for each in self._left)
