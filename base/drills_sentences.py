"""Exercises about sentences: fill a template, take fields out, answer from a text, rewrite, choose a word.

They join `drills_words.DRILLS`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from drills_words import Drill, drill
from lexicon import ADJECTIVES, CATEGORIES, Lexicon, article, plural

Facts = dict[str, str]

FIELDS: dict[str, Callable[[Lexicon, random.Random], str]] = {
    "name": lambda words, rng: words.name(rng),
    "friend": lambda words, rng: words.first_name(rng),
    "place": lambda words, rng: words.place(rng),
    "item": lambda words, rng: words.thing(rng),
    "colour": lambda words, rng: rng.choice(CATEGORIES["colour"]),
    "animal": lambda words, rng: rng.choice(CATEGORIES["animal"]),
    "job": lambda words, rng: rng.choice(CATEGORIES["job"]),
    "food": lambda words, rng: rng.choice(CATEGORIES["food"]),
    "number": lambda words, rng: str(rng.randint(2, 99)),
    "date": lambda words, rng: words.date(rng),
    "time": lambda words, rng: words.time(rng),
    "price": lambda words, rng: words.price(rng),
    "code": lambda words, rng: words.code(rng),
}

_PATTERNS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "sentences.yaml").read_text(encoding="utf-8")
)
SENTENCES: list[str] = _PATTERNS["sentences"]
"""Statements with slots named by `FIELDS`."""
SYNONYMS: dict[str, list[str]] = _PATTERNS["synonyms"]
"""What a field is called when it is asked for."""
QUESTIONS: dict[str, list[str]] = _PATTERNS["questions"]
"""Questions that a field answers."""
INTENTS: dict[str, list[str]] = _PATTERNS["intents"]
"""Messages by kind."""


def fields_of(sentence: str) -> list[str]:
    """Names of the slots of a sentence pattern, in their order."""
    found = [name.removeprefix("a:") for name in re.findall(r"{([a-z:]+)}", sentence)]
    return [name[:-1] if name not in FIELDS else name for name in found]


def draw_facts(sentence: str, rng: random.Random, words: Lexicon) -> Facts:
    """A fresh value for every slot of a sentence pattern."""
    return {name: FIELDS[name](words, rng) for name in fields_of(sentence)}


def fill(sentence: str, facts: Facts) -> str:
    """The sentence pattern with its slots filled; `{a:x}` takes an article and `{xs}` a plural."""

    def value(match: re.Match[str]) -> str:
        slot = match[1]
        if slot.startswith("a:"):
            return article(facts[slot[2:]])
        return facts[slot] if slot in facts else plural(facts[slot[:-1]])

    return re.sub(r"{([a-z:]+)}", value, sentence)


@drill(5)
def answer_from_text(rng: random.Random, words: Lexicon) -> Drill:
    """Answer a question from a sentence, which may stand between others."""
    instruction = rng.choice(("", "", "Answer from the text.", "Read and answer.", "Use only the text."))
    marks = rng.choice(
        (("", "\n", ""), ("", "\n", ""), ("Text: ", "\nQuestion: ", ""), ('"', '"\n', ""), ("", " ", ""))
    )
    more = rng.choice((0, 0, 1, 2))

    def make() -> tuple[str, str]:
        sentence = rng.choice(SENTENCES)
        facts = draw_facts(sentence, rng, words)
        asked = rng.choice(sorted(facts))
        others = [text for text in SENTENCES if asked not in fields_of(text)]
        texts = [fill(sentence, facts)]
        for text in rng.sample(others, min(more, len(others))):
            texts.insert(rng.randint(0, len(texts)), fill(text, draw_facts(text, rng, words)))
        return f"{marks[0]}{' '.join(texts)}{marks[1]}{rng.choice(QUESTIONS[asked])}", facts[asked]

    return Drill(instruction, make)


def _record_formats(rng: random.Random, names: list[str]) -> tuple[str, Callable[[list[str]], str]]:
    """One way of writing a record: how it is asked for, and how values become the answer."""
    labels = [rng.choice(SYNONYMS[name]) for name in names]
    style = rng.randrange(6)
    if style == 0:
        return "as JSON with " + ", ".join(labels), lambda values: json.dumps(
            dict(zip(labels, values, strict=True))
        )
    if style == 1:
        between = rng.choice((": ", " = ", " - ", ":"))
        line = rng.choice(("\n", "\n", ", "))
        asked = rng.choice((", ", " and ")).join(labels)
        return asked, lambda values: line.join(
            f"{x}{between}{y}" for x, y in zip(labels, values, strict=True)
        )
    if style == 2:
        between = rng.choice((" / ", ", ", " + ", " -> ", "; ", " ; "))
        return between.join(labels), between.join
    if style == 3:
        left, right = rng.choice((("<", ">"), ("[", "]"), ("(", ")")))
        asked = " ".join(f"{left}{label}{right}" for label in labels)
        return asked, lambda values: " ".join(f"{left}{value}{right}" for value in values)
    if style == 4:
        between = rng.choice((" with ", " and ", " for ", " in ", " by "))
        return between.join(labels), between.join
    head = words_head(rng)
    return head + " " + " ".join(labels), lambda values: head + " " + " ".join(values)


def words_head(rng: random.Random) -> str:
    """A word that opens a record."""
    return rng.choice(
        ("RECORD", "note", "Found:", "Result:", "entry", "ITEM", "SET", "save", "Summary:", "OUT")
    )


@drill(9)
def extract_fields(rng: random.Random, words: Lexicon) -> Drill:
    """Take one to four fields out of a sentence and write them in a given form."""
    wanted = rng.randint(1, 4)
    patterns = [text for text in SENTENCES if len(fields_of(text)) >= wanted]
    shape = fields_of(rng.choice(patterns))
    names = rng.sample(list(dict.fromkeys(shape)), min(wanted, len(set(shape))))
    fitting = [text for text in SENTENCES if set(names) <= set(fields_of(text))]
    asked, write = _record_formats(rng, names)
    instruction = rng.choice(
        ("Extract {}", "Take out {}", "Give {}", "Write {}", "Find {} in the text.", "{}", "Fill in: {}")
    )

    def make() -> tuple[str, str]:
        sentence = rng.choice(fitting)
        facts = draw_facts(sentence, rng, words)
        return fill(sentence, facts), write([facts[name] for name in names])

    return Drill(instruction.format(asked), make)


@drill(5)
def fill_template(rng: random.Random, words: Lexicon) -> Drill:
    """Put given values into a template."""
    sentence = rng.choice(SENTENCES)
    names = list(dict.fromkeys(fields_of(sentence)))
    left, right = rng.choice((("{", "}"), ("[", "]"), ("<", ">"), ("", "")))
    shown = re.sub(
        r"{(?:a:)?([a-z]+)}", lambda match: f"{left}{match[1]}{right}" if left else "___", sentence
    )
    pair = rng.choice(("{}: {}", "{} = {}", "{}={}"))
    separator = rng.choice((", ", "; ", "\n"))
    instruction = rng.choice((
        f"Fill in the template: {shown}", f"Write a sentence like: {shown}",
        f"Template: {shown}\nUse these values.", f"Complete: {shown}",
    ))  # fmt: skip

    def make() -> tuple[str, str]:
        facts = draw_facts(sentence, rng, words)
        order = rng.sample(names, len(names)) if left else names
        return separator.join(pair.format(name, facts[name]) for name in order), fill(sentence, facts)

    return Drill(instruction, make)


@drill(3)
def rewrite(rng: random.Random, words: Lexicon) -> Drill:
    """Say the same with another pattern."""
    source, target = rng.choice(_PATTERNS["rewrites"])
    if rng.random() < 0.4:
        source, target = target, source
    instruction = rng.choice(
        ("Rewrite the sentence.", "Say it another way.", "Turn the sentence around.", "")
    )

    def make() -> tuple[str, str]:
        facts = draw_facts(source + target, rng, words)
        return fill(source, facts), fill(target, facts)

    example, changed = make()
    return Drill(f"{instruction} Example: {example} => {changed}".strip(), make)


@drill(2)
def replace_word(rng: random.Random, words: Lexicon) -> Drill:
    """Replace or leave out one word of a sentence."""
    remove = rng.random() < 0.3
    ask = rng.choice(("Replace {0} by {1}.", "Change {0} to {1}.", "Write {1} instead of {0}."))
    if remove:
        ask = rng.choice(("Leave out {0}.", "Remove the word {0}.", "Write it without {0}."))

    def make() -> tuple[str, str]:
        items = _sentence_words(rng, words)
        place = rng.choice([index for index, item in enumerate(items) if items.count(item) == 1])
        new = words.word(rng)
        changed = [new if index == place else item for index, item in enumerate(items)]
        if remove:
            del changed[place]
        return f"{' '.join(items)}\n{ask.format(items[place], new)}", " ".join(changed)

    return Drill("", make)


def _sentence_words(rng: random.Random, words: Lexicon) -> list[str]:
    return ["the", rng.choice(ADJECTIVES), rng.choice(CATEGORIES["animal"]), "and", "the", words.thing(rng)][
        rng.choice((0, 1)) :
    ] + ([words.word(rng)] if rng.random() < 0.4 else [])


@drill(3)
def who_has_what(rng: random.Random, words: Lexicon) -> Drill:
    """Keep apart several people and what belongs to them."""
    field = rng.choice(("item", "place", "colour", "animal", "job", "food", "number"))
    fact, question = {
        "item": ("{} has the {}.", "What does {} have?"), "place": ("{} is in {}.", "Where is {}?"),
        "colour": ("{} likes {}.", "Which colour does {} like?"),
        "animal": ("{} has a pet {}.", "Which pet has {}?"),
        "job": ("{} works as a {}.", "What is the job of {}?"), "food": ("{} eats {}.", "What does {} eat?"),
        "number": ("{} is {} years old.", "How old is {}?"),
    }[field]  # fmt: skip
    backwards = rng.random() < 0.3

    def make() -> tuple[str, str]:
        people = list(dict.fromkeys(words.first_name(rng) for _ in range(rng.randint(2, 4))))
        values = list(dict.fromkeys(FIELDS[field](words, rng) for _ in people))
        pairs = list(zip(people, values, strict=False))
        person, value = rng.choice(pairs)
        text = " ".join(fact.format(*pair) for pair in pairs)
        if backwards:
            return f"{text}\nWho goes with {value}?", person
        return f"{text}\n{question.format(person)}", value

    return Drill("", make)


@drill(2)
def choose_word(rng: random.Random, words: Lexicon) -> Drill:
    """Choose the word that fits the gap."""
    instruction = rng.choice(
        ("Choose the word that fits.", "Which word fits the gap?", "Fill the gap.", "Pick one word.")
    )

    def make() -> tuple[str, str]:
        frame, kind = rng.choice(_PATTERNS["gaps"])
        answer = rng.choice(CATEGORIES[kind])
        others = rng.sample([name for name in sorted(CATEGORIES) if name != kind], rng.randint(1, 3))
        options = [answer] + [rng.choice(CATEGORIES[name]) for name in others]
        rng.shuffle(options)
        text = fill(frame, draw_facts(frame, rng, words))
        return f"{text}\n{rng.choice(('Options: ', 'Words: ', ''))}{', '.join(options)}", answer

    return Drill(instruction, make)


@drill(2.5)
def intent(rng: random.Random, words: Lexicon) -> Drill:
    """Say which of the given kinds a message is."""
    labels = rng.sample(sorted(INTENTS), rng.randint(2, 4))
    listed = rng.choice((", ", " / ", " or ")).join(labels)
    instruction = rng.choice(
        (
            f"What kind of message is it: {listed}?",
            f"Classify: {listed}.",
            f"Label the message ({listed}).",
            f"Labels: {listed}",
        )
    )
    named = rng.random() < 0.3

    def make() -> tuple[str, str]:
        label = rng.choice(labels)
        pattern = rng.choice(INTENTS[label])
        facts = draw_facts(pattern, rng, words)
        if named and "name" in facts:
            return fill(pattern, facts), f"{label} {facts['name']}"
        return fill(pattern, facts), label

    return Drill(instruction, make)


@drill(1.5)
def word_problem(rng: random.Random, words: Lexicon) -> Drill:
    """Add or subtract within a small story."""
    instruction = rng.choice(("", "Solve it.", "Give the number only."))

    def make() -> tuple[str, str]:
        person, thing = words.first_name(rng), plural(words.thing(rng))
        first, second = rng.randint(1, 12), rng.randint(1, 9)
        if first > second and rng.random() < 0.5:
            story = rng.choice(("{0} has {1} {3} and loses {2}.", "There are {1} {3}. {0} takes {2} away."))
            result = first - second
        else:
            story = rng.choice(("{0} has {1} {3} and gets {2} more.", "{0} finds {1} {3}, then {2} more."))
            result = first + second
        return f"{story.format(person, first, second, thing)} How many {thing} are there now?", str(result)

    return Drill(instruction, make)
