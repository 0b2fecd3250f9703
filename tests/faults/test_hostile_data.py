"""A corpus of hostile and odd data files: the rows that each gives, or the error with its place."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graft.data.config import DataConfig
from graft.data.prepare import prepare
from graft.data.quarantine import Quarantine
from graft.data.sources import read_rows
from graft.errors import DataError, GraftError, StorageError

A, B, C = ({"prompt": name, "completion": name.upper()} for name in "abc")
LA, LB, LC = (json.dumps(row).encode() for row in (A, B, C))
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]


@dataclass(frozen=True)
class Case:
    """A file, and what becomes of it.

    Attributes:
        name: Of the file.
        data: Its bytes, or what writes it.
        rows: What `read_rows` gives, if nothing is refused; otherwise what skip_invalid keeps.
        error: A word of the error, where it is refused.
        at: The place of the error behind the path.
        whole: Whether the file as a whole is refused, also under skip_invalid.
        kind: The error's class.
    """

    name: str
    data: bytes | Callable[[Path], None]
    rows: Any = None
    error: str = ""
    at: str = ""
    whole: bool = False
    kind: type[GraftError] = DataError


def whole(name: str, data: bytes | Callable[[Path], None], error: str, at: str = "") -> Case:
    return Case(name, data, None, error, at, whole=True)


def lines(*rows: bytes, end: bytes = b"\n") -> bytes:
    return b"".join(row + end for row in rows)


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("rows.jsonl", LA)
    return made.getvalue()


def bad_sum(data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data))
    packed[-8] ^= 1
    return bytes(packed)


def table(path: Path, **columns: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table(columns), path)


def dictionary_strings(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table(path, text=pyarrow.array(["x", "y", "x"]).dictionary_encode())


def nested(path: Path) -> None:
    table(path, messages=[TURNS, TURNS[:1]], tags=[["a"], []])


def cut_parquet(path: Path) -> None:
    table(path, text=["x" * 100] * 100)
    path.write_bytes(path.read_bytes()[:-40])


def not_utf8_in_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = pyarrow.array([b"good", b"\xff\xfe", b"well"]).view(pyarrow.string())
    table(path, text=texts)


def arrow(path: Path, *, stream: bool, rows: int = 3, twice: bool = False) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    names = ["text", "text"] if twice else ["text"]
    made = pyarrow.table([[f"row {n}" for n in range(rows)]] * len(names), names=names)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), made.schema) as file:
        file.write_table(made, max_chunksize=2)


def wrong_offsets(path: Path) -> None:
    arrow(path, stream=True, rows=2)
    data, sound = path.read_bytes(), b"".join(n.to_bytes(4, "little") for n in (0, 5, 10))
    assert data.count(sound) == 1
    path.write_bytes(data.replace(sound, sound[:8] + (1 << 30).to_bytes(4, "little")))


def two_kinds(path: Path) -> None:
    path.mkdir()
    (path / "train.jsonl").write_bytes(LA)
    (path / "train.csv").write_bytes(b"prompt,completion\na,b\n")


def without_files(path: Path) -> None:
    path.mkdir()
    (path / "notes.md").write_text("nothing")


def shards(path: Path, *, missing: int | None = None) -> None:
    path.mkdir()
    for number, line in enumerate((LA, LB, LC)):
        if number != missing:
            (path / f"train-{number:05}-of-00003.jsonl").write_bytes(line)


def loop(path: Path) -> None:
    path.symlink_to(path)


def locked(path: Path) -> None:
    path.write_bytes(LA)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


ENCODED = [
    Case("plain.jsonl", lines(LA, LB, LC), [A, B, C]),
    Case("mark.jsonl", b"\xef\xbb\xbf" + lines(LA, LB), [A, B]),
    Case("crlf.jsonl", lines(LA, LB, end=b"\r\n"), [A, B]),
    Case("cr.jsonl", lines(LA, LB, end=b"\r"), [], "Extra data", f":1:{len(LA) + 2}"),
    Case("no-end.jsonl", lines(LA) + LB, [A, B]),
    Case("blank-lines.jsonl", b"\n \n" + lines(LA, b"", b"\t", LB), [A, B]),
    Case("indented.jsonl", b"  " + LA + b"  \n", [A]),
    Case("nul.jsonl", lines(LA, b"\0", LB), [A, B], "not JSON", ":2:1"),
    Case("nul-in-text.jsonl", lines(LA, b'{"text": "a\0b"}'), [A], "not JSON: Invalid control", ":2:12"),
    Case("escaped-nul.jsonl", lines(b'{"text": "a\\u0000"}', LA), [A], "NUL", ":1:12"),
    Case("backslash-u.jsonl", lines(b'{"text": "\\\\u0000 \\\\ud800"}'), [{"text": "\\u0000 \\ud800"}]),
    Case("half-pair.jsonl", lines(LA, b'{"text": "\\ud83d\\ude00 \\ude00"}'), [A], "surrogate", ":2:24"),
    Case("half-pair-key.jsonl", lines(b'{"\\ud800": "a"}', LA), [A], "surrogate", ":1:3"),
    Case("pair.jsonl", lines(b'{"text": "\\ud83d\\ude00"}'), [{"text": "\U0001f600"}]),
    Case("raw-half-pair.jsonl", lines(LA, b'{"text": "\xed\xa0\x80"}'), [A], "0xed is not UTF-8", ":2:11"),
    Case("overlong.jsonl", lines(b'{"text": "\xc0\xaf"}', LA), [A], "0xc0 is not UTF-8", ":1:11"),
    Case("latin.jsonl", lines(LA, "é".encode() + b"\xe9"), [A], "0xe9 is not UTF-8", ":2:2"),
    Case("cut-character.jsonl", LA + b'\n{"text": "\xe2\x82', [A], "0xe2 is not UTF-8", ":2:11"),
    whole("utf-16-le.jsonl", b"\xff\xfe" + LA.decode().encode("utf-16-le"), "UTF-16", ":1:1"),
    whole("utf-16-be.jsonl", b"\xfe\xff" + LA.decode().encode("utf-16-be"), "UTF-16", ":1:1"),
    whole("utf-16-no-mark.csv", "a,b\n1,2\n".encode("utf-16-le"), "UTF-16", ":1:1"),
    whole("utf-16-be-no-mark.json", "[]".encode("utf-16-be"), "UTF-16", ":1:1"),
    whole("utf-32.txt", "text".encode("utf-32"), "UTF-32", ":1:1"),
    whole("utf-32-no-mark.txt", "text".encode("utf-32-be"), "UTF-32", ":1:1"),
    Case("mark.csv", b"\xef\xbb\xbfprompt,completion\r\na,A\r\n", [A]),
    Case("mark.json", b"\xef\xbb\xbf[" + LA + b"]", [A]),
    Case("mark.txt", b"\xef\xbb\xbftext\r\nline\rend", ["text\nline\nend"]),
    Case(
        "nul.csv",
        b"text,n\na,1\nb\0,2\nc,3\n",
        [{"text": "a", "n": "1"}, {"text": "c", "n": "3"}],
        "NUL",
        ":3:2",
    ),
    Case("latin.csv", b'text\na\n"b\nc\xe9"\nd\n', [{"text": "a"}, {"text": "d"}], "0xe9 is not", ":4:2"),
    whole("latin.json", b'[{"text": "a"},\n {"text": "\xe9"}]', "0xe9 is not UTF-8", ":2:12"),
    Case("latin.txt", b"a\nbc\xe9", [], "0xe9 is not UTF-8", ":2:3"),
    Case("cut-character.txt", b"a\nbc\xf0\x9f\x98", [], "0xf0 is not UTF-8", ":2:3"),
    whole("zip.jsonl", zipped(), "a zip archive", ":1:1"),
    whole("pickle.jsonl", b"\x80\x04\x95\x0b\0\0\0\0\0\0\0", "a pickle", ":1:1"),
    whole("gzip.jsonl", gzip.compress(LA), "the file is gzip", ":1:1"),
]

JSON = [
    Case("list.json", b"[" + LA + b",\n" + LB + b"]", [A, B]),
    Case("trailing-comma.json", b"[" + LA + b",]", [A]),
    Case("one.json", LA, [A]),
    Case("one-list.json", b'{"version": [1], "rows": [' + LA + b'], "n": 2}', [A]),
    whole("two-lists.json", b'{"a": [' + LA + b'], "b": [' + LB + b"]}", "several: a, b", ":1"),
    Case("chat.json", json.dumps({"messages": TURNS}).encode(), [{"messages": TURNS}]),
    Case("lines.json", lines(LA, LB), [A, B]),
    whole("open.json", b"[" + LA, "not closed", f":1:{len(LA) + 2}"),
    whole("open-object.json", b'{"rows": [' + LA + b"]", "not JSON", f":1:{len(LA) + 12}"),
    whole("no-comma.json", b"[" + LA + b"\n" + LB + b"]", "a comma is missing", ":2:1"),
    whole("more.json", b"[" + LA + b"] [", "after the end", f":1:{len(LA) + 4}"),
    whole("text.json", b'"text"', "must hold a list", ":1:1"),
    whole("cut-row.json", b"[" + LA + b',\n {"text": "a', "not JSON", ":2:11"),
    Case("numbers.json", b"[" + LA + b", 5]", [A], "not a number", f":1:{len(LA) + 4}"),
    Case("nan.json", b"[" + LA + b',\n{"n": NaN},' + LB + b"]", [A, B], "NaN is no JSON", ":2:1"),
    Case("half-pair.json", b'[\n {"a": "\\ud800"},' + LA + b"]", [A], "surrogate", ":2:9"),
    Case("nan.jsonl", lines(LA, b'{"n": NaN}', LB), [A, B], "NaN is no JSON", ":2:1"),
    Case("infinity.jsonl", lines(LA, b'{"n": -Infinity}'), [A], "Infinity is no JSON", ":2:1"),
    Case("digits.jsonl", lines(LA, b'{"n": ' + b"9" * 100_000 + b"}"), [A], "not JSON", ":2:1"),
    Case("deep.jsonl", lines(LA, b'{"n": ' + b"[" * 100_000, LB), [A, B], "nested too deeply", ":2:1"),
    whole("deep.json", b"[" + b"[" * 100_000, "nested too deeply", ":1:2"),
    Case("twice.jsonl", lines(b'{"text": "a", "text": "b"}'), [{"text": "b"}]),
    Case("list.jsonl", lines(LA, b"[1]", b'"x"', b"null"), [A], "not a list", ":2:1"),
    Case("two-in-a-line.jsonl", lines(LA + LB, LC), [C], "Extra data", f":1:{len(LA) + 1}"),
    Case("comma.jsonl", lines(LA + b",", LB), [B], "Extra data", f":1:{len(LA) + 1}"),
    Case("single-quotes.jsonl", lines(b"{'text': 'a'}", LB), [B], "not JSON", ":1:2"),
]

TABLES = [
    whole("twice.csv", b"a,a\n1,2\n", "is there twice", ":1"),
    Case(
        "ragged.csv",
        b"a,b\n1,2\n3\n4,5,6\n7,8\n",
        [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}],
        "1 cells",
        ":3:1",
    ),
    Case("cr.csv", b"a,b\r1,2\r", [{"a": "1", "b": "2"}]),
    Case("quoted-lines.csv", b'a,b\r\n"x\r\ny",2\r\n', [{"a": "x\ny", "b": "2"}]),
    Case("line-after.csv", b'a,b\n"x\ny",2\n\n3\n', [{"a": "x\ny", "b": "2"}], "1 cells", ":5:1"),
    Case("open-quote.csv", b'a,b\n1,2\n"x,3\n4,5', [{"a": "1", "b": "2"}], "not a CSV file", ":4"),
    Case("inner-quote.csv", b'a,b\n"x"y,3\n4,5', [{"a": "4", "b": "5"}], "not a CSV file", ":2"),
    Case("empty-lines.csv", b"\n\na,b\n\n1,2\n\n", [{"a": "1", "b": "2"}]),
    Case("quotes.tsv", b'a\tb\n"x\ty"\t"say ""so"""\n', [{"a": "x\ty", "b": 'say "so"'}]),
    Case("commas.tsv", b"a\tb\nx,y\tz\n", [{"a": "x,y", "b": "z"}]),
]

PACKED = [
    Case("rows.jsonl.gz", gzip.compress(lines(LA, LB)), [A, B]),
    Case("rows.json.gz", gzip.compress(b"[" + LA + b"]"), [A]),
    Case("rows.csv.gz", gzip.compress(b"a\n1\n"), [{"a": "1"}]),
    Case("rows.tsv.gz", gzip.compress(b"a\tb\n1\t2\n"), [{"a": "1", "b": "2"}]),
    Case("text.txt.gz", gzip.compress(b"text"), ["text"]),
    Case("ROWS.JSONL.GZ", gzip.compress(LA), [A]),
    Case("mark.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LA), [A]),
    Case("members.jsonl.gz", gzip.compress(LA + b"\n") + gzip.compress(LB), [A, B]),
    whole("cut.jsonl.gz", gzip.compress(lines(*[LA] * 100))[:-12], "ends too soon"),
    whole("sum.jsonl.gz", bad_sum(lines(LA)), "CRC check failed"),
    whole("no-gzip.jsonl.gz", lines(LA), "not a sound gzip file"),
    whole("rest.jsonl.gz", gzip.compress(LA) + b"garbage", "not a sound gzip file"),
    whole("broken.jsonl.gz", gzip.compress(b"x" * 99)[:10] + b"\xff" * 40, "not a sound gzip file"),
    Case("empty.jsonl.gz", b"", []),
    whole("utf-16.csv.gz", gzip.compress("a\n1\n".encode("utf-16")), "UTF-16", ":1:1"),
]

COLUMNS = [
    Case("nested.parquet", nested, [{"messages": TURNS, "tags": ["a"]}, {"messages": TURNS[:1], "tags": []}]),
    Case("nulls.parquet", lambda path: table(path, text=["a", None]), [{"text": "a"}, {"text": None}]),
    Case("dictionary.parquet", dictionary_strings, [{"text": "x"}, {"text": "y"}, {"text": "x"}]),
    Case("binary.parquet", lambda path: table(path, text=[b"\0\xff"]), [{"text": b"\0\xff"}]),
    Case("nul.parquet", lambda path: table(path, text=["a", "b\0"]), [{"text": "a"}], "NUL", ":2"),
    Case("latin.parquet", not_utf8_in_parquet, [{"text": "good"}, {"text": "well"}], "damaged", ":2"),
    whole("cut.parquet", cut_parquet, "not a sound parquet file"),
    whole("no.parquet", b"PAR1 nothing PAR1", "not a sound parquet file"),
    whole("empty.parquet", b"", "not a sound parquet file"),
    Case("file.arrow", lambda path: arrow(path, stream=False), [{"text": f"row {n}"} for n in range(3)]),
    Case("stream.arrow", lambda path: arrow(path, stream=True), [{"text": f"row {n}"} for n in range(3)]),
    Case("file.feather", lambda path: arrow(path, stream=False), [{"text": f"row {n}"} for n in range(3)]),
    Case("offsets.arrow", wrong_offsets, [{"text": "row 0"}], "the row is damaged", ":2"),
    whole("twice.arrow", lambda path: arrow(path, stream=True, twice=True), "is there twice"),
    whole("no.arrow", b"not arrow at all, but long enough", "not a sound arrow file"),
    whole("old.feather", b"FEA1" + bytes(20), "version 1"),
]

EMPTY = [
    Case(name, data, [])
    for name, data in (
        ("empty.jsonl", b""),
        ("blank.jsonl", b" \n\r\n\t\n"),
        ("mark-only.jsonl", b"\xef\xbb\xbf"),
        ("empty.json", b""),
        ("blank.json", b" \n"),
        ("mark-only.json", b"\xef\xbb\xbf"),
        ("no-rows.json", b"[ ]"),
        ("empty.csv", b""),
        ("header.csv", b"prompt,completion\n"),
        ("mark-only.csv", b"\xef\xbb\xbf"),
        ("empty.txt", b""),
        ("mark-only.txt", b"\xef\xbb\xbf \n"),
    )
]

PLACES = [
    whole("two-kinds", two_kinds, "several train files: train.jsonl, train.csv"),
    whole("without-files", without_files, "no train file"),
    whole("directory.jsonl", lambda path: path.mkdir(), "no train file"),
    Case("shards", shards, [A, B, C]),
    whole("missing-shard", lambda path: shards(path, missing=1), "train-00001-of-00003.jsonl is missing"),
    Case("loop.jsonl", loop, None, "leads nowhere", whole=True, kind=StorageError),
    Case("gone.jsonl", lambda path: None, None, "no such file", whole=True, kind=StorageError),
    whole("pipe.jsonl", os.mkfifo, "no ordinary file"),
    whole("pipe.jsonl.gz", os.mkfifo, "no ordinary file"),
    whole("pipe.parquet", os.mkfifo, "no ordinary file"),
    Case("locked.jsonl", locked, None, "cannot be read", whole=True, kind=StorageError),
    whole("rows.xlsx", zipped(), "are not read"),
    whole("rows", LA, "are not read"),
    whole("rows.gz", gzip.compress(LA), "are not read"),
]

CASES = [*ENCODED, *JSON, *TABLES, *PACKED, *COLUMNS, *EMPTY, *PLACES]


def written(case: Case, directory: Path) -> Path:
    path = directory / case.name
    if callable(case.data):
        case.data(path)
    else:
        path.write_bytes(case.data)
    return path


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_gives_its_rows_or_an_error_with_its_place(case: Case, tmp_path: Path) -> None:
    path = written(case, tmp_path)
    if not case.error:
        assert [row.value for row in read_rows(path)] == case.rows
        return
    with pytest.raises(case.kind, match=case.error) as caught:
        list(read_rows(path))
    assert type(caught.value) is case.kind
    assert caught.value.where == f"{path}{case.at}"
    assert caught.value.fix


@pytest.mark.parametrize("piece", [3, 8, 1 << 18])
def test_a_number_in_a_list_is_one_wherever_the_file_is_cut(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.data.readers.json_window._PIECE", piece)
    path = tmp_path / "rows.json"
    path.write_bytes(b"[1234567890, " + LA + b", 12345678901234]")
    refused: list[tuple[str, str]] = []
    rows = list(read_rows(path, on_invalid=lambda error, raw: refused.append((error.where, raw))))
    assert [row.value for row in rows] == [A]
    assert refused == [(f"{path}:1:2", "1234567890"), (f"{path}:1:{len(LA) + 16}", "12345678901234")]


@pytest.mark.parametrize("case", [case for case in CASES if case.error], ids=lambda case: case.name)
def test_skipping_leaves_out_rows_but_never_a_part_of_a_file(case: Case, tmp_path: Path) -> None:
    path = written(case, tmp_path)
    refused: list[tuple[DataError, str]] = []
    reading = read_rows(path, on_invalid=lambda error, raw: refused.append((error, raw)))
    if case.whole:
        with pytest.raises(case.kind, match=case.error):
            list(reading)
        return
    assert [row.value for row in reading] == case.rows
    assert refused[0][0].where == f"{path}{case.at}"
    assert all(raw for _, raw in refused)
    json.dumps([raw for _, raw in refused]).encode()  # what is quarantined is text


CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def turns(*roles: str, content: Any = "x") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role in roles]}


