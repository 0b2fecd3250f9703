"""Rows of well-formed files are those that json, csv, pandas, pyarrow and datasets read."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from graft.data.sources import read_rows
from graft.errors import DataError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")


def odd_rows(count: int = 3000) -> list[dict[str, Any]]:
    draw = random.Random(5)
    letters = "ab \"',\t\n\\{}[]:é€\u2028\U0001f600"
    return [
        {
            "prompt": "".join(draw.choices(letters, k=draw.randint(0, 60))),
            "completion": "".join(draw.choices(letters, k=draw.randint(1, 90))),
            "number": draw.choice([None, draw.randint(-9, 9)]),
            "messages": [{"role": "user", "content": str(turn)} for turn in range(draw.randint(0, 3))],
            "score": draw.random(),
        }
        for _ in range(count)
    ]


ROWS = odd_rows()
TEXTS = [{name: row[name] for name in ("prompt", "completion")} for row in ROWS]


def values(source: Any, **options: Any) -> list[Any]:
    return [row.value for row in read_rows(source, **options)]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_json_lines_are_what_json_reads(tmp_path: Path, ascii_only: bool, packed: bool) -> None:
    data = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in ROWS).encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert values(path) == [json.loads(line) for line in data.splitlines()] == ROWS


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [7, 1000, 1 << 20])
def test_a_json_list_is_what_json_reads_wherever_it_is_cut(
    tmp_path: Path, indent: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.data.readers.json_window._PIECE", piece)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[:300], indent=indent, ensure_ascii=False), encoding="utf-8")
    assert values(path) == json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"n": [1], "rows": ROWS[:300]}, indent=indent), encoding="utf-8")
    rows = list(read_rows(path))
    assert [row.value for row in rows] == ROWS[:300]
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(lines[int(row.where.rpartition(":")[2]) - 1].lstrip().startswith("{") for row in rows)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_is_what_csv_and_pandas_read(tmp_path: Path, newline: str, suffix: str) -> None:
    pandas = pytest.importorskip("pandas")
    path, delimiter = tmp_path / f"rows.{suffix}", "," if suffix == "csv" else "\t"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TEXTS[0], delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows(TEXTS)
    rows = list(read_rows(path))
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        begins, peers = [], []
        line = 1
        for cells in reader:
            begins.append(line)
            peers.append(cells)
            line = reader.line_num + 1
    assert [list(row.value.values()) for row in rows] == peers[1:]  # type: ignore[union-attr]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in begins[1:]]
    frame = pandas.read_csv(path, sep=delimiter, keep_default_na=False, dtype=str)
    assert [row.value for row in rows] == frame.to_dict("records")


@pytest.mark.parametrize("group", [100, 5000])
def test_parquet_is_what_pyarrow_and_datasets_read(tmp_path: Path, group: int) -> None:
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=group)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == parquet.read_table(path).to_pylist() == ROWS
    assert [row.where for row in rows] == [f"{path}:{number}" for number in range(1, len(ROWS) + 1)]
    peer = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert [row.value for row in rows] == list(peer)


def test_a_saved_data_set_is_what_datasets_loads(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert values(tmp_path / "one") == list(datasets.load_from_disk(str(tmp_path / "one"))) == ROWS
    both = datasets.DatasetDict({"train": made, "test": made.select(range(5))})
    both.save_to_disk(str(tmp_path / "both"))
    assert values(tmp_path / "both") == ROWS
    assert values(tmp_path / "both", split="eval") == ROWS[:5]


def test_dates_and_decimals_become_texts(tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow.parquet as parquet

    day = datetime.datetime(2026, 11, 30, 12, 30)
    table = pyarrow.table(
        {"at": [day], "day": [day.date()], "price": [decimal.Decimal("1.50")], "many": [[day.date()]]}
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == [
        {"at": day.isoformat(), "day": "2026-11-30", "price": "1.50", "many": ["2026-11-30"]}
    ]


def test_the_real_datasets_package_streams_a_local_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in TEXTS[:50])
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert values("hub:owner/name") == TEXTS[:50]


@pytest.mark.parametrize("piece", [5, 64, 1 << 20])
@pytest.mark.parametrize("newline", ["", "\n"])
@pytest.mark.parametrize("bad", ['{"a": tru}', '{"a" 1}', '{"a": "\t"}', '{"a": 1,}', "{'a': 1}", '{"a": "b'])
def test_a_broken_list_is_told_at_the_place_that_json_tells(
    tmp_path: Path, piece: int, newline: str, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.data.readers.json_window._PIECE", piece)
    path = tmp_path / "rows.json"
    text = "[" + f",{newline}".join([*(json.dumps(row, ensure_ascii=False) for row in TEXTS[:40]), bad]) + "]"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(json.JSONDecodeError) as peer:
        json.loads(text)
    with pytest.raises(DataError) as caught:
        values(path)
    assert caught.value.where == f"{path}:{peer.value.lineno}:{peer.value.colno}"
    assert peer.value.msg in caught.value.what
