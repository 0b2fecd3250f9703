"""Text to ids such that only what graft means as a control token becomes one.

A tokenizer turns the text "<|im_end|>" into the control token wherever it stands, also where a user merely
wrote it. Here a copy of the tokenizer knows each control token under a private character instead of its text.
Text is then only text; a template's own control tokens are swapped for their private characters first. All
else is the same tokenizer, so the ids are those it gives, exactly.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from graft.data.encodings import Encoded, Placed, wholes
from graft.data.spelling import PRIVATE, any_of
from graft.data.word_encoder import WordEncoder
from graft.errors import DataError

_FIRST_QUOTED = 0x100000
_SHORT = 64
_MAX_SHORT = 4096
_MAX_BEGINS = 8
_WORTH = 20
"""Characters for each token of the vocabulary: the tokenizer reads so many while a `WordEncoder` is made."""
_PRIVATE = re.compile(f"[{chr(PRIVATE)}-\U0010ffff]")


class Apart:
    """A text encoded so that no token spans one of its edges.

    Args:
        encoded: Its tokens.
        edges: How many tokens stand before each edge.

    Attributes:
        ids: Token ids.
        edges: As given.
        before: How many tokens begin before a place of the text.
    """

    __slots__ = ("_encoded", "before", "edges", "ids")

    def __init__(self, encoded: Encoded, edges: dict[int, int]) -> None:
        self._encoded = encoded
        self.ids = encoded.ids
        self.before = encoded.before
        self.edges = edges

    @property
    def starts(self) -> Sequence[int]:
        """Where each token begins in the text."""
        return self._encoded.starts


class TextEncoder:
    """A tokenizer whose control tokens are reached only on purpose.

    Args:
        tokenizer: A fast tokenizer of transformers; it is read, not changed.

    Attributes:
        bos_ids: What the tokenizer puts before a text by itself, often one id or nothing.
        eos_id: The id that ends a text, None where the tokenizer has none.
        digest: SHA-256 over the tokenizer as it is written to a file.
        control_ids: Ids of all control tokens, and of other tokens that were added to the vocabulary.

    Raises:
        DataError: The tokenizer is not a fast one.

    Cost: building it parses the tokenizer once, under a second for 128,000 entries.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"{type(tokenizer).__name__} is not a fast tokenizer",
                where=str(getattr(tokenizer, "name_or_path", "")),
                fix="use a model folder that has a tokenizer.json",
            )
        self.tokenizer = tokenizer
        written = backend.to_str()
        self.digest = hashlib.sha256(written.encode()).hexdigest()
        state = json.loads(written)
        controls = {token["content"]: token["id"] for token in state["added_tokens"] if token["special"]}
        self._to_private = {text: chr(PRIVATE + index) for index, text in enumerate(controls)}
        self._to_quoted = {text: chr(_FIRST_QUOTED + index) for index, text in enumerate(controls)}
        self._from_quoted = {ord(char): text for text, char in self._to_quoted.items()}
        self._controls = any_of(controls)
        self._begins = _begins(controls)
        self._short: dict[str, Encoded] = {}
        self._copy = _renamed(state, self._to_private)
        self._words: WordEncoder | None = None
        self._read, self._worth = 0, _WORTH * self._copy.get_vocab_size()
        assert all(self._copy.token_to_id(self._to_private[text]) == id for text, id in controls.items())
        self.control_ids = frozenset(token["id"] for token in state["added_tokens"])
        self.bos_ids = _prefix_ids(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode many texts at once, nothing added around them."""
        if self._words is None and self._read > self._worth:
            self._words = WordEncoder(self._copy)
        if self._words is not None:
            return self._words.encode(texts)
        self._read += sum(map(len, texts))
        return wholes(self._copy, texts)

    def ids(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode([text])[0].ids

    def encode_apart(
        self, texts: Sequence[tuple[str, Sequence[int]]], encoded: Sequence[Encoded] | None = None
    ) -> list[Apart]:
        """Encode texts such that what stands before each edge has the ids it would have alone.

        Nearly always the whole text's ids already have this property and are kept. Where a token would span
        the edge between a prompt and its answer, the model would meet other ids when it generates than it
        was trained on; there the text is encoded in two parts.

        Args:
            texts: Each with its edges, ascending places in it.
            encoded: What `encode` gave for them, where it is known.
        """
        encoded = self.encode([text for text, _ in texts]) if encoded is None else encoded
        # What stands before a control token has no say in the ids after it, so checking from there is enough.
        spans = [_since_control(text, edges) for text, edges in texts]
        parts = self._parts_of(
            {text[a:b] for (text, _), pairs in zip(texts, spans, strict=True) for a, b in pairs}
        )
        return [
            self._apart(text, whole, [(a, b, parts[text[a:b]]) for a, b in pairs])
            for (text, _), whole, pairs in zip(texts, encoded, spans, strict=True)
        ]

    def _parts_of(self, texts: set[str]) -> dict[str, Encoded]:
        """What each text becomes alone; the short ones, mostly the heads of turns, are remembered."""
        found = {text: self._short[text] for text in texts if text in self._short}
        new = [text for text in texts if text not in found]
        found.update(zip(new, self.encode(new), strict=True))
        if len(self._short) + len(new) > _MAX_SHORT:
            self._short.clear()
        # Places of their own: those that were found belong to the memory of a whole batch.
        self._short.update(
            (text, Placed(found[text].ids, list(found[text].starts))) for text in new if len(text) <= _SHORT
        )
        return found

    def _apart(self, text: str, whole: Encoded, checks: Sequence[tuple[int, int, Encoded]]) -> Apart:
        ids = whole.ids
        counts: dict[int, int] = {}
        for origin, edge, encoded in checks:
            head = whole.before(origin)
            part = encoded.ids
            if ids[head : head + len(part)] != part:
                return self._in_parts(text, whole, checks)
            counts[edge] = head + len(part)
        return Apart(whole, counts)

    def _in_parts(self, text: str, whole: Encoded, checks: Sequence[tuple[int, int, Encoded]]) -> Apart:
        ids, starts = list(whole.ids), whole.starts
        counts: dict[int, int] = {}
        base = 0  # the ids of what follows are those of the text from here on
        for origin, edge, encoded in checks:
            part, part_starts = encoded.ids, encoded.starts
            if origin < base:
                origin = base
                part, part_starts = self._following(text[base:edge])
            head = counts.get(origin, 0) if origin == base else bisect_right(starts, origin) - 1
            count = head + len(part)
            if ids[head:count] != part:
                tail, tail_starts = self._following(text[edge:])
                ids = [*ids[:head], *part, *tail]
                starts = [*starts[:head], *(origin + at for at in part_starts)]
                starts += [edge + at for at in tail_starts]
                base = edge
            counts[edge] = count
        return Apart(Placed(ids, starts), counts)

    def _following(self, text: str) -> tuple[list[int], Sequence[int]]:
        """The ids of a text that stands in the middle of another, and where each begins in it.

        Some tokenizers put a space before whatever they are given; an anchor takes it instead.
        """
        for anchor in ("\n", "0", "a", "."):
            encoded = self.encode([anchor + text])[0]
            skipped = self.ids(anchor)
            if encoded.ids[: len(skipped)] == skipped:
                starts = [max(start - 1, 0) for start in encoded.starts]
                return encoded.ids[len(skipped) :], starts[len(skipped) :]
        encoded = self.encode([text])[0]
        return encoded.ids, encoded.starts

    def lost_characters(self, chars: Iterable[str]) -> list[str]:
        """Those characters that the tokenizer has no token for, and drops or makes unknown."""
        visible = sorted(char for char in set(chars) if char.strip() and not private_character(char))
        encodings = self.encode(visible)
        texts = [self.tokenizer.decode(encoding.ids, skip_special_tokens=True) for encoding in encodings]
        return [char for char, text in zip(visible, texts, strict=True) if not text.strip()]

    def mark_controls(self, rendered: str) -> str:
        """Make the control tokens of a template's output count, and the quoted ones plain text again."""
        marked = self._controls.sub(lambda found: self._to_private[found[0]], rendered)
        return marked.translate(self._from_quoted)

    def spells_control(self, text: str) -> bool:
        """Whether a text contains the spelling of a control token."""
        if self._begins and not any(begin in text for begin in self._begins):
            return False
        return self._controls.search(text) is not None

    def may_join(self, piece: str) -> bool:
        """Whether a control token could be spelled across an end of a piece of text."""
        return any(
            (piece in control and piece != control)
            or any(
                piece.startswith(control[at:]) or piece.endswith(control[:at])
                for at in range(1, len(control))
            )
            for control in self._to_private
        )

    def quote_controls(self, value: Any) -> Any:
        """Hide the spelling of control tokens from `mark_controls`, in all texts of a structure."""
        if isinstance(value, str):
            return self._controls.sub(lambda found: self._to_quoted[found[0]], value)
        if isinstance(value, dict):
            return {name: self.quote_controls(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self.quote_controls(part) for part in value]
        return value


def private_character(text: str) -> str:
    """The first character of a text that graft needs for itself, or ""."""
    found = _PRIVATE.search(text)
    return found[0] if found else ""


def _since_control(text: str, edges: Sequence[int]) -> list[tuple[int, int]]:
    """For each edge the last control token before it, or the text's begin; and the edge."""
    found = []
    for edge in edges:
        near = [match.start() for match in _PRIVATE.finditer(text, max(0, edge - _SHORT), edge)]
        if not near and edge > _SHORT:
            near = [match.start() for match in _PRIVATE.finditer(text, 0, edge)]
        found.append((near[-1] if near else 0, edge))
    return found


def _begins(texts: Iterable[str]) -> list[str]:
    """Short texts one of which is in whatever contains one of the texts; none where they would be many."""
    begins = sorted({text[:2] for text in texts if text})
    return begins if len(begins) <= _MAX_BEGINS else []


def _renamed(state: dict[str, Any], names: dict[str, str]) -> Any:
    from tokenizers import Tokenizer

    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    return Tokenizer.from_str(
        json.dumps({**state, "post_processor": None, "truncation": None, "padding": None})
    )


def _touches(merge: Any, names: dict[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _prefix_ids(tokenizer: Any) -> list[int]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []
