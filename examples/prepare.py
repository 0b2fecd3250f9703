"""Turns the raw texts of the three example tasks into jsonl files: `python examples/prepare.py`.

examples/data/grimm/{train,eval}.jsonl               {"text": ...}
examples/data/clinc150/{train,dev,test}.jsonl        {"prompt": question, "completion": intent in words}
examples/data/e2e/{train,dev,test}.jsonl             {"prompt": meaning, "completion": sentence}
                                                     with all "references" in dev and test
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / ".." / "shared" / "datasets"

Rows = Iterable[dict[str, object]]


def grimm(source: Path) -> dict[str, Rows]:
    """Grimm's fairy tales, a line for each paragraph, the last tenth of the characters held out.

    Printed lines are joined again; typographic quotes, which small vocabularies lack, are written plainly.
    """
    printed = (source / "books" / "grimms-fairy-tales.txt").read_text(encoding="utf-8")
    plain = printed.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))
    text = "\n".join(" ".join(paragraph.split()) for paragraph in plain.split("\n\n") if paragraph.strip())
    cut = len(text) * 9 // 10
    return {"train": [{"text": text[:cut]}], "eval": [{"text": text[cut:]}]}


def clinc150(source: Path) -> dict[str, Rows]:
    """Questions and their intents (150 of them, none out of scope), with the splits of the source."""
    splits = json.loads((source / "clinc150" / "data_small.json").read_text(encoding="utf-8"))
    names = {"train": "train", "dev": "val", "test": "test"}
    return {ours: [intent_row(*pair) for pair in splits[theirs]] for ours, theirs in names.items()}


def intent_row(question: str, intent: str) -> dict[str, object]:
    """A question, an arrow, and the intent's name with spaces for underscores."""
    return {"prompt": f"{question} ->", "completion": " " + intent.replace("_", " ")}


def e2e(source: Path, seed: int = 0, num_dev: int = 60, num_test: int = 200) -> dict[str, Rows]:
    """Restaurant descriptions, split so that no meaning representation is in two splits.

    Training has a row for every sentence; dev and test have one row for every meaning, with all its sentences
    as references for BLEU.
    """
    meanings: dict[str, list[str]] = {}
    for name in ("valid", "test"):
        for line in (source / "e2e_nlg" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            meaning, _, sentence = line.partition("||")
            meanings.setdefault(meaning.strip(), []).append(sentence.strip())
    order = sorted(meanings)
    random.Random(seed).shuffle(order)
    test, dev, train = order[:num_test], order[num_test : num_test + num_dev], order[num_test + num_dev :]
    return {
        "train": [{"prompt": f"{m} ->", "completion": f" {s}"} for m in train for s in meanings[m]],
        "dev": [described_row(m, meanings[m]) for m in dev],
        "test": [described_row(m, meanings[m]) for m in test],
    }


def described_row(meaning: str, sentences: list[str]) -> dict[str, object]:
    """One meaning; its first sentence stands as the completion, all of them as references."""
    return {"prompt": f"{meaning} ->", "completion": f" {sentences[0]}", "references": sentences}


TASKS: dict[str, Callable[[Path], dict[str, Rows]]] = {"grimm": grimm, "clinc150": clinc150, "e2e": e2e}


def write_jsonl(path: Path, rows: Rows) -> int:
    """Write one JSON object a line; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def prepare(names: Iterable[str] = tuple(TASKS), source: Path = SOURCE, out: Path = HERE / "data") -> None:
    """Write the files of the named tasks."""
    for name in names:
        for split, rows in TASKS[name](source).items():
            path = out / name / f"{split}.jsonl"
            print(f"{path}: {write_jsonl(path, rows)} rows")  # noqa: T201 - a script that tells what it wrote


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the example tasks as jsonl files.")
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; all when none is named")
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder with books/, clinc150/, e2e_nlg/")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="where the jsonl files go")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"unknown tasks: {', '.join(sorted(unknown))}")
    if not args.source.is_dir():
        parser.error(f"no datasets at {args.source}; name their folder with --source")
    prepare(args.tasks or TASKS, args.source, args.out)


if __name__ == "__main__":
    main()
