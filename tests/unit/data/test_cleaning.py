"""Cleaning in the pipeline: what is left out, what is only told, on every kind of data."""

from __future__ import annotations

import re
from typing import Any

import pytest

from graft.data.classes import ClassReader
from graft.data.config import DataConfig
from graft.data.examples import Pair
from graft.data.filters import cleaning
from graft.data.filters.cleaning import Cleaning
from graft.data.filters.content import content_of
from graft.data.preferences import prepare_pairs
from graft.data.prepare import Dataset
from graft.data.report import Report
from graft.data.splits import prepare_splits
from graft.errors import ConfigError, DataError

WORDS = [f"w{i}" for i in range(60)]
LONG = " ".join(WORDS)
NEARLY = " ".join([*WORDS[:30], "other", *WORDS[31:]])
ROWS = [
    {"prompt": "one", "completion": " eins"},
    {"prompt": "two", "completion": " zwei"},
    {"prompt": "one", "completion": " eins"},
    {"prompt": "one", "completion": " uno"},
    {"prompt": "long", "completion": LONG},
    {"prompt": "long", "completion": NEARLY},
    {"prompt": "todo", "completion": "N/A"},
    {"prompt": "drei", "completion": " три"},
]


def test_the_rows_that_were_looked_at_are_told_exactly() -> None:
    """All answers are odd: the first that is not told is the one behind so many."""
    rows = [
        content_of(Pair(str(number), "N/A", f"rows:{number}")) for number in range(cleaning.LOOKED_AT + 900)
    ]
    report = Report("rows", "", "")
    assert list(Cleaning(DataConfig()).keep(rows, lambda row: row, report)) == rows
    told = " ".join(report.notes)
    found = re.search(r"([\d,]+) rows: a placeholder", told)
    looked_at = re.search(r"only the first ([\d,]+) rows were looked at", told)
    assert found
    assert looked_at
    assert found[1] == looked_at[1]


def lines(dataset: Dataset) -> list[int]:
    return [int(sample.where.rpartition(":")[2]) for sample in dataset.samples]


def notes(dataset: Dataset) -> str:
    return "\n".join(dataset.report.notes)


def test_nothing_is_left_out_unasked_and_all_is_told(write: Any, tokenizer: Any) -> None:
    path = write(ROWS)
    train, _ = prepare_splits(tokenizer, DataConfig(train=path))
    assert lines(train) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert train.report.removed == {}
    assert train.report.places == {
        "duplicate": [f"{path}:3 = {path}:1"],
        "contradiction": [f"{path}:4 = {path}:1", f"{path}:6 = {path}:5"],
        "placeholder": [f"{path}:7"],
    }
    assert f"1 row says what an earlier one says: not left out (the first: {path}:3 = {path}:1)" in notes(
        train
    )
    assert "2 rows have the prompt of an earlier one and another answer" in notes(train)
    assert "1 row in Cyrillic, most others in Latin" not in notes(train)  # a tenth and more is no slip


@pytest.mark.parametrize(
    ("fields", "left", "removed"),
    [
        ({"deduplicate": "exact"}, [1, 2, 4, 5, 6, 7, 8], {"duplicate": 1}),
        ({"deduplicate": "near"}, [1, 2, 4, 5, 7, 8], {"duplicate": 1, "near_duplicate": 1}),
        ({"deduplicate": "near", "near_threshold": 0.95}, [1, 2, 4, 5, 6, 7, 8], {"duplicate": 1}),
        ({"drop": ("placeholder", "repetitive")}, [1, 2, 3, 4, 5, 6, 8], {"placeholder": 1}),
        ({"scripts": ("Cyrillic", "Greek")}, [], None),
        ({"scripts": ("Latin",), "deduplicate": "exact"}, [1, 2, 4, 5, 6, 7, 8], {"duplicate": 1}),
        ({"scripts": ("Han",)}, [], None),
    ],
)
def test_what_is_named_is_left_out(
    write: Any, tokenizer: Any, fields: Any, left: list[int], removed: Any
) -> None:
    path = write(ROWS)
    config = DataConfig(train=path, **fields)
    if removed is None:
        with pytest.raises(DataError, match="no row is left after cleaning") as caught:
            prepare_splits(tokenizer, config)
        assert caught.value.where == path
        return
    train, _ = prepare_splits(tokenizer, config)
    assert lines(train) == left
    assert train.report.removed == removed
    assert train.report.num_used == len(left)