MEANINGS: list[tuple[str, Any, str, str]] = [
    ("empty-turns", {"messages": []}, "the conversation is empty", ":2"),
    ("wrong-role", turns("user", "asistant"), "'asistant' is not known", ":2, message 2"),
    ("no-role", {"messages": [{"content": "x"}]}, "role None is not known", ":2, message 1"),
    ("number-role", {"messages": [{"role": 3, "content": "x"}]}, "role 3 is not known", ":2, message 1"),
    ("null-content", turns("user", "assistant", content=None), "content must be text", ":2, message 1"),
    ("number-content", turns("user", "assistant", content=5), "content must be text", ":2, message 1"),
    ("sound-content", turns("user", content=[{"type": "audio"}]), "else than text", ":2, message 1"),
    ("text-message", {"messages": ["hello"]}, "must be an object", ":2, message 1"),
    ("many-turns", turns(*["user", "assistant"] * 500, "user"), "1,001 messages", ":2"),
    ("json-text", {"messages": json.dumps(TURNS)}, "no list of messages", ":2"),
    ("no-messages", {"text": "x"}, "no list of messages", ":2"),
    ("nobody-answers", turns("user"), "nothing to learn", ":2"),
    ("private", turns("user", "assistant", content="\U000f0001"), "U\\+F0001", ":2"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_dir("llama"))


@pytest.mark.parametrize("case", MEANINGS, ids=lambda case: case[0])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_row_with_a_wrong_meaning_is_named_or_kept_aside(
    case: tuple[str, Any, str, str], suffix: str, tmp_path: Path, tokenizer: Any
) -> None:
    name, bad, word, at = case
    path, template = tmp_path / f"rows.{suffix}", tmp_path / "chat.jinja"
    template.write_text(CHAT)
    rows = [{"messages": TURNS}, bad, {"messages": TURNS}]
    data = lines(*(json.dumps(row).encode() for row in rows))
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    settings: dict[str, Any] = {"train": str(path), "chat_template": str(template), "format": "messages"}
    settings |= {"max_length": 4096}
    if name != "nobody-answers":
        with pytest.raises(GraftError, match=word) as caught:
            prepare(str(path), tokenizer, DataConfig(**settings))
        assert caught.value.where == f"{path}{at}"
    with Quarantine() as quarantine:
        kept = prepare(str(path), tokenizer, DataConfig(**settings, skip_invalid=True), quarantine=quarantine)
        quarantine.save(tmp_path / "quarantine.jsonl")
    assert [sample.where for sample in kept.samples] == [f"{path}:1", f"{path}:3"]
    (told,) = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert told["where"] == f"{path}{at}"
    assert re.search(word, told["reason"])
    assert json.loads(told["row"]) == bad


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("empty-answer.jsonl", b'{"prompt": "a", "completion": ""}', "nothing to learn"),
        ("answer-first.jsonl", b'{"completion": "a", "prompt": 5}', "must hold text, not int"),
        (
            "bytes.parquet",
            lambda path: table(path, prompt=[b"a"], completion=["b"]),
            "must hold text, not bytes",
        ),
        ("nulls.parquet", lambda path: table(path, prompt=["a"], completion=["b"], text=[None]), ""),
        (
            "null.parquet",
            lambda path: table(path, prompt=["a"], completion=[None]),
            "must hold text, not None",
        ),
    ],
)
def test_a_file_of_nothing_but_such_rows_is_refused(
    name: str, data: Any, word: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = written(Case(name, data), tmp_path)
    settings = DataConfig(train=str(path), skip_invalid=True)
    if not word:
        assert prepare(str(path), tokenizer, settings).report.num_used == 1
        return
    with Quarantine() as quarantine, pytest.raises(DataError, match=word) as caught:
        prepare(str(path), tokenizer, settings, quarantine=quarantine)
    assert caught.value.what.startswith("none of 1 rows can be learned from")
    assert quarantine.count == 1
