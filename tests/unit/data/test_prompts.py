"""Prompt templates: columns in braces and nothing else, on rows of columns with text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.data.config import DataConfig
from graft.data.examples import Pair
from graft.data.formats import detect, to_example
from graft.data.prepare import prepare
from graft.data.prompts import PromptTemplate
from graft.data.sources import Row
from graft.errors import ConfigError, DataError

QA = "Question: {question}\nAnswer:"


def row(value: Any) -> Row:
    return Row(value, "a.jsonl:1")


def test_columns_are_put_where_their_names_stand() -> None:
    template = PromptTemplate.parse("{{x}} {b}-{a} {b}")
    assert template.columns == ("b", "a")
    assert template.fill(row({"a": "1 {b}", "b": "%s"})) == "{x} %s-1 {b} %s"


@pytest.mark.parametrize(
    "text",
    [
        "{a.b}",
        "{a[0]}",
        "{a!r}",
        "{a:>10}",
        "{a:{b}}",
        "{}",
        "{0.__class__}",
        "open {",
        "close }",
        "no column",
        "{{a}}",
    ],
)
def test_anything_but_the_name_of_a_column_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="data.prompt_template") as caught:
        DataConfig(prompt_template=text)
    assert caught.value.where == "data.prompt_template"
    assert caught.value.fix


def test_a_missing_column_is_named_with_the_closest() -> None:
    with pytest.raises(DataError, match="no column 'question'") as caught:
        PromptTemplate.parse(QA).fill(row({"qestion": "x", "answer": "y"}))
    assert caught.value.where == "a.jsonl:1"
    assert "'qestion'" in caught.value.fix
    with pytest.raises(DataError, match="must hold text, not int"):
        PromptTemplate.parse(QA).fill(row({"question": 3, "answer": "y"}))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"question": "Why?", "answer": " So."}, " So."),
        ({"question": "Why?", "output": "So."}, "So."),
        ({"instruction": "Do", "input": "it", "question": "Why?", "output": "Done"}, "Done"),
    ],
)
def test_rows_of_columns_become_pairs(value: Any, expected: str) -> None:
    detected = detect([row(value)], prompt_template=QA)
    assert to_example(row(value), detected, chat=True) == Pair(
        "Question: Why?\nAnswer:", expected, "a.jsonl:1"
    )
    assert detected.format == "prompt_completion"
    assert detected.unused(row(value)) == [name for name in value if name in ("instruction", "input")]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"question": "a", "messages": []}, "conversation or a preference"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "conversation or a preference"),
        ({"question": "a", "anser": "b"}, "no column with the answer"),
        ("plain", "plain text"),
    ],
)
def test_other_rows_are_refused(value: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        detect([row(value)], prompt_template=QA)


@pytest.mark.parametrize(
    "more", [{"format": "messages"}, {"format": "text"}, {"format": "mixed"}, {"chat_template": "c"}]
)
def test_a_template_is_refused_where_another_thing_writes_the_prompt(more: Any) -> None:
    with pytest.raises(ConfigError, match="prompt_template"):
        DataConfig(prompt_template=QA, **more)


def test_a_prepared_row_is_what_the_template_says(tmp_path: Path, tinystories: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    plain, columns = tmp_path / "plain.jsonl", tmp_path / "columns.jsonl"
    plain.write_text(json.dumps({"prompt": "Question: Who?\nAnswer:", "completion": " Tom"}))
    columns.write_text(json.dumps({"question": "Who?", "answer": " Tom"}))
    one = prepare(str(plain), tokenizer, DataConfig())
    other = prepare(str(columns), tokenizer, DataConfig(prompt_template=QA))
    assert one.samples[0].input_ids == other.samples[0].input_ids
    assert one.samples[0].labels == other.samples[0].labels
