"""What is measured on a finished model: bits per character, exact match, BLEU and slot accuracy."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft.data.formats import Pair
from graft.evaluate.generate import GenerationConfig
from graft.evaluate.tasks import evaluate, evaluate_file
from graft.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]


def data_file(task: str, split: str) -> Path:
    return ROOT / "examples" / "data" / task / f"{split}.jsonl"


def measure_grimm(model: Any, tokenizer: Any, config: RunConfig, split: str) -> dict[str, float]:
    found = evaluate_file(
        model, tokenizer, str(data_file("grimm", "eval")), ["bits_per_character"], data=config.data
    )
    return found.metrics


def measure_clinc150(model: Any, tokenizer: Any, config: RunConfig, split: str) -> dict[str, float]:
    found = evaluate_file(
        model,
        tokenizer,
        str(data_file("clinc150", split)),
        ["exact_match"],
        generation=GenerationConfig(max_new_tokens=16),
        batch_size=64,
    )
    return {"exact_match": 100 * found.metrics["exact_match"]}


def measure_e2e(model: Any, tokenizer: Any, config: RunConfig, split: str) -> dict[str, float]:
    rows = [json.loads(line) for line in data_file("e2e", split).read_text(encoding="utf-8").splitlines()]
    examples = [Pair(row["prompt"], row["completion"], "") for row in rows]
    generation = GenerationConfig(max_new_tokens=80)
    found = evaluate(model, tokenizer, examples, ["exact_match"], generation=generation, batch_size=50)
    texts = [(row.prediction or "").strip() for row in found.predictions]
    return {
        "bleu": corpus_bleu(texts, [row["references"] for row in rows]),
        "slot_accuracy": statistics.mean(
            share for text, row in zip(texts, rows, strict=True) for share in slots_told(row["prompt"], text)
        ),
    }


def corpus_bleu(texts: list[str], references: list[list[str]]) -> float:
    """sacrebleu's, as text that is already cut into words is commonly given to it (hence the force)."""
    import sacrebleu

    most = max(map(len, references))
    columns = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(texts, columns, force=True).score)


NOT_FRIENDLY = re.compile(r"\b(no|not|non|n't|isn't|adult|adults)\b")
FRIENDLY = re.compile(r"famil|kid|child")


def slots_told(prompt: str, text: str) -> list[float]:
    """For each slot of a meaning 1 where the text says its value, else 0.

    Names, food and places must stand as they are; for the rest a few words of each value are looked for.
    Characters that the model's vocabulary lacks (the pound sign, accents) do not count.
    """
    told, said = [], plain(text)
    for slot in prompt.removesuffix("->").split("|"):
        name, _, value = slot.partition(" : ")
        told.append(float(is_told(plain(name), plain(value), said)))
    return told


def plain(text: str) -> str:
    ascii_only = text.lower().encode("ascii", "ignore").decode()
    return " ".join(ascii_only.replace("-", " ").split())


def is_told(name: str, value: str, said: str) -> bool:
    if name == "family friendly":
        return bool(FRIENDLY.search(said)) and bool(NOT_FRIENDLY.search(said)) == (value == "no")
    return any(word in said for word in WAYS_TO_SAY.get(name, {}).get(value, [value]))


WAYS_TO_SAY = {
    "price": {
        "less than 20": ["less than", "cheap", "low", "under 20", "inexpensive"],
        "cheap": ["cheap", "low", "inexpensive"],
        "20 25": ["20 25", "20 to 25", "20 and 25", "moderate"],
        "moderate": ["moderate", "average", "mid", "medium", "reasonabl"],
        "more than 30": ["more than 30", "high", "over 30", "expensive"],
        "high": ["high", "expensive"],
    },
    "customer rating": {
        "low": ["low", "poor", "1 out", "bad", "one star"],
        "average": ["average", "3 out", "moderate", "decent"],
        "high": ["high", "5 out", "excellent", "great", "top"],
        "1 out of 5": ["1 out of 5", "low", "1 star", "one star", "one out", "poor", "1 of 5"],
        "3 out of 5": ["3 out of 5", "average", "3 star", "three star", "three out", "3 of 5"],
        "5 out of 5": ["5 out of 5", "high", "5 star", "five star", "five out", "excellent", "5 of 5"],
    },
    "area": {"city centre": ["centre", "center"], "riverside": ["river"]},
}


MEASURES: dict[str, Callable[[Any, Any, RunConfig, str], dict[str, float]]] = {
    "grimm": measure_grimm,
    "clinc150": measure_clinc150,
    "e2e": measure_e2e,
}
UNITS = {
    "grimm": ["bits_per_character"],
    "clinc150": ["exact_match"],
    "e2e": ["bleu", "slot_accuracy"],
}
