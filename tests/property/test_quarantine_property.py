"""Whatever stands in a file: every row is kept or left out, once, and what is left out can be read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.config import DataConfig
from graft.data.prepare import prepare
from graft.data.quarantine import Quarantine
from graft.data.sources import read_rows
from graft.errors import DataError

GOOD = st.builds(
    lambda prompt, completion: json.dumps({"prompt": prompt, "completion": completion + "!"}).encode(),
    st.text('ab é"\\', max_size=8),
    st.text("ab é", max_size=8),
)
BAD = st.sampled_from(
    [
        b'{"prompt": "a"}',
        b'{"prompt": "a", "completion": 4}',
        b'{"prompt": "a", "completion": ""}',
        b'{"prompt": "a", "completion": "b"',
        b'{"prompt": "\\ud800", "completion": "b"}',
        b'{"prompt": "\xff", "completion": "b"}',
        b'{"prompt": NaN, "completion": "b"}',
        b'{"prompt": "a", "completion": "\xf3\xb0\x80\x81"}',
        b"[1]",
        b"x\0y",
        b"[" * 5000,
    ]
)
BLANK = st.sampled_from([b"", b" ", b"\t \r"])
LINES = st.lists(
    st.one_of(
        st.tuples(st.just("good"), GOOD), st.tuples(st.just("bad"), BAD), st.tuples(st.just("blank"), BLANK)
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_dir("llama"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, packed=st.booleans())
def test_rows_read_are_rows_kept_and_rows_left_out(
    lines: list[tuple[str, bytes]], packed: bool, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line for _, line in lines))
    good = [number for number, (kind, _) in enumerate(lines, 1) if kind == "good"]
    bad = [number for number, (kind, _) in enumerate(lines, 1) if kind == "bad"]
    with Quarantine() as quarantine:
        config = DataConfig(train=str(path), skip_invalid=True, format="prompt_completion", packing=packed)
        if not good:
            with pytest.raises(DataError, match=r"none of \d+ rows|there are no rows"):
                prepare(str(path), tokenizer, config, quarantine=quarantine)
            assert quarantine.count == len(bad)
            return
        made = prepare(str(path), tokenizer, config, quarantine=quarantine)
        quarantine.save(tmp_path / "quarantine.jsonl")
    assert [sample.where for sample in made.samples] == [f"{path}:{number}" for number in good]
    report = made.report
    assert report.num_rows == len(good) + len(bad) == report.num_used + quarantine.count
    assert len(report.rejected) == quarantine.count == len(bad)
    if not bad:
        assert not (tmp_path / "quarantine.jsonl").exists()
        return
    kept = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [list(row) for row in kept] == [["where", "reason", "fix", "row"]] * len(bad)
    assert sorted(int(row["where"].removeprefix(f"{path}:").split(":")[0]) for row in kept) == bad


CELLS = st.text('ab",\n\té\0', max_size=6)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.lists(CELLS, min_size=1, max_size=3).map(",".join), max_size=8).map("\n".join))
def test_a_table_of_anything_ends_and_tells_each_row_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n" + text, encoding="utf-8")
    refused: list[DataError] = []
    rows = list(read_rows(path, on_invalid=lambda error, raw: refused.append(error)))
    begins = [int(row.where.removeprefix(f"{path}:")) for row in rows]
    assert begins == sorted(set(begins))
    assert all(isinstance(row.value, dict) and list(row.value) == ["a", "b"] for row in rows)
    assert len(rows) + len(refused) <= text.count("\n") + 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.lists(
            st.sampled_from([b"[", b"]", b"{", b"}", b'"a"', b":", b",", b"1", b"NaN", b"\n", b" ", b"\xff"]),
            max_size=25,
        ).map(b"".join),
    ),
    suffix=st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "jsonl.gz", "parquet", "arrow"]),
)
def test_any_bytes_give_rows_or_an_error_of_ours(data: bytes, suffix: str, tmp_path: Path) -> None:
    if suffix in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(data)
    refused: list[DataError] = []
    try:
        rows = list(read_rows(path, on_invalid=lambda error, raw: refused.append(error)))
    except DataError as error:
        refused.append(error)
        rows = []
    assert all(row.where.startswith(f"{path}:") for row in rows)
    assert all(error.where.startswith(str(path)) and error.fix for error in refused)
