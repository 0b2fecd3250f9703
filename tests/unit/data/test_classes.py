"""Texts with a class: labels, what a sample is, rows that are refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.data.classes import ClassReader
from graft.data.config import DataConfig
from graft.data.loader import Loader
from graft.data.masking import IGNORED
from graft.data.prepare import Dataset
from graft.data.splits import prepare_splits
from graft.errors import DataError


@pytest.fixture
def tokenizer(tiny_dir: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_dir("llama"))


@pytest.fixture
def read(tmp_path: Path, tokenizer: Any) -> Callable[..., Dataset]:
    def make(*rows: Any, labels: tuple[str, ...] = (), **config: Any) -> Dataset:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ClassReader(labels)(str(path), tokenizer, DataConfig(train=str(path), **config))

    return make


def row(text: Any, label: Any) -> dict[str, Any]:
    return {"text": text, "label": label}


def test_the_last_token_carries_the_class(read: Any, tokenizer: Any) -> None:
    data = read(row("abc", "dog"), row("d", "cat"))
    assert data.labels == ("cat", "dog")
    assert [sample.labels for sample in data.samples] == [[IGNORED, IGNORED, 1], [0]]
    assert data.samples[0].input_ids == tokenizer("abc")["input_ids"], "as other tools tokenize it"


def test_a_text_of_one_token_keeps_its_class(read: Any) -> None:
    data = read(row("a", "x"), row("b", "y"), row("cd", "x"))
    for packing in (False, True):
        loader = Loader(data.samples, 3, 8, packing, shuffle=False, kind="class")
        labels = [label for batch in loader.epoch(0) for label in batch.labels[batch.labels >= 0].tolist()]
        assert sorted(labels) == [0, 0, 1]
        assert sum(batch.num_labelled_tokens for batch in loader.epoch(0)) == 3


def test_whole_numbers_are_ordered_by_size(read: Any) -> None:
    data = read(*[row("a", number) for number in (10, 2, -1)])
    assert data.labels == ("-1", "2", "10")


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"text": "a"}, "no label"),
        ({"text": "a", "lable": "x"}, "rename 'lable' to 'label'"),
        ({"label": "x"}, "no column 'text'"),
        (row("a", None), "a label must be"),
        (row("a", True), "a label must be"),
        (row("a", 1.5), "a label must be"),
        (row("a", " "), "a label must be"),
        (row("a", ["x"]), "a label must be"),
        (row(3, "x"), "must hold text"),
        (row("a\U000f0001", "x"), "private character"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(bad: Any, word: str, read: Any) -> None:
    with pytest.raises(DataError) as caught:
        read(row("a", "x"), bad)
    assert word in str(caught.value)
    assert "texts.jsonl:2" in str(caught.value)
    left = read(row("a", "x"), bad, row("b", "y"), skip_invalid=True)
    assert len(left.samples) == 2
    assert left.report.rejected[0][0].endswith("texts.jsonl:2")


def test_a_label_that_training_does_not_have(read: Any) -> None:
    with pytest.raises(DataError, match="'sport' is not among the 2") as caught:
        read(row("a", "news"), row("b", "sport"), labels=("news", "sports"))
    assert "texts.jsonl:2" in str(caught.value)
    assert "'sports'" in caught.value.fix


def test_what_is_no_set_of_classes(read: Any) -> None:
    with pytest.raises(DataError, match="nothing to tell apart"):
        read(row("a", "x"), row("b", "x"))
    with pytest.raises(DataError, match="1,001 different labels"):
        read(*[row("a", number) for number in range(1001)])


def test_what_is_too_long_or_empty(read: Any) -> None:
    rows = (row("aaaaaa", "x"), row("bb", "y"), row("  ", "x"))
    cut = read(*rows, max_length=4)
    assert [len(sample.input_ids) for sample in cut.samples] == [4, 2]
    assert cut.samples[0].labels == [IGNORED] * 3 + [0]
    assert cut.report.num_truncated == 1
    assert "empty" in cut.report.rejected[0][1]
    assert len(read(*rows, max_length=4, on_overlong="drop").samples) == 1
    with pytest.raises(DataError, match="6 tokens, more than max_length 4"):
        read(*rows, max_length=4, on_overlong="error")


def test_conflicts_are_counted(read: Any) -> None:
    notes = read(row("a", "x"), row("a", "y"), row("b", "y")).report.notes
    assert any("1 texts stand there under two labels" in note for note in notes)
    assert any("x 1, y 2" in note for note in notes)


def test_a_part_held_out_has_the_labels_of_the_whole(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row(f"t{n}", f"l{n % 7}")) + "\n" for n in range(20)))
    config = DataConfig(train=str(path), eval_fraction=0.2)
    train, held_out = prepare_splits(tokenizer, config, read=ClassReader(), kind="class")
    assert held_out is not None
    assert train.labels == held_out.labels == tuple(f"l{n}" for n in range(7))
