"""Exercises about words, lists and numbers: copy, reverse, sort, count, look up, classify, compute.

A drill is one fixed wording with a maker of fresh questions, so that several questions of one drill can stand
in one conversation. `DRILLS` lists them with their weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from lexicon import ADJECTIVES, BAD_WORDS, CATEGORIES, GOOD_WORDS, Lexicon, plural


@dataclass(frozen=True)
class Drill:
    """One wording of one exercise.

    Args:
        instruction: What is asked for; may be empty when examples say it.
        make: Draws one (input, answer) pair.
    """

    instruction: str
    make: Callable[[], tuple[str, str]]


Maker = Callable[[random.Random, Lexicon], Drill]
DRILLS: dict[Maker, float] = {}


def drill(weight: float) -> Callable[[Maker], Maker]:
    """Enter a drill into `DRILLS` with its share of the exercises."""

    def enter(maker: Maker) -> Maker:
        DRILLS[maker] = weight
        return maker

    return enter


SEPARATORS = (", ", " ", "; ", " | ", " / ", " - ", "\n", " > ", ", ", ", ")


def _item_maker(rng: random.Random, words: Lexicon) -> Callable[[], str]:
    kinds: list[Callable[[random.Random], str]] = [
        words.word, words.word, words.word, words.first_name, words.place, words.code, words.thing,
        words.invented, lambda r: str(r.randint(0, 99)), words.name,
    ]  # fmt: skip
    kind = rng.choice(kinds)
    return lambda: kind(rng)


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(20 * count):
        found[make()] = None
        if len(found) == count:
            break
    return list(found)


@drill(3)
def copy_text(rng: random.Random, words: Lexicon) -> Drill:
    """Say the words again, all of them."""
    item = _item_maker(rng, words)
    least, most = rng.choice(((1, 3), (2, 5), (3, 8)))
    separator = rng.choice(SEPARATORS)
    instruction = rng.choice((
        "Repeat the text.", "Copy this exactly.", "Say it again.", "Write the same words once more.", "Echo:",
        "Repeat after me.", "Copy the line.", "Give back the text unchanged.", "Please repeat what I write.",
    ))  # fmt: skip

    def make() -> tuple[str, str]:
        text = separator.join(item() for _ in range(rng.randint(least, most)))
        return text, text

    return Drill(instruction, make)


@drill(3)
def pick_position(rng: random.Random, words: Lexicon) -> Drill:
    """Say the first, last, second, ... item."""
    item, separator = _item_maker(rng, words), rng.choice(SEPARATORS)
    position, names = rng.choice((
        (0, ("first", "very first", "1st")), (1, ("second", "2nd")), (2, ("third", "3rd")),
        (-1, ("last", "final")), (-2, ("second to last", "last but one")),
    ))  # fmt: skip
    name = rng.choice(names)
    instruction = rng.choice((
        f"What is the {name} item?", f"Give the {name} word.", f"Say only the {name} one.",
        f"Which comes {name}?", f"Pick the {name} item of the list.", f"Write the {name} entry.",
    ))  # fmt: skip

    def make() -> tuple[str, str]:
        items = _distinct(item, rng.randint(3, 6))
        return separator.join(items), items[position]

    return Drill(instruction, make)


@drill(2)
def what_follows(rng: random.Random, words: Lexicon) -> Drill:
    """Say the item that stands before or after a given one."""
    item, separator = _item_maker(rng, words), rng.choice(SEPARATORS)
    step = rng.choice((1, 1, -1))
    question = rng.choice(
        ("What comes {} {}?", "Which item is {} {}?", "Name the one right {} {}.", "The item {} {}:")
    )
    side = "after" if step == 1 else "before"

    def make() -> tuple[str, str]:
        items = _distinct(item, rng.randint(3, 7))
        place = rng.randrange(0, len(items) - 1) if step == 1 else rng.randrange(1, len(items))
        return f"{separator.join(items)}\n{question.format(side, items[place])}", items[place + step]

    return Drill("", make)


@drill(2.5)
def reverse_list(rng: random.Random, words: Lexicon) -> Drill:
    """Say the items from last to first."""
    item, separator = _item_maker(rng, words), rng.choice(SEPARATORS)
    instruction = rng.choice((
        "Reverse the list.", "Write the items in reverse order.", "Say it backwards, item by item.",
        "Turn the order around.", "List them from last to first.", "Reverse the order of the words.",
    ))  # fmt: skip

    def make() -> tuple[str, str]:
        items = [item() for _ in range(rng.randint(2, 5))]
        return separator.join(items), separator.join(reversed(items))

    return Drill(instruction, make)


@drill(1.5)
def sort_list(rng: random.Random, words: Lexicon) -> Drill:
    """Sort words by the alphabet, or numbers by size."""
    separator, numbers, down = rng.choice(SEPARATORS), rng.random() < 0.5, rng.random() < 0.3
    if numbers:
        direction = "from largest to smallest" if down else "from smallest to largest"
        instruction = rng.choice(
            (f"Sort the numbers {direction}.", f"Order these {direction}.", f"Sort {direction}.")
        )
    else:
        direction = rng.choice(
            ("in reverse alphabetical order", "from Z to A") if down else ("alphabetically", "from A to Z")
        )
        instruction = rng.choice(
            (f"Sort the words {direction}.", f"Put these in order {direction}.", f"Sort {direction}:")
        )

    def make() -> tuple[str, str]:
        draw = (lambda: rng.randint(1, 99)) if numbers else (lambda: words.word(rng))
        items = [draw() for _ in range(rng.randint(2, 4))]
        ordered = sorted(items, reverse=down)  # type: ignore[type-var]
        return separator.join(map(str, items)), separator.join(map(str, ordered))

    return Drill(instruction, make)


@drill(1.5)
def count_items(rng: random.Random, words: Lexicon) -> Drill:
    """Count the items of a list."""
    item, separator = _item_maker(rng, words), rng.choice((", ", "; ", " | "))
    instruction = rng.choice((
        "How many items are there?", "Count the items.", "How long is this list?",
        "Give the number of entries.",
    ))  # fmt: skip

    def make() -> tuple[str, str]:
        items = [item() for _ in range(rng.randint(1, 8))]
        return separator.join(items), str(len(items))

    return Drill(instruction, make)


@drill(1)
def count_word(rng: random.Random, words: Lexicon) -> Drill:
    """Count how often one word occurs."""

    def make() -> tuple[str, str]:
        target, others = words.word(rng), _distinct(lambda: words.word(rng), 4)
        times = rng.randint(0, 4)
        items = [target] * times + [word for word in others if word != target][: rng.randint(1, 4)]
        rng.shuffle(items)
        return f"{' '.join(items)}\nHow many times does {target} occur?", str(times)

    return Drill("", make)


@drill(2.5)
def yes_no(rng: random.Random, words: Lexicon) -> Drill:
    """Say whether an item is in a list, or which of two numbers is larger."""
    yes, no = rng.choice((("yes", "no"), ("Yes", "No"), ("true", "false"), ("y", "n")))
    instruction = rng.choice(("", "Yes or no?")) if yes == "yes" else f"Answer {yes} or {no}"
    if rng.random() < 0.3:
        return Drill(instruction, lambda: _compare(rng, yes, no))
    item, separator = _item_maker(rng, words), rng.choice(SEPARATORS)
    question = rng.choice(
        ("Is {} in the list?", "Does the list have {}?", "Do you see {} there?", "Contains {}?")
    )

    def make() -> tuple[str, str]:
        items = _distinct(item, rng.randint(2, 6))
        present = rng.random() < 0.5
        asked = rng.choice(items) if present else item()
        return f"{separator.join(items)}\n{question.format(asked)}", yes if asked in items else no

    return Drill(instruction, make)


def _compare(rng: random.Random, yes: str, no: str) -> tuple[str, str]:
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    word, holds = rng.choice((("larger", left > right), ("smaller", left < right), ("more", left > right)))
    return f"Is {left} {word} than {right}?", yes if holds else no


@drill(2)
def arithmetic(rng: random.Random, words: Lexicon) -> Drill:
    """Add, subtract or multiply small numbers."""
    most = rng.choice((9, 9, 20, 50))
    sign = rng.choice("+++--*")
    form = rng.choice(("{} {} {} =", "{} {} {}", "What is {} {} {}?", "Compute {} {} {}.", "{}{}{}="))
    spoken = {"+": "plus", "-": "minus", "*": "times"}[sign] if rng.random() < 0.25 else sign

    def make() -> tuple[str, str]:
        left, right = rng.randint(0, most if sign != "*" else 9), rng.randint(0, most if sign != "*" else 9)
        if sign == "-" and right > left:
            left, right = right, left
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        return form.format(left, f" {spoken} " if spoken != sign and "{}{}" in form else spoken, right), str(
            result
        )

    return Drill("", make)


@drill(5)
def look_up(rng: random.Random, words: Lexicon) -> Drill:
    """Find the value of a key in a list of pairs."""
    key, value = _item_maker(rng, words), _item_maker(rng, words)
    pair = rng.choice(("{}: {}", "{} = {}", "{} -> {}", "{}={}", "{} is {}", "{} ({})", "{} has {}"))
    separator = rng.choice((", ", "; ", "\n", "\n", " | "))
    question = rng.choice(
        ("What is {}?", "{}?", "Value of {}?", "Look up {}.", "Which value belongs to {}?", "Find {}:")
    )
    first = rng.random() < 0.2

    def make() -> tuple[str, str]:
        keys = _distinct(key, rng.randint(2, 6))
        pairs = [(one, value()) for one in keys]
        listing = separator.join(pair.format(*both) for both in pairs)
        asked, answer = rng.choice(pairs)
        text = question.format(asked)
        return (f"{text}\n{listing}" if first else f"{listing}\n{text}"), answer

    return Drill("", make)


@drill(3)
def classify_word(rng: random.Random, words: Lexicon) -> Drill:
    """Say which of the given labels a word belongs to."""
    labels = rng.sample(sorted(CATEGORIES), rng.randint(2, 4))
    listed = rng.choice((", ", " or ", "/", " | ")).join(labels)
    instruction = rng.choice((
        f"Classify the word: {listed}.", f"Which is it: {listed}?", f"Choose one label. Labels: {listed}",
        f"Is this {listed}?", f"Category ({listed}):", f"Answer with one of {listed}.",
    ))  # fmt: skip

    def make() -> tuple[str, str]:
        label = rng.choice(labels)
        word = rng.choice(CATEGORIES[label])
        return (word if rng.random() < 0.6 else f"{rng.choice(ADJECTIVES)} {word}"), label

    return Drill(instruction, make)


@drill(1)
def odd_one_out(rng: random.Random, words: Lexicon) -> Drill:
    """Find the word that does not belong, or the one of a kind."""
    wanted = rng.choice(sorted(CATEGORIES))
    instruction = rng.choice(
        (f"Which word is the {wanted}?", f"Find the {wanted}.", f"Only one is a {wanted}. Which?")
    )

    def make() -> tuple[str, str]:
        others = [name for name in sorted(CATEGORIES) if name != wanted]
        items = [rng.choice(CATEGORIES[rng.choice(others)]) for _ in range(rng.randint(2, 4))]
        answer = rng.choice([word for word in CATEGORIES[wanted] if word not in items])
        items.insert(rng.randint(0, len(items)), answer)
        return ", ".join(items), answer

    return Drill(instruction, make)


@drill(2)
def word_forms(rng: random.Random, words: Lexicon) -> Drill:
    """Change letters or endings: upper case, plural, doubling, a word before or after."""
    add = words.word(rng)
    kind: tuple[tuple[str, ...], Callable[[str], str]] = rng.choice((
        (("Write in capital letters.", "Upper case:", "Make it all capitals."), str.upper),
        (("Start with a capital letter.", "Capitalize the word."), str.capitalize),
        (("Write it twice.", "Say the word two times.", "Double it."), lambda word: f"{word} {word}"),
        (("Write it three times with commas.",), lambda word: f"{word}, {word}, {word}"),
        ((f"Add {add} at the end.", f"Write {add} after it."), lambda word: f"{word} {add}"),
        ((f"Put {add} before it.", f"Write {add} in front."), lambda word: f"{add} {word}"),
        (("Put it in quotes.", "Add quotation marks."), lambda word: f'"{word}"'),
        (("Put it in brackets.",), lambda word: f"[{word}]"),
    ))  # fmt: skip
    if rng.random() < 0.15:
        kind = (("Give the plural.", "More than one:", "Make it plural."), plural)
        return Drill(rng.choice(kind[0]), lambda: (noun := words.thing(rng), plural(noun)))
    return Drill(rng.choice(kind[0]), lambda: (word := words.word(rng), kind[1](word)))


@drill(1.5)
def sentiment(rng: random.Random, words: Lexicon) -> Drill:
    """Tell praise from blame."""
    good, bad = rng.choice(
        (("positive", "negative"), ("good", "bad"), ("happy", "unhappy"), ("praise", "complaint"))
    )
    instruction = rng.choice(
        (f"Is this {good} or {bad}?", f"Sentiment ({good}/{bad}):", f"Label it {good} or {bad}.")
    )
    subjects = (
        CATEGORIES["building"] + CATEGORIES["food"] + CATEGORIES["job"] + ["service", "room", "meal", "film"]
    )
    forms = (
        "The {0} was {1}.",
        "What a {1} {0}!",
        "I found the {0} {1}.",
        "{1} {0}",
        "Such a {1} {0}, I told everyone.",
    )

    def make() -> tuple[str, str]:
        like = rng.random() < 0.5
        text = rng.choice(forms).format(rng.choice(subjects), rng.choice(GOOD_WORDS if like else BAD_WORDS))
        return text, good if like else bad

    return Drill(instruction, make)


@drill(1.5)
def continue_pattern(rng: random.Random, words: Lexicon) -> Drill:
    """Go on with a repeating pattern or a row of numbers."""
    instruction = rng.choice(("Continue the pattern.", "What comes next?", "Go on:", "Next item?"))
    if rng.random() < 0.35:

        def count() -> tuple[str, str]:
            start, step = rng.randint(0, 30), rng.choice((1, 1, 2, 5, 10))
            row = [start + step * index for index in range(5)]
            return ", ".join(map(str, row[:4])), str(row[4])

        return Drill(instruction, count)
    item, separator = _item_maker(rng, words), rng.choice((" ", ", "))

    def make() -> tuple[str, str]:
        cycle = _distinct(item, rng.randint(2, 4))
        shown = len(cycle) * 2 + rng.randrange(0, len(cycle))
        row = [cycle[index % len(cycle)] for index in range(shown + 1)]
        return separator.join(row[:-1]), row[-1]

    return Drill(instruction, make)


@drill(3)
def secret_rule(rng: random.Random, words: Lexicon) -> Drill:
    """Apply made-up labels or formats that only the examples show."""
    item = _item_maker(rng, words)
    left, right = rng.choice(
        (("<", ">"), ("[", "]"), ("*", "*"), ("(", ")"), ("#", ""), ("-- ", ""), ("", "!"), ("_", "_"))
    )
    pattern = rng.choice(("{0}", "{0} {0}", "{1} {0}", "{0}, {1}", "{1}: {0}", "{0} and {1}", "{1} - {0}"))

    def make() -> tuple[str, str]:
        first, second = item(), item()
        return f"{first}, {second}", f"{left}{pattern.format(first, second)}{right}"

    return Drill(rng.choice(("", "Follow the examples.", "Do the same.")), make)
