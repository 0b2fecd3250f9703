"""The words that the exercises of the pretraining corpus draw from: listed, found in the books, or invented.

Most draws mix known and invented words, so that an answer can be had only by reading the question.
"""

from __future__ import annotations

import calendar
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

_WORDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))

FIRST_NAMES: list[str] = _WORDS["first_names"].split()
LAST_NAMES: list[str] = _WORDS["last_names"].split()
PLACES: list[str] = _WORDS["places"].split()
CATEGORIES: dict[str, list[str]] = {name: words.split() for name, words in _WORDS["categories"].items()}
"""Nouns by what they name: animals, food, tools, ..."""
OBJECTS = [
    word for name in ("food", "tool", "clothing", "furniture", "instrument") for word in CATEGORIES[name]
] + _WORDS["other_objects"].split()
"""Things that one person can give another."""
ADJECTIVES: list[str] = _WORDS["adjectives"].split()
GOOD_WORDS: list[str] = _WORDS["good_words"].split()
BAD_WORDS: list[str] = _WORDS["bad_words"].split()
DAYS = [calendar.day_name[index] for index in range(7)]
MONTHS = [calendar.month_name[index] for index in range(1, 13)]
ONSETS, VOWELS, CODAS = (_WORDS[name].split() for name in ("onsets", "vowels", "codas"))

PLURAL_ENDINGS = (
    ("sheep", "sheep"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("foot", "feet"),
    ("knife", "knives"),
)


class Lexicon:
    """Draws words of every kind from one seeded source.

    Args:
        book_words: Words found in the books; see `book_words`.
    """

    def __init__(self, book_words: Iterable[str]) -> None:
        self.book_words = list(book_words)
        self.small_words = [word for word in self.book_words if len(word) <= 8]

    def invented(self, rng: random.Random) -> str:
        """A word that no list holds, of one to three syllables."""
        return "".join(self._syllable(rng) for _ in range(rng.choice((1, 2, 2, 2, 3))))

    def _syllable(self, rng: random.Random) -> str:
        onset, vowel, coda = (
            rng.choice(ONSETS),
            rng.choice(VOWELS),
            rng.choice(CODAS),
        )
        return onset + vowel + coda.replace("-", "")

    def first_name(self, rng: random.Random) -> str:
        """A given name, one in four invented."""
        return rng.choice(FIRST_NAMES) if rng.random() < 0.75 else self.invented(rng).capitalize()

    def last_name(self, rng: random.Random) -> str:
        """A family name, one in three invented."""
        return rng.choice(LAST_NAMES) if rng.random() < 0.67 else self.invented(rng).capitalize()

    def name(self, rng: random.Random) -> str:
        """A given name, or a given and a family name."""
        first = self.first_name(rng)
        return first if rng.random() < 0.6 else f"{first} {self.last_name(rng)}"

    def place(self, rng: random.Random) -> str:
        """A town, one in three invented."""
        return rng.choice(PLACES) if rng.random() < 0.67 else self.invented(rng).capitalize()

    def thing(self, rng: random.Random) -> str:
        """A noun for something that can be held."""
        return rng.choice(OBJECTS)

    def word(self, rng: random.Random) -> str:
        """Any lower-case word: from the books, from the lists, or invented."""
        draw = rng.random()
        if draw < 0.55:
            return rng.choice(self.small_words)
        return rng.choice(OBJECTS) if draw < 0.75 else self.invented(rng)

    def code(self, rng: random.Random) -> str:
        """An identifier such as K-204, AB17 or 8831."""
        letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 2)))
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 4)))
        return rng.choice((f"{letters}-{digits}", f"{letters}{digits}", digits))

    def time(self, rng: random.Random) -> str:
        """A time of day such as 14:30 or 9:05."""
        return f"{rng.randint(0, 23)}:{rng.randrange(0, 60, 5):02d}"

    def date(self, rng: random.Random) -> str:
        """A date such as 3 May, 2021-05-03 or Monday."""
        day, month = rng.randint(1, 28), rng.randint(1, 12)
        return rng.choice(
            (
                f"{day} {MONTHS[month - 1]}",
                f"{rng.randint(1980, 2040)}-{month:02d}-{day:02d}",
                rng.choice(DAYS),
            )
        )

    def price(self, rng: random.Random) -> str:
        """A price such as 12 or 7.50."""
        return (
            str(rng.randint(1, 120))
            if rng.random() < 0.5
            else f"{rng.randint(1, 60)}.{rng.randrange(0, 100, 5):02d}"
        )


def book_words(texts: Iterable[str], *, least: int = 6) -> list[str]:
    """Lower-case words of three to eleven letters that occur at least `least` times, sorted."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,11}\b", text))
    return sorted(word for word, count in counts.items() if count >= least)


def plural(noun: str) -> str:
    """The plural of a noun of the lists."""
    for singular, irregular in PLURAL_ENDINGS:
        if noun == singular:
            return irregular
    if noun.endswith(("s", "sh", "ch", "x")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
