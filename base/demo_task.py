"""Writes the data of the demo task: a customer's message becomes one line of a ticket list.

The line holds the kind of request (one of five), the order number, the thing and the customer:
`refund | K-2047 | blue kettle | Clara Berg`. Names, things and order numbers of the evaluation rows occur in
no training row, so the answer can only be had by reading. The base was pretrained on no such line.

    python base/demo_task.py --out src/graft/builtin/tasks/demo
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from lexicon import CATEGORIES, FIRST_NAMES, LAST_NAMES, OBJECTS

Row = dict[str, Any]

REQUESTS: dict[str, tuple[str, ...]] = {
    "refund": (
        "The {thing} from order {order} is not what I wanted, please give me my money back.",
        "I sent the {thing} back last week. When will I get my money for order {order}?",
        "Order {order} was far too dear. I return the {thing} and ask for a refund.",
        "I do not want the {thing} any more. Pay me back for order {order}.",
        "You took my money twice for the {thing}, order {order}. Please pay it back.",
    ),
    "replace": (
        "The {thing} arrived broken. Please send me a new one for order {order}.",
        "My {thing} has a crack. Order {order}, I need another one.",
        "In order {order} you sent a damaged {thing}. Can I have a new one?",
        "The {thing} stopped working after a day. Order {order}, please exchange it.",
        "Order {order}: the {thing} is torn, send another one please.",
    ),
    "track": (
        "Where is my {thing}? The number is {order}.",
        "I am still waiting for the {thing} of order {order}. Has it left yet?",
        "Order {order} should be here by now. On which day will the {thing} come?",
        "Can you tell me when the {thing} will arrive? My order is {order}.",
        "Nobody brought my {thing} today. Where is order {order}?",
    ),
    "cancel": (
        "Please stop order {order}, I no longer need the {thing}.",
        "I ordered the {thing} by mistake. Cancel {order} before you send it.",
        "Do not send the {thing}. I take back order {order}.",
        "I have changed my mind about the {thing}, so please cancel order {order}.",
        "Order {order} is a mistake. Do not pack the {thing}!",
    ),
    "invoice": (
        "I need a bill for the {thing}, order {order}.",
        "Please send the invoice of order {order}. It was the {thing}.",
        "For my taxes I need the receipt of the {thing}. The order is {order}.",
        "There was no bill with the {thing}. Can you write one for {order}?",
        "The receipt for order {order} is lost. Please print it again, it was a {thing}.",
    ),
}
"""What customers write, by kind of request."""

OPENINGS = (
    "", "", "Hello! ", "Good morning. ", "Dear team, ", "Hi, ", "Hello, this is {name}. ",
    "My name is {name}. ", "I am {name}. ", "{name} here. ",
)  # fmt: skip
CLOSINGS = (" Yours, {name}", " Thanks, {name}", " {name}", " Best wishes, {name}", " Regards from {name}")


def rows(*, num_train: int, num_eval: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows, with no name, thing or order number in common.

    Args:
        num_train: Number of training rows.
        num_eval: Number of evaluation rows.
        seed: Decides everything.
    """
    rng = random.Random(seed)
    first, last, nouns = _halves(FIRST_NAMES, rng), _halves(LAST_NAMES, rng), _halves(_nouns(), rng)
    orders = rng.sample(range(1000, 10_000), num_train + num_eval)
    made: tuple[list[Row], list[Row]] = ([], [])
    for index, number in enumerate(orders):
        part = int(index >= num_train)
        facts = {
            "name": f"{rng.choice(first[part])} {rng.choice(last[part])}",
            "thing": f"{rng.choice(CATEGORIES['colour'])} {rng.choice(nouns[part])}",
            "order": f"{rng.choice('ABCDEFGHJKLMNPRSTUVWXYZ')}-{number}",
        }
        made[part].append(_row(rng.choice(sorted(REQUESTS)), facts, rng))
    return made


def _row(kind: str, facts: dict[str, str], rng: random.Random) -> Row:
    opening = rng.choice(OPENINGS)
    closing = "" if "{name}" in opening else rng.choice(CLOSINGS)
    message = (opening + rng.choice(REQUESTS[kind]) + closing).format(**facts)
    line = " | ".join((kind, facts["order"], facts["thing"], facts["name"]))
    return {"messages": [{"role": "user", "content": message}, {"role": "assistant", "content": line}]}


def _nouns() -> list[str]:
    foods, others = set(CATEGORIES["food"]), dict.fromkeys(OBJECTS)
    return [noun for noun in others if noun not in foods]


def _halves(words: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Two thirds for training, one third for evaluation."""
    shuffled = rng.sample(words, len(words))
    cut = 2 * len(words) // 3
    return shuffled[:cut], shuffled[cut:]


def write(directory: Path, *, num_train: int = 2400, num_eval: int = 200, seed: int = 0) -> None:
    """Write train.jsonl and eval.jsonl; see `rows`."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = rows(num_train=num_train, num_eval=num_eval, seed=seed)
    for name, part in zip(("train", "eval"), parts, strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the demo task's files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
