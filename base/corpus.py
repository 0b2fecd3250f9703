"""Writes the pretraining corpus of the built-in base: old books and generated exercises, as JSONL.

Rows are of three kinds, mixed: {"text"} for passages of books, {"messages"} for conversations, and
{"prompt", "completion"} for the same exercises without a chat. The same arguments give the same bytes.

    python base/corpus.py --books ../shared/datasets/books --out /tmp/corpus.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drills_sentences import answer_from_text, extract_fields, fill_template, rewrite, who_has_what
from drills_words import DRILLS, Drill, Maker, secret_rule
from lexicon import Lexicon, book_words

Row = dict[str, Any]

HELD_OUT_BOOKS = ("grimms-fairy-tales",)
"""Books that the base never sees, so that they can serve as a test of language modelling."""

ASCII_MARKS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "–": "-", "\ufeff": "", "_": ""}
)

READING: set[Maker] = {answer_from_text, extract_fields, fill_template, rewrite, who_has_what}
"""Drills in which a sentence must be read."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "Answer briefly.", "Be short and exact.",
    "You answer with nothing but the result.", "Follow the instruction.", "You are a careful clerk.",
    "Give only the answer.",
)  # fmt: skip

PLAIN_FORMS = (
    ("{}\nAnswer:", " "), ("{}\nAnswer:", " "), ("Q: {}\nA:", " "), ("Input: {}\nOutput:", " "),
    ("{} ->", " "), ("{}\n=>", " "), ("### Instruction:\n{}\n\n### Response:", "\n"), ("{}\n", ""),
    ("Task: {}\nResult:", " "), ("{}\n---\n", ""), ("Question: {}\nAnswer:", " "),
    ("User: {}\nAssistant:", " "),
)  # fmt: skip


def read_books(directory: Path) -> dict[str, str]:
    """The texts of the books that may be learnt from, by name, one line per paragraph.

    Args:
        directory: Holds one .txt file per book.
    """
    books = {path.stem: unwrap(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.txt"))}
    return {name: text for name, text in books.items() if name not in HELD_OUT_BOOKS}


def unwrap(text: str) -> str:
    """Undo line wrapping: one line per paragraph, plain quotation marks, no Gutenberg notices."""
    text = re.sub(r"\*\*\* ?(START|END) OF .*?\*\*\*", "", text.replace("\r\n", "\n"))
    text = text.translate(ASCII_MARKS)
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in paragraphs if part)


def passages(text: str, rng: random.Random) -> Iterator[str]:
    """Cut a book into passages of whole sentences, most of 300 to 900 characters, some of 1600."""
    sentences = re.split(r"(?<=[.!?\"'])(?=[ \n])", text)
    held, limit = "", rng.randint(150, 900)
    for sentence in sentences:
        if held and len(held) + len(sentence) > limit:
            yield held.strip()
            held, limit = "", rng.randint(900, 1600) if rng.random() < 0.2 else rng.randint(300, 900)
        held += sentence
    if held.strip():
        yield held.strip()


def question(drill: Drill, given: str, rng: random.Random) -> str:
    """Instruction and input as one text."""
    if not drill.instruction:
        return given
    instruction = drill.instruction
    if rng.random() < 0.1:
        instruction = instruction[0].lower() + instruction[1:]
    form = rng.choice(
        ("{0}\n{1}", "{0}\n{1}", "{0} {1}", "{0}\n\n{1}", "{1}\n{0}", "{0}\nText: {1}", '{0} "{1}"')
    )
    return form.format(instruction, given)


def conversation(rng: random.Random, words: Lexicon, stress: float = 1) -> Row:
    """A chat of one to five exercises, mostly of one drill."""
    drill = draw_drill(rng, words, stress)
    messages: list[dict[str, str]] = []
    system_has_it = bool(drill.instruction) and rng.random() < 0.25
    if system_has_it or rng.random() < 0.15:
        messages.append(
            {"role": "system", "content": drill.instruction if system_has_it else rng.choice(SYSTEM_PROMPTS)}
        )
    asked = system_has_it
    for _ in range(rng.choice((1, 1, 2, 3, 3, 4, 5))):
        if messages and rng.random() < 0.15:
            drill, asked, system_has_it = draw_drill(rng, words, stress), False, False
        given, answer = drill.make()
        short = system_has_it or (asked and rng.random() < 0.4)
        asked = True
        messages.append({"role": "user", "content": given if short else question(drill, given, rng)})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def plain(rng: random.Random, words: Lexicon) -> Row:
    """An exercise as prompt and completion, with up to four solved examples before it."""
    maker = draw_maker(rng)
    drill = maker(rng, words)
    head, gap = rng.choice(PLAIN_FORMS)
    num_examples = rng.randint(2, 5) if maker is secret_rule else rng.choice((0, 0, 0, 1, 2, 3))
    once = num_examples > 0 and bool(drill.instruction) and rng.random() < 0.6
    parts = [drill.instruction] if once else []
    for _ in range(num_examples):
        given, answer = drill.make()
        parts.append(head.format(given if once else question(drill, given, rng)) + gap + answer)
    given, answer = drill.make()
    parts.append(head.format(given if once else question(drill, given, rng)))
    return {"prompt": rng.choice(("\n", "\n\n")).join(parts), "completion": gap + answer}


def draw_maker(rng: random.Random, stress: float = 1) -> Maker:
    """One of the drills, by weight; those of `READING` count `stress` times."""
    weights = [weight * (stress if maker in READING else 1) for maker, weight in DRILLS.items()]
    return rng.choices(list(DRILLS), weights)[0]


def draw_drill(rng: random.Random, words: Lexicon, stress: float = 1) -> Drill:
    """One wording of one of the drills that can be answered without examples, by weight."""
    maker = draw_maker(rng, stress)
    while maker is secret_rule:
        maker = draw_maker(rng, stress)
    return maker(rng, words)


def rows(
    books: dict[str, str],
    *,
    book_copies: int,
    num_conversations: int,
    num_plain: int,
    seed: int,
    stress: float = 1,
) -> list[Row]:
    """The whole corpus in a seeded order.

    Args:
        books: Texts by name.
        book_copies: How often each book occurs, cut into other passages each time.
        num_conversations: Number of chat rows.
        num_plain: Number of prompt and completion rows.
        seed: Decides everything.
        stress: How many times more often conversations are about `READING` than by the drills' weights.
    """
    rng = random.Random(seed)
    words = Lexicon(book_words(books.values()))
    found: list[Row] = []
    for _ in range(book_copies):
        found += [{"text": passage} for text in books.values() for passage in passages(text, rng)]
    found += [conversation(rng, words, stress) for _ in range(num_conversations)]
    found += [plain(rng, words) for _ in range(num_plain)]
    rng.shuffle(found)
    return found


def write_corpus(books_directory: Path, out: Path, **sizes: int) -> list[Row]:
    """Generate the corpus and write it as JSONL; see `rows`."""
    found = rows(read_books(books_directory), **sizes)
    with out.open("w", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return found


def main() -> None:
    """Write the corpus file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--books", type=Path, required=True, help="directory of .txt books")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--book-copies", type=int, default=2)
    parser.add_argument("--num-conversations", type=int, default=36_000)
    parser.add_argument("--num-plain", type=int, default=36_000)
    parser.add_argument("--seed", type=int, default=0)
    values = vars(parser.parse_args())
    found = write_corpus(values.pop("books"), values.pop("out"), **values)
    sys.stdout.write(f"{len(found):,} rows\n")


if __name__ == "__main__":
    main()
