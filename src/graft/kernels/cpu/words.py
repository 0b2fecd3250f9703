"""Byte-pair encoding in C++: texts are split into words as a pre-tokenizer does, each word is merged once."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from graft.kernels.cpu import library

Ints = npt.NDArray[np.int32]

NUM_CHARACTERS = 0x110000


class Kind(IntEnum):
    """What a character is to the patterns."""

    OTHER = 0
    LETTER = 1
    NUMBER = 2
    SPACE = 3
    CONTROL = 4
    """Stands for a control token."""
    UNKNOWN = 5
    """Texts that hold it are not read."""
    ALONE = 6
    """No merge touches it; where texts are split at spaces only."""


class Pattern(IntEnum):
    """How texts are split into words."""

    GPT2 = 0
    LLAMA3 = 1
    QWEN2 = 2
    SPACES = 3


class Marks(IntEnum):
    """Before which sections of a text a mark is put; control tokens lie between two sections."""

    NONE = 0
    ALL = 1
    NOT_SPACES = 2
    """All that do not begin with a space."""
    BEGIN = 3
    """The one that begins the text, if it does not begin with a space."""


@dataclass(frozen=True)
class Vocabulary:
    """What words are made of.

    Attributes:
        pattern: How texts are split.
        kinds: uint8 (0x110000,), a `Kind` for each character.
        byte_ids: int32 (256,), ids of single bytes.
        merges: int32 (M, 3), left, right and result of each, the first learned first.
        characters: int32 (C, 2), characters and their ids; of others the bytes are taken.
        wholes: Words that are tokens whatever the merges, as UTF-8, and their ids.
        mark: Id of what is put before sections.
        marks: Before which.
        digits_alone: Whether each number is split from all else, and the rest then by the pattern.
        controls: Ids of the characters that are control tokens, from `first_control` on.
        first_control: The first such character.
        widths: Characters of the text that each of them stands for; one if left out.
    """

    pattern: Pattern
    kinds: npt.NDArray[np.uint8]
    byte_ids: Ints
    merges: Ints
    characters: Ints = field(default_factory=lambda: np.empty((0, 2), np.int32))
    wholes: dict[bytes, int] = field(default_factory=dict)
    mark: int = 0
    marks: Marks = Marks.NONE
    digits_alone: bool = False
    controls: Sequence[int] | Ints = ()
    first_control: int = 0
    widths: Sequence[int] | Ints | None = None


@dataclass(frozen=True)
class Found:
    """What texts become.

    Attributes:
        ids: Token ids of all texts.
        starts: Where in its text each token begins, in characters.
        ends: Where the tokens of each text end.
        done: Of each text whether it was read; one that was not has no tokens here.
    """

    ids: Ints
    starts: Ints
    ends: list[int]
    done: list[bool]


class Words:
    """The words of one tokenizer. Calls from several threads wait for each other.

    Args:
        vocabulary: What they are made of.

    Raises:
        MemoryError: There is not enough memory.

    Cost: up to 131,072 words are remembered, in some 15 MB where they are usual ones, and in 100 at most; the
    vocabulary takes some 60 bytes a merge.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        controls = np.ascontiguousarray(vocabulary.controls, dtype=np.int32)
        widths = np.ones_like(controls) if vocabulary.widths is None else vocabulary.widths
        widths = np.ascontiguousarray(widths, dtype=np.int32)
        byte_ids, merges, characters = (
            np.ascontiguousarray(each, dtype=np.int32)
            for each in (vocabulary.byte_ids, vocabulary.merges, vocabulary.characters)
        )
        wholes = b"".join(vocabulary.wholes)
        whole_ends = np.cumsum([len(whole) for whole in vocabulary.wholes], dtype=np.int64)
        whole_ids = np.asarray(list(vocabulary.wholes.values()), dtype=np.int32)
        given = library.Vocabulary(
            *(
                each.ctypes.data
                for each in (vocabulary.kinds, controls, widths, byte_ids, characters, merges)
            ),
            _address(wholes),
            whole_ends.ctypes.data,
            whole_ids.ctypes.data,
            *(len(each) for each in (controls, characters, merges, whole_ids)),
            vocabulary.first_control,
            vocabulary.pattern,
            vocabulary.digits_alone,
            vocabulary.mark,
            vocabulary.marks,
        )
        self._words = library.library().graft_words_new(ctypes.byref(given))
        if not self._words:
            raise MemoryError("no memory for the words of a tokenizer")
        weakref.finalize(self, library.library().graft_words_free, self._words)

    def read(self, texts: Sequence[bytes]) -> Found:
        """Encode texts.

        Args:
            texts: UTF-8; each less than 1 GiB.

        Raises:
            MemoryError: There is not enough memory.
        """
        text, count = b"".join(texts), len(texts)
        ends = np.cumsum([len(each) for each in texts], dtype=np.int64)
        # A byte makes a token at most, and so does the mark before a section, which has a byte at least.
        capacity = 2 * len(text)
        ids, starts = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
        id_ends, done = np.empty(count, np.int64), np.empty(count, np.bool_)
        call = library.Texts(
            _address(text),
            ends.ctypes.data,
            count,
            ids.ctypes.data,
            starts.ctypes.data,
            capacity,
            id_ends.ctypes.data,
            done.ctypes.data,
        )
        if not library.library().graft_words_read(self._words, ctypes.byref(call)):
            raise MemoryError("no memory to read texts")
        used = int(id_ends[-1]) if count else 0
        return Found(ids[:used].copy(), starts[:used].copy(), id_ends.tolist(), done.tolist())


def _address(data: bytes) -> ctypes.c_void_p:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
