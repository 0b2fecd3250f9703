"""The vocabulary of a tokenizer for graft's own byte-pair encoding, where that gives the same tokens exactly.

The kernel (`kernels/cpu/source/words.cpp`) splits a text into words and merges each word once. This is right
for two kinds of tokenizers:

*   Those whose pre-tokenizer splits by one of the patterns that the kernel has; merges stay inside words.
    What is a letter, a number or white space is asked of the tokenizer's own engine for patterns, so that
    both know the same edition of Unicode. Composition (NFC) changes nothing in texts without the characters
    that take part in it; others are left to the tokenizer.
*   Those that split nothing and whose merges never join a space to what stands before it, as those of
    vocabularies made by SentencePiece: no merge reaches across the place before a space, so what stands on
    both sides of it is merged independently. The same is true around a character that no merge touches.

Other tokenizers read all texts themselves.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from graft.data.spelling import PRIVATE
from graft.kernels.cpu.words import NUM_CHARACTERS, Kind, Marks, Pattern, Vocabulary

_SHARED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PATTERNS = {_SHARED % "{1,3}": Pattern.LLAMA3, _SHARED % "": Pattern.QWEN2}
MARK = "▁"
"""What stands for a space in vocabularies that were made by SentencePiece."""

_READ = {"type", "vocab", "merges", "ignore_merges", "byte_fallback", "fuse_unk", "unk_token"}
"""Fields of a model that may say something; of others, known or new, nobody here knows what they do."""
_LIKE_S = (0x17F, 0xFB05, 0xFB06)
"""Without regard to case they may be read as the s of a contraction."""

Kinds = npt.NDArray[np.uint8]
State = dict[str, Any]


def vocabulary_of(state: State) -> Vocabulary | None:
    """The vocabulary of a tokenizer; None where its tokens could be others than the kernel's.

    Args:
        state: The tokenizer as `Tokenizer.to_str` writes it. Added tokens that are a single private character
            are control tokens; `stand_ins` names characters for the others.

    Cost: some tenths of a second for 100,000 merges; half a second more for the first tokenizer.
    """
    model, around = state["model"], ("truncation", "padding", "post_processor")
    ids = [*model["vocab"].values(), *(token["id"] for token in state["added_tokens"])]
    known = model["type"] == "BPE" and not any(model[name] for name in model.keys() - _READ)
    if not known or any(map(state.get, around)) or max(ids, default=0) >> 31 or not _adds_plain_tokens(state):
        return None
    return _split_by_pattern(state) if splits_words(state) else _split_at_spaces(state)


def splits_words(state: State) -> bool:
    """Whether a tokenizer splits texts before it merges; without that a word is a whole text."""
    splits = state["pre_tokenizer"]
    return splits is not None and (splits["type"] != "Metaspace" or splits["split"])


def stand_ins(state: State) -> dict[str, str]:
    """For the text of each added token that is no control token: a character that stands for it."""
    controls = [ord(token["content"]) for token in state["added_tokens"] if _is_control(token)]
    first = max([*controls, PRIVATE - 1]) + 1
    plain = [token["content"] for token in state["added_tokens"] if not _is_control(token)]
    return {text: chr(first + number) for number, text in enumerate(plain)}


def _is_control(token: State) -> bool:
    return len(token["content"]) == 1 and ord(token["content"]) >= PRIVATE


def _adds_plain_tokens(state: State) -> bool:
    """Whether added tokens are found by their text alone, all at once, before anything is changed in it."""
    flags = ("lstrip", "rstrip", "single_word") + (("normalized",) if state["normalizer"] else ())
    added = state["added_tokens"]
    passes = {token["normalized"] for token in added if not _is_control(token)}
    return len(passes) < 2 and not any(
        token[flag] or not token["content"] for token in added for flag in flags
    )


def _steps(step: State | None, name: str) -> list[State]:
    if step is None:
        return []
    steps: list[State] = step[name] if step["type"] == "Sequence" else [step]
    return steps


def _made(state: State, kinds: Kinds, **rest: Any) -> Vocabulary:
    vocab = state["model"]["vocab"]
    merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in _pairs(state)]
    stands = stand_ins(state)
    tokens = [(token["content"], token["id"]) for token in state["added_tokens"]]
    codes = [ord(stands.get(text, text)) for text, _ in tokens]
    first = min(codes, default=0)
    controls = np.zeros((max(codes, default=-1) + 1 - first, 2), np.int32)
    for code, (text, id) in zip(codes, tokens, strict=True):
        kinds[code], controls[code - first] = Kind.CONTROL, (id, len(text))
    return Vocabulary(
        kinds=kinds,
        merges=np.asarray(merges, np.int32).reshape(-1, 3),
        controls=controls[:, 0],
        widths=controls[:, 1],
        first_control=first,
        **rest,
    )


def _pairs(state: State) -> list[tuple[str, str]]:
    merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in state["model"]["merges"])
    return [(left, right) for left, right in merges]


def _split_by_pattern(state: State) -> Vocabulary | None:
    model, normal = state["model"], _steps(state["normalizer"], "normalizers")
    *firsts, last = _steps(state["pre_tokenizer"], "pretokenizers") or [{"type": "none"}]
    if (
        last["type"] != "ByteLevel"
        or last["add_prefix_space"]
        or last.keys() - {"type", "add_prefix_space", "trim_offsets", "use_regex"}
        or any(step["type"] != "NFC" for step in normal)
    ):
        return None
    digits = {"type": "Digits", "individual_digits": True}
    digits_alone = firsts[:1] == [digits]
    splits = firsts[1:] if digits_alone else firsts
    if last.get("use_regex", True):
        pattern = None if splits else Pattern.GPT2
    else:
        pattern = next((kind for text, kind in PATTERNS.items() if splits == [_split(text)]), None)
    names = _names_of_bytes()
    if pattern is None or not all(name in model["vocab"] for name in names):
        return None
    kinds = _kinds_of_patterns().copy()
    if normal:
        kinds[_composing()] = Kind.UNKNOWN
    if pattern is not Pattern.GPT2:
        kinds[list(_LIKE_S)] = Kind.UNKNOWN
    return _made(
        state,
        kinds,
        pattern=pattern,
        byte_ids=np.asarray([model["vocab"][name] for name in names], np.int32),
        wholes=_wholes(model["vocab"], names) if model.get("ignore_merges") else {},
        digits_alone=digits_alone,
    )


def _split(pattern: str) -> State:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _names_of_bytes() -> list[str]:
    """The character that stands for each byte: itself where it is to be seen, others from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _wholes(vocab: dict[str, int], names: list[str]) -> dict[bytes, int]:
    byte = {name: value for value, name in enumerate(names)}
    return {bytes(map(byte.__getitem__, text)): id for text, id in vocab.items() if byte.keys() >= set(text)}


