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
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from graft.errors import DataError

_FIRST_CONTROL = 0xF0000
_FIRST_QUOTED = 0x100000
_SHORT = 64
_MAX_SHORT = 4096
_MAX_BEGINS = 8
_CACHED_WORDS = 100_000
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class Apart:
    """A text encoded so that no token spans one of its edges.

    Attributes:
        ids: Token ids.
        edges: How many tokens stand before each edge.
    """

    __slots__ = ("_encoding", "_size", "_starts", "edges", "ids")

    def __init__(
        self, ids: list[int], edges: dict[int, int], size: int, encoding: Any = None, starts: Any = None
    ) -> None:
        self.ids = ids
        self.edges = edges
        self._size = size
        self._encoding = encoding
        self._starts: list[int] | None = starts

    @property
    def starts(self) -> list[int]:
        """Where each token begins in the text."""
        if self._starts is None:
            self._starts = _starts(self._encoding)
        return self._starts

    def before(self, place: int) -> int:
        """How many tokens begin before a place of the text."""
        if self._starts is None:
            if place >= self._size:
                return len(self.ids)
            # Listing all places is slow; where tokens on both sides meet at this one, the count is clear.
            token = self._encoding.char_to_token(place)
            meets = token is not None and self._encoding.token_to_chars(token)[0] == place
            if meets and (token == 0 or self._encoding.token_to_chars(token - 1)[0] < place):
                count: int = token
                return count
        return bisect_left(self.starts, place)


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
        self._to_private = {text: chr(_FIRST_CONTROL + index) for index, text in enumerate(controls)}
        self._to_quoted = {text: chr(_FIRST_QUOTED + index) for index, text in enumerate(controls)}
        self._from_quoted = {ord(char): text for text, char in self._to_quoted.items()}
        self._controls = _any_of(controls)
        self._begins = _begins(controls)
        self._short: dict[str, Any] = {}
        self._copy = _renamed(state, self._to_private)
        # A tenth of the time; but without a pre-tokenizer a word is a whole text, and memory would follow it.
        splits = (state.get("pre_tokenizer") or {"type": "Metaspace"})["type"] != "Metaspace"
        if splits and hasattr(self._copy.model, "_resize_cache"):
            self._copy.model._resize_cache(_CACHED_WORDS)
        assert all(self._copy.token_to_id(self._to_private[text]) == id for text, id in controls.items())
        self.control_ids = frozenset(token["id"] for token in state["added_tokens"])
        self.bos_ids = _prefix_ids(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Encode many texts at once, nothing added around them.

        Returns:
            One `tokenizers.Encoding` per text, with `ids` and `offsets` (in characters).
        """
        encodings: list[Any] = self._copy.encode_batch(list(texts), add_special_tokens=False)
        return encodings

    def ids(self, text: str) -> list[int]:
        """The ids of one text."""
        found: list[int] = self.encode([text])[0].ids
        return found

    def encode_apart(
        self, texts: Sequence[tuple[str, Sequence[int]]], wholes: Sequence[Any] | None = None
    ) -> list[Apart]:
        """Encode texts such that what stands before each edge has the ids it would have alone.

        Nearly always the whole text's ids already have this property and are kept. Where a token would span
        the edge between a prompt and its answer, the model would meet other ids when it generates than it
        was trained on; there the text is encoded in two parts.

        Args:
            texts: Each with its edges, ascending places in it.
            wholes: What `encode` gave for them, where it is known.
        """
        if wholes is None:
            wholes = self.encode([text for text, _ in texts])
        # What stands before a control token has no say in the ids after it, so checking from there is enough.
        spans = [_since_control(text, edges) for text, edges in texts]
        parts = self._parts_of(
            {text[a:b] for (text, _), pairs in zip(texts, spans, strict=True) for a, b in pairs}
        )
        return [
            self._apart(text, whole, [(a, b, parts[text[a:b]]) for a, b in pairs])
            for (text, _), whole, pairs in zip(texts, wholes, spans, strict=True)
        ]

    def _parts_of(self, texts: set[str]) -> dict[str, Any]:
        """What each text becomes alone; the short ones, mostly the heads of turns, are remembered."""
        found = {text: self._short[text] for text in texts if text in self._short}
        new = [text for text in texts if text not in found]
        found.update(zip(new, self.encode(new), strict=True))
        if len(self._short) + len(new) > _MAX_SHORT:
            self._short.clear()
        self._short.update((text, found[text]) for text in new if len(text) <= _SHORT)
        return found

    def _apart(self, text: str, whole: Any, checks: Sequence[tuple[int, int, Any]]) -> Apart:
        ids: list[int] = whole.ids
        counts: dict[int, int] = {}
        for origin, edge, encoding in checks:
            head = whole.char_to_token(origin) if origin else 0
            part = encoding.ids
            if head is None or ids[head : head + len(part)] != part:
                return self._in_parts(text, whole, checks)
            counts[edge] = head + len(part)
        return Apart(ids, counts, len(text), whole)

    def _in_parts(self, text: str, whole: Any, checks: Sequence[tuple[int, int, Any]]) -> Apart:
        ids, starts = list(whole.ids), _starts(whole)
        counts: dict[int, int] = {}
        base = 0  # the ids of what follows are those of the text from here on
        for origin, edge, encoding in checks:
            part, part_starts = encoding.ids, _starts(encoding)
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
        return Apart(ids, counts, len(text), starts=starts)

    def _following(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text that stands in the middle of another, and where each begins in it.

        Some tokenizers put a space before whatever they are given; an anchor takes it instead.
        """
        for anchor in ("\n", "0", "a", "."):
            encoding = self.encode([anchor + text])[0]
            skipped = self.encode([anchor])[0].ids
            if encoding.ids[: len(skipped)] == skipped:
                starts = [max(start - 1, 0) for start in _starts(encoding)]
                return encoding.ids[len(skipped) :], starts[len(skipped) :]
        encoding = self.encode([text])[0]
        return encoding.ids, _starts(encoding)

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
            piece in control
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


def _starts(encoding: Any) -> list[int]:
    return [start for start, _ in encoding.offsets]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of the texts, the longest first; those with one begin share it, which the search then looks for."""
    groups: dict[str, list[str]] = {}
    for text in sorted((text for text in texts if text), key=len, reverse=True):
        groups.setdefault(text[:2], []).append(text)
    parts = [
        re.escape(begin) + "(?:" + "|".join(re.escape(text[2:]) for text in group) + ")"
        for begin, group in sorted(groups.items(), key=lambda each: -len(each[0]))
    ]
    return re.compile("|".join(parts) or r"(?!)")


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