def test_training_rows_of_the_evaluation_data_are_told_dropped_or_refused(write: Any, tokenizer: Any) -> None:
    train_path = write(ROWS)
    eval_path = write([ROWS[1], {"prompt": "long", "completion": LONG}, ROWS[1]], "eval.jsonl")
    fields = {"train": train_path, "eval": eval_path}
    train, held_out = prepare_splits(tokenizer, DataConfig(**fields))
    assert held_out is not None
    assert (len(train.samples), len(held_out.samples), held_out.report.num_overlap) == (8, 3, 3)
    assert train.report.places["overlap"] == [
        f"{train_path}:2 = {eval_path}:1",
        f"{train_path}:5 = {eval_path}:2",
    ]
    train, held_out = prepare_splits(tokenizer, DataConfig(**fields, overlap="drop"))
    assert held_out is not None
    assert (lines(train), len(held_out.samples)) == ([1, 3, 4, 6, 7, 8], 3)
    assert held_out.report.num_overlap == 3
    assert train.report.removed == {"overlap": 2}
    for by in ("near", "ngrams"):
        train, _ = prepare_splits(tokenizer, DataConfig(**fields, overlap="drop", overlap_by=by))
        assert lines(train) == [1, 3, 4, 7, 8]
    with pytest.raises(DataError, match="also in the evaluation data") as caught:
        prepare_splits(tokenizer, DataConfig(**fields, overlap="error"))
    assert caught.value.where == f"{train_path}:2"
    assert f"{eval_path}:1" in caught.value.what


def test_preferences_are_cleaned_in_pairs(write: Any, tokenizer: Any) -> None:
    rows = [
        {"prompt": "how?", "chosen": " well", "rejected": " badly"},
        {"prompt": "how?", "chosen": " badly", "rejected": " well"},
        {"prompt": "how?", "chosen": " well", "rejected": " badly"},
    ]
    config = DataConfig(
        train=write(rows), eval=write(rows[1:2], "eval.jsonl"), deduplicate="exact", overlap="drop"
    )
    train, held_out = prepare_splits(tokenizer, config, read=prepare_pairs, kind="pair")
    assert held_out is not None
    assert (lines(train), lines(held_out)) == ([1, 1], [1, 1])
    assert train.report.removed == {"overlap": 1, "duplicate": 1}


def test_texts_with_a_class_are_cleaned_with_their_label(write: Any, tokenizer: Any) -> None:
    rows = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}, {"text": "good", "label": "a"}]
    rows += [{"text": "good", "label": "b"}]
    config = DataConfig(train=write(rows), eval=write(rows[:1], "eval.jsonl"), deduplicate="near")
    train, held_out = prepare_splits(tokenizer, config, read=ClassReader(), kind="class")
    assert held_out is not None
    assert (lines(train), held_out.report.num_overlap) == ([1, 2, 4], 1)
    assert train.labels == ("a", "b")
    for fields in ({"overlap": "drop"}, {"overlap_by": "near"}):
        asked = DataConfig(train=config.train, eval=config.eval, **fields)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="does not act on texts with a class"):
            prepare_splits(tokenizer, asked, read=ClassReader(), kind="class")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"near_threshold": 0.7}, "near_threshold"),
        ({"near_threshold": 0.3, "deduplicate": "near"}, "near_threshold"),
        ({"overlap": "drop"}, "overlap"),
        ({"overlap_by": "ngrams", "eval_fraction": 0.1}, "overlap_by"),
        ({"scripts": ("Latn",)}, "scripts"),
        ({"mix_by": "tokens"}, "mix_by"),
        ({"mix_temperature": 2.0}, "mix_temperature"),
        ({"mix": {"a": 1.0}}, "mix"),
        ({"mix": {"a": 1.0, "b": 0.0}}, "mix"),
        ({"mix": {"a": 1.0, "b": None}}, "mix"),
        ({"mix": {"a": 1.0, "b": 1.0}, "train": "c"}, "mix"),
        ({"mix": {"a": 1.0, "b": 1.0}, "eval_fraction": 0.1}, "mix"),
        ({"mix": {"a": 1.0, "b": float("nan")}}, "mix"),
        ({"mix": {"a": 1.0, "b": 1.0}, "mix_temperature": 0.0}, "mix_temperature"),
    ],
)
def test_a_field_that_cannot_act_is_refused(fields: Any, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**fields)
    assert caught.value.where == f"data.{where}"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"overlap": "drop"}, "loosen data.overlap, or"),
        ({"scripts": ("Han",)}, "loosen data.scripts, or"),
        (
            {"scripts": ("Han", "Latin"), "drop": ("placeholder",), "overlap": "drop"},
            "data.drop or data.overlap,",
        ),
    ],
)
def test_what_left_out_the_last_row_is_named(
    write: Any, tokenizer: Any, fields: dict[str, Any], named: str
) -> None:
    evaluation = write([{"prompt": "two", "completion": " zwei"}], "eval.jsonl")
    path = write([{"prompt": "two", "completion": " zwei"}, *([ROWS[6]] if "drop" in fields else [])])
    with pytest.raises(DataError, match="no row is left") as caught:
        prepare_splits(tokenizer, DataConfig(train=path, eval=evaluation, **fields))
    assert named in caught.value.fix


@pytest.mark.parametrize("kind", ["class", "pair"])
def test_a_directory_for_tokens_that_are_not_kept_is_refused(write: Any, tokenizer: Any, kind: str) -> None:
    read: Any = ClassReader() if kind == "class" else prepare_pairs
    with pytest.raises(ConfigError, match="not kept") as caught:
        read(write(ROWS), tokenizer, DataConfig(cache="somewhere"))
    assert caught.value.where == "data.cache"
