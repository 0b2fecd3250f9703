"""The demo task: answers that can only be read, evaluation rows that share no value with training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]
SHIPPED = Path(__file__).resolve().parents[3] / "src" / "graft" / "builtin" / "tasks" / "demo"


@pytest.fixture(scope="module")
def parts(script: Script) -> tuple[list[Any], list[Any]]:
    train, held_out = script("demo_task").rows(num_train=300, num_eval=100, seed=5)
    return train, held_out


def slots(row: Any) -> list[str]:
    """Kind, order, thing, customer."""
    return row["messages"][-1]["content"].split(" | ")


def test_answers_are_copied_from_the_message_but_for_the_kind(parts: tuple[list[Any], list[Any]]) -> None:
    for row in parts[0] + parts[1]:
        _, *copied = slots(row)
        assert all(value in row["messages"][0]["content"] for value in copied)


def test_no_value_of_the_evaluation_rows_is_trained_on(parts: tuple[list[Any], list[Any]]) -> None:
    train, held_out = ([slots(row) for row in part] for part in parts)
    for column in (1, 2, 3):
        assert not {line[column] for line in train} & {line[column] for line in held_out}
    known = {word for line in train for word in line[3].split()}
    assert not known & {word for line in held_out for word in line[3].split()}
    nouns = {line[2].split()[1] for line in train}
    assert not nouns & {line[2].split()[1] for line in held_out}


def test_kinds_are_balanced(script: Script, parts: tuple[list[Any], list[Any]]) -> None:
    counts = Counter(slots(row)[0] for row in parts[0])
    assert set(counts) == set(script("demo_task").REQUESTS)
    assert min(counts.values()) > len(parts[0]) / len(counts) / 2


def test_the_shipped_files_are_what_the_script_writes(script: Script, tmp_path: Path) -> None:
    script("demo_task").write(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (SHIPPED / name).read_bytes() == (tmp_path / name).read_bytes()
