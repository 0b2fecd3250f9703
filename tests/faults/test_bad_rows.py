"""Damaged data files: the rows of the clean twin, or an error that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.data.config import DataConfig
from graft.data.prepare import Dataset, prepare
from graft.data.sources import MAX_ROW_BYTES, read_rows
from graft.errors import DataError, GraftError, StorageError

ROWS: list[dict[str, Any]] = [
    {"prompt": "One cat", "completion": " sat"},
    {"prompt": "Two cafés – “quoted”", "completion": " ran\noff"},
    {"prompt": "Third\u2028line", "completion": " \U0001f600"},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer(tinystories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tinystories)


def values(path: Path) -> list[Any]:
    return [row.value for row in read_rows(path)]


def prepared(path: Path, tokenizer: Any, **config: Any) -> Dataset:
    return prepare(str(path), tokenizer, DataConfig(train=str(path), **config))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("clean", "\n".join(LINES) + "\n"),
        ("no final newline", "\n".join(LINES)),
        ("crlf", "\r\n".join(LINES) + "\r\n"),
        ("byte order mark", "\ufeff" + "\n".join(LINES)),
        ("empty lines", "\n\n" + "\n \n".join(LINES) + "\n\n"),
        ("escapes", "\n".join(json.dumps(row) for row in ROWS)),
    ],
)
def test_json_lines_that_look_otherwise_are_the_same_rows(tmp_path: Path, name: str, data: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data.encode())
    assert values(path) == ROWS


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(ROWS),
        "\ufeff" + json.dumps(ROWS, indent=1, ensure_ascii=False).replace("\n", "\r\n"),
        json.dumps({"version": 1, "rows": ROWS}),
        "\n".join(LINES),
    ],
)
def test_a_json_file_holds_the_same_rows(tmp_path: Path, data: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data.encode())
    assert values(path) == ROWS


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_holds_the_same_rows(tmp_path: Path, newline: str, mark: str) -> None:
    path = tmp_path / "rows.csv"
    lines = [
        "prompt,completion",
        'One cat," sat"',
        '"Two cafés – “quoted”"," ran',
        'off"',
        "Third\u2028line, \U0001f600",
    ]
    path.write_bytes((mark + newline.join(lines)).encode())
    assert values(path) == ROWS
    assert [row.where.rsplit(":", 1)[1] for row in read_rows(path)] == ["2", "3", "5"]


@pytest.mark.parametrize("data", ["a\nb\n", "a\r\nb\r\n", "\ufeffa\nb\n"])
def test_a_text_is_the_same_document(tmp_path: Path, data: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data.encode())
    assert values(path) == ["a\nb\n"]


@pytest.mark.parametrize(
    ("second", "place", "word"),
    [
        (b'{"prompt": "a" "completion": "b"}', ":2:16", "not JSON"),
        (b'{"prompt": "a", "completion": "b"', ":2:34", "not JSON"),
        (b'{"prompt": "a\x00", "completion": "b"}', ":2:14", "not JSON"),
        (b'{"prompt": "a\\u0000", "completion": "b"}', ":2:14", "NUL"),
        (b'{"prompt": "a\\ud83d", "completion": "b"}', ":2:14", "surrogate"),
        (b'{"prompt": "\xff", "completion": "b"}', ":2:13", "0xff is not UTF-8"),
        ('{"prompt": "é'.encode() + b'\xff", "completion": "b"}', ":2:14", "not UTF-8"),
        (b'["a", "b"]', ":2:1", "not a list"),
        (b'{"prompt": NaN, "completion": "b"}', ":2:1", "NaN"),
        (b"[" * 200_000, ":2:1", "deep"),
        (b'{"prompt": "a"}', ":2", "no column 'completion'"),
        (b'{"prompt": "a", "completion": 4}', ":2", "must hold text, not int"),
        (b'{"prompt": "a", "completion": null}', ":2", "must hold text, not NoneType"),
    ],
)
def test_a_bad_line_is_named_or_left_out(
    tmp_path: Path, tokenizer: Any, second: bytes, place: str, word: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES[0].encode() + b"\n" + second + b"\n" + LINES[1].encode())
    with pytest.raises(DataError, match=word) as caught:
        prepared(path, tokenizer)
    assert caught.value.where == f"{path}{place}"
    kept = prepared(path, tokenizer, skip_invalid=True)
    assert [sample.where for sample in kept.samples] == [f"{path}:1", f"{path}:3"]
    assert (kept.report.num_rows, kept.report.num_used, len(kept.report.rejected)) == (3, 2, 1)
    assert kept.report.rejected[0][0] == f"{path}{place}"
    assert any("1 row left out" in note for note in kept.report.notes)


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "asistant", "content": "x"}, "'asistant' is not known"),
        ({"role": 3, "content": "x"}, "not known"),
        ({"content": "x"}, "not known"),
        ({"role": "user", "content": 5}, "content must be text"),
        ({"role": "user"}, "content must be text"),
        ({"role": "user", "content": [{"type": "audio", "url": "x"}]}, "something else than text"),
        ("hello", "must be an object"),
    ],
)
def test_a_bad_message_is_named(tmp_path: Path, tokenizer: Any, message: Any, word: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, message]}))
    with pytest.raises(DataError, match=word) as caught:
        prepared(path, tokenizer)
    assert caught.value.where == f"{path}:1, message 2"


@pytest.mark.parametrize(
    ("name", "messages", "word"),
    [
        ("chatml", ["user", "user", "assistant"], "must alternate"),
        ("gemma-it", ["user", "assistant", "assistant"], "must alternate"),
        ("llama-2-chat", ["assistant", "user"], "must alternate"),
        ("zephyr", ["assistant"], "must alternate"),
    ],
)
def test_what_a_template_refuses_is_said(
    shared: Path, tmp_path: Path, tokenizer: Any, name: str, messages: list[str], word: str
) -> None:
    path = tmp_path / "rows.jsonl"
    good = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    bad = [{"role": role, "content": "x"} for role in messages]
    path.write_text("\n".join(json.dumps({"messages": rows}) for rows in (good, bad)))
    template = str(shared / "tokenizers" / "chat_templates" / f"{name}.jinja")
    with pytest.raises(DataError, match=word) as caught:
        prepared(path, tokenizer, chat_template=template)
    assert caught.value.where.startswith(f"{path}:2")
    kept = prepared(path, tokenizer, chat_template=template, skip_invalid=True)
    assert kept.report.num_used == 1


def test_a_system_message_that_the_template_refuses_is_said(tmp_path: Path, tokenizer: Any) -> None:
    template = tmp_path / "no_system.jinja"
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    )
    path = tmp_path / "rows.jsonl"
    chat = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    path.write_text(json.dumps({"messages": chat}))
    with pytest.raises(DataError, match="System role not supported"):
        prepared(path, tokenizer, chat_template=str(template))


def test_messages_without_a_template_are_refused_with_the_fix(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    )
    with pytest.raises(DataError, match="no chat template") as caught:
        prepared(path, tokenizer)
    assert "data.chat_template" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl", b"\n \n\r\n", "no rows"),
        ("empty.json", b"[]", "no rows"),
        ("blank.json", b" ", "no rows"),
        ("empty.csv", b"", "no rows"),
        ("header.csv", b"prompt,completion\n", "no rows"),
        ("blank.txt", b" \n ", "no rows"),
        (
            "nothing.jsonl",
            b'{"prompt": "a", "completion": " "}\n{"prompt": "b", "completion": ""}',
            "nothing to learn",
        ),
        ("wide.jsonl", '{"text": "x"}'.encode("utf-16"), "UTF-16"),
        ("open.json", b'[{"text": "a"}', "not closed"),
        ("commas.json", b'[{"text": "a"} {"text": "b"}]', "comma"),
        ("number.json", b"5", "list of rows"),
        ("two.json", b'{"a": [{"text": "x"}], "b": [{"text": "x"}]}', "several: a, b"),
        ("splits.json", b'{\n "train": [["a", "b"]],\n "test": [["c", "d"]]\n}', "hold a list where rows"),
        ("spread.jsonl", b'{\n "prompt": "a"\n}', "not JSON"),
        ("cells.csv", b"prompt,completion\na,b,c\n", "3 cells, the header 2"),
        ("quote.csv", b'prompt,completion\n"a,b\n', "not a CSV"),
        ("twice.csv", b"prompt,prompt\na,b\n", "twice"),
        ("nul.txt", b"a\nb\0c", "NUL"),
        ("latin.txt", b"a\ncaf\xe9", "not UTF-8"),
        ("columns.jsonl", b'{"speech": "a"}', "fit no known format"),
        ("pairs.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "preferences"),
        ("rows.parquet", b"PAR1", "not a sound parquet"),
        ("rows.jsonl.gz", b"\x1f\x8b", "ends too soon"),
        ("rows.xlsx", b"PK", "not read"),
    ],
)
def test_a_useless_file_is_refused_by_name(
    tmp_path: Path, tokenizer: Any, name: str, data: bytes, word: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=word) as caught:
        prepared(path, tokenizer)
    assert caught.value.where.startswith(str(path))


def test_one_row_spread_over_lines_is_a_row_of_a_json_file(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
    assert values(tmp_path / "one.json") == [row]
    (tmp_path / "one.jsonl").write_text(json.dumps(row, indent=1))
    with pytest.raises(DataError) as caught:
        values(tmp_path / "one.jsonl")
    assert "on one line" in caught.value.fix


def test_a_template_that_rewrites_the_prompt_is_told_with_its_own_fix(tmp_path: Path, tokenizer: Any) -> None:
    template = tmp_path / "rewriting.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}")
    path = tmp_path / "rows.jsonl"
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    path.write_text(json.dumps({"messages": chat}))
    with pytest.raises(DataError, match="writes the prompt differently") as caught:
        prepared(path, tokenizer, chat_template=str(template))
    assert "data.chat_template" in caught.value.fix


def test_places_in_texts_are_line_and_column(tmp_path: Path) -> None:
    for data, place in ((b"ab\ncd\0", ":2:3"), (b"ab\n\ncaf\xe9", ":3:4"), (b"\xff", ":1:1")):
        path = tmp_path / "text.txt"
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            list(read_rows(path))
        assert caught.value.where == f"{path}{place}"


def test_nothing_left_names_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "word " * 50, "completion": "x"}) for _ in range(5)))
    with pytest.raises(DataError, match="answer cut away by max_length 16") as caught:
        prepared(path, tokenizer, max_length=16)
    assert f"{path}:1" in caught.value.what
    assert "none of 5 rows" in caught.value.what
    assert "2 more" in caught.value.what


def test_a_line_without_end_is_refused_with_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.truncate(MAX_ROW_BYTES * 3)
    with pytest.raises(DataError, match="longer than"):
        list(read_rows(path))


def test_a_million_turns_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [' + ",".join(['{"role":"user","content":"x"}'] * 100_000) + "]}")
    with pytest.raises(DataError, match="more than 1,000"):
        prepared(path, tokenizer)


def test_missing_and_unreadable_files_are_storage_errors(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(StorageError, match="no such file"):
        prepared(tmp_path / "gone.jsonl", tokenizer)
    with pytest.raises(DataError, match="no train file"):
        prepared(tmp_path, tokenizer)


def test_private_characters_are_refused_not_misread(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b\U000f0001"}))
    with pytest.raises(GraftError, match="U\\+F0001"):
        prepared(path, tokenizer)
