"""Where rows come from besides single files: directories, the hub, Python; columns under other names."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.config import Settings, build, from_dict, read_assignments, read_yaml, to_dict
from graft.data.config import DataConfig
from graft.data.sources import IN_MEMORY, find_files, read_rows
from graft.errors import ConfigError, DataError, GraftError, StorageError
from graft.training.config import RunConfig

A, B, C = ({"prompt": name, "completion": name.upper()} for name in "abc")


def values(source: Any, **options: Any) -> list[Any]:
    return [row.value for row in read_rows(source, **options)]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["eval", "valid", "validation", "val", "dev", "test"])
def test_a_directory_has_a_file_for_each_split(tmp_path: Path, name: str) -> None:
    written(tmp_path / "train.jsonl", A)
    written(tmp_path / f"{name}.ndjson", B)
    assert values(tmp_path) == [A]
    assert values(tmp_path, split="eval") == [B]


def test_validation_comes_before_test(tmp_path: Path) -> None:
    written(tmp_path / "test.jsonl", A)
    written(tmp_path / "validation.jsonl", B)
    assert values(tmp_path, split="eval") == [B]


@pytest.mark.parametrize("inner", ["", "data"])
def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path, inner: str) -> None:
    for number in (10, 2, 0, 1, *range(3, 10)):
        written(tmp_path / inner / f"train-{number:05}-of-00011.jsonl", {"text": str(number)})
    written(tmp_path / inner / "train-notes.md")
    assert values(tmp_path) == [{"text": str(number)} for number in range(11)]


def test_a_directory_without_the_split_names_what_it_has(tmp_path: Path) -> None:
    written(tmp_path / "mine.jsonl", A)
    with pytest.raises(DataError, match="no train file") as caught:
        find_files(tmp_path, "train")
    assert "mine.jsonl" in caught.value.fix


def test_several_texts_are_documents_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert values(tmp_path) == ["a", "b", "c"]


def test_saved_data_sets_lose_no_part_unseen(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    with pytest.raises(DataError, match="data-00000-of-00001.arrow is missing"):
        values(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [3]}')
    with pytest.raises(DataError, match="malformed"):
        values(tmp_path)


def generated() -> Iterator[dict[str, str]]:
    yield from (A, B)


@pytest.mark.parametrize("source", [[A, B], (A, B), generated])
def test_rows_from_python_are_any_iterable(source: Any) -> None:
    rows = list(read_rows(source() if callable(source) else source))
    assert [row.value for row in rows] == [A, B]
    assert [row.where for row in rows] == ["row 1", "row 2"]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ([1], "not a list"),
        (None, "not null"),
        ({1: "a"}, "not dict"),
        ({"text": "a\0"}, "'text' holds a NUL"),
        ({"messages": [{"content": "\ud800"}]}, "'messages' holds half"),
        ("a\0", "the text holds a NUL"),
    ],
)
def test_a_bad_row_from_python_is_named_or_left_out(bad: Any, word: str) -> None:
    with pytest.raises(DataError, match=word) as caught:
        values([A, bad, B])
    assert caught.value.where == "row 2"
    refused: list[str] = []
    assert values([A, bad, B], on_invalid=lambda error, raw: refused.append(raw)) == [A, B]
    assert len(refused) == 1


def test_rows_that_were_given_from_python_cannot_be_read_again() -> None:
    with pytest.raises(DataError, match="stand in no file"):
        values(IN_MEMORY)


FILES: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": lambda path: path.write_text(
        '{"q": "a", "r": "A", "n": "1"}\n{"q": "b", "r": "B", "n": "2"}\n'
    ),
    "rows.json": lambda path: path.write_text(
        '[{"q": "a", "r": "A", "n": "1"}, {"q": "b", "r": "B", "n": "2"}]'
    ),
    "rows.csv": lambda path: path.write_text("q,r,n\na,A,1\nb,B,2\n"),
    "rows.tsv": lambda path: path.write_text("q\tr\tn\na\tA\t1\nb\tB\t2\n"),
    "rows.parquet": lambda path: _parquet(path),
}


def _parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"q": ["a", "b"], "r": ["A", "B"], "n": ["1", "2"]}), path)


@pytest.mark.parametrize("name", [*FILES, "python"])
def test_columns_play_the_parts_that_they_are_given(tmp_path: Path, name: str) -> None:
    source: Any = [{"q": "a", "r": "A", "n": "1"}, {"q": "b", "r": "B", "n": "2"}]
    if name != "python":
        source = tmp_path / name
        FILES[name](source)
    columns = {"prompt": "q", "completion": "r"}
    assert values(source, columns=columns) == [{**A, "n": "1"}, {**B, "n": "2"}]
    with pytest.raises(
        DataError, match="no column 'rr', which data.columns gives for 'completion'"
    ) as caught:
        values(source, columns={"prompt": "q", "completion": "rr"})
    assert caught.value.fix == "did you mean 'r'?"


def test_parts_can_be_exchanged_and_a_displaced_column_is_left_out() -> None:
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert values([A], columns=swapped) == [{"prompt": "A", "completion": "a"}]
    assert values([{**A, "q": "?"}], columns={"prompt": "q"}) == [{"prompt": "?", "completion": "A"}]


def test_an_optional_part_may_be_missing_in_a_row_but_not_in_all() -> None:
    rows = [A, {**B, "sys": "Be brief."}]
    assert values(rows, columns={"system": "sys"}) == [A, {**B, "system": "Be brief."}]
    with pytest.raises(DataError, match="no column 'sis'"):
        values(rows, columns={"system": "sis"})


def test_plain_texts_have_no_columns() -> None:
    with pytest.raises(DataError, match="no columns"):
        values(["text"], columns={"text": "q"})


@pytest.mark.parametrize(
    ("columns", "word"),
    [({"promt": "q"}, "did you mean 'prompt'"), ({"prompt": "q", "completion": "q"}, "given two parts")],
)
def test_a_map_of_unknown_parts_is_refused(columns: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        DataConfig(columns=columns)


@pytest.mark.parametrize(
    "words",
    [
        ["data.columns.prompt=q", "data.columns.completion=r"],
        ["data.columns={prompt: q, completion: r}"],
        ["data.columns={prompt: x, completion: r}", "data.columns.prompt=q"],
    ],
)
def test_columns_are_set_on_the_command_line(words: list[str]) -> None:
    settings = read_assignments(["model.name=m", "data.train=t", "output=o", *words])
    config = build(RunConfig, settings)
    assert config.data.columns == {"prompt": "q", "completion": "r"}
    assert from_dict(RunConfig, to_dict(config), "run.json") == config
    json.dumps(to_dict(config))


def test_columns_of_a_file_are_overlaid_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  train: t\n  columns:\n    prompt: x\n    completion: r\n")
    settings = read_yaml(path)
    settings.update(read_assignments(["data.columns.prompt=q"]))
    assert build(RunConfig, settings).data.columns == {"prompt": "q", "completion": "r"}
    path.write_text("data:\n  train: t\n  columns: {}\n")
    assert build(RunConfig, read_yaml(path)).data.columns == {}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.columns.prompt=[1]", "texts by name"),
        ("data.columns=q", "texts by name"),
        ("data.columns.promt=q", "did you mean 'prompt'"),
        ("data.limit.x=1", "not a section"),
    ],
)
def test_a_wrong_map_is_refused_where_it_was_given(word: str, told: str) -> None:
    settings = Settings()
    settings.update(read_assignments([word]))
    with pytest.raises(ConfigError, match=told) as caught:
        build(RunConfig, settings)
    assert "--set" in str(caught.value)


class Hub(types.ModuleType):
    """Stands for `datasets`: one data set of two splits."""

    def __init__(
        self, splits: tuple[str, ...] = ("train", "validation"), error: Exception | None = None
    ) -> None:
        super().__init__("datasets")
        self.splits, self.error, self.asked = splits, error, []

    def get_dataset_split_names(self, name: str, config: str | None, revision: str | None) -> list[str]:
        if self.error is not None:
            raise self.error
        return list(self.splits)

    def load_dataset(self, name: str, config: str | None, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((name, config, options))
        return iter([{"text": f"{options['split']} {number}", "n": None} for number in range(3)])


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    rows = list(read_rows("hub:owner/name:plain@v1", split="eval"))
    assert [row.value for row in rows] == [{"text": f"validation {n}", "n": None} for n in range(3)]
    assert rows[2].where == "hub:owner/name:plain@v1:3"
    options = {"split": "validation", "revision": "v1", "streaming": True}
    assert hub.asked == [("owner/name", "plain", options)]
    assert values("hub:owner/name", columns={"prompt": "text"})[0] == {"prompt": "train 0", "n": None}


@pytest.mark.parametrize(
    ("path", "hub", "kind", "word"),
    [
        ("hub:owner/name", Hub(("test_a",)), DataError, "no split 'train'; it has 'test_a'"),
        ("hub:", Hub(), DataError, "not the name of a data set"),
        ("hub:a/b/c", Hub(), DataError, "not the name of a data set"),
        ("hub:owner/name", Hub(error=ConnectionError("offline")), StorageError, "cannot be reached.*offline"),
        ("hub:owner/name", Hub(error=FileNotFoundError("gone")), StorageError, "no such data set: gone"),
        ("hub:owner/name:x", Hub(error=ValueError("no config x\nmore")), DataError, "^no config x\n"),
        ("hub:owner/name", None, DataError, "datasets, which is not installed"),
    ],
)
def test_what_the_hub_refuses_is_told(
    path: str, hub: Any, kind: type[GraftError], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(kind, match=word) as caught:
        values(path)
    assert caught.value.where == path
    assert hub is not None or "graft[datasets]" in caught.value.fix


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs pyarrow") as caught:
        values(tmp_path / name)
    assert "graft[arrow]" in caught.value.fix


@pytest.mark.parametrize("source", [{"prompt": ["a"], "completion": ["b"]}, {"train": [{"text": "a"}]}])
def test_names_of_columns_are_not_taken_for_texts(source: Any) -> None:
    with pytest.raises(DataError, match="dict gives names, not rows"):
        list(read_rows(source))


def test_a_table_is_not_taken_for_texts() -> None:
    """As a DataFrame of pandas, which goes through its column names."""

    class Table(list[str]):
        def iterrows(self) -> None: ...

    with pytest.raises(DataError, match="Table gives names, not rows") as caught:
        list(read_rows(Table(["prompt", "completion"])))  # type: ignore[arg-type]
    assert "to_dict" in caught.value.fix