@cache
def _kinds_of_patterns() -> Kinds:
    """What the tokenizer's engine for patterns takes each character for."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    chars = [char for char in map(chr, range(PRIVATE)) if unicodedata.category(char) not in ("Cn", "Cs")]
    codes = np.fromiter(map(ord, chars), np.int64, len(chars))
    kinds = np.full(NUM_CHARACTERS, Kind.UNKNOWN, np.uint8)
    kinds[codes] = Kind.OTHER
    text = "".join(chars)
    for pattern, kind in ((r"\P{L}+", Kind.LETTER), (r"\P{N}+", Kind.NUMBER), (r"\S+", Kind.SPACE)):
        for _, (begin, end) in Split(Regex(pattern), "removed").pre_tokenize_str(text):
            kinds[codes[begin:end]] = kind
    return kinds


@cache
def _composing() -> list[int]:
    """Characters that take part in Unicode's canonical composition."""
    found = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # parts of Hangul syllables
    for code in range(PRIVATE):
        char = chr(code)
        parts = unicodedata.decomposition(char).split()
        if unicodedata.combining(char) or not unicodedata.is_normalized("NFC", char):
            found.add(code)
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(int(parts[1], 16))
    return sorted(found)


def _split_at_spaces(state: State) -> Vocabulary | None:
    model, marks = state["model"], _marks(state)
    if marks is None or model.get("ignore_merges") or MARK not in model["vocab"]:
        return None
    pairs = _pairs(state)
    joined = {left + right for left, right in pairs}
    if any(MARK in text.lstrip(MARK) for text in joined):
        return None
    single = {ord(text): id for text, id in model["vocab"].items() if len(text) == 1 and ord(text) < PRIVATE}
    touched = {ord(char) for text in joined for char in text}
    kinds = np.full(NUM_CHARACTERS, Kind.ALONE, np.uint8)
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if not {*names}.isdisjoint(half for pair in pairs for half in pair):
        return None  # a character that is written in bytes may then be merged
    if not model.get("byte_fallback") or not all(name in model["vocab"] for name in names):
        names = []
        kinds[:] = Kind.UNKNOWN
        kinds[list(single)] = Kind.ALONE
    kinds[list(touched)] = Kind.OTHER
    kinds[ord(" ")] = Kind.OTHER
    kinds[ord(MARK)] = Kind.UNKNOWN  # the tokenizer takes it for a space
    kinds[PRIVATE:] = Kind.UNKNOWN
    mark = single.pop(ord(MARK))
    return _made(
        state,
        kinds,
        pattern=Pattern.SPACES,
        byte_ids=np.asarray([model["vocab"][name] for name in names] or [0] * 256, np.int32),
        characters=np.asarray(sorted({**single, ord(" "): mark}.items()), np.int32),
        mark=mark,
        marks=marks,
    )


def _marks(state: State) -> Marks | None:
    """Where a mark is put if all else that happens before the merges is that spaces become marks; or None."""
    normal, splits = _steps(state["normalizer"], "normalizers"), state["pre_tokenizer"]
    if splits is not None:
        schemes = {"never": Marks.NONE, "always": Marks.NOT_SPACES, "first": Marks.BEGIN}
        plain = not normal and splits["replacement"] == MARK
        return schemes.get(splits["prepend_scheme"]) if plain else None
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    if normal == [replaces]:
        return Marks.NONE
    return Marks.ALL if normal == [{"type": "Prepend", "prepend": MARK}, replaces] else None
