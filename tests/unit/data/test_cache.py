"""Tokens that are kept: what they hang on, two processes at once, damage, room."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.data import cache
from graft.data.config import DataConfig
from graft.data.listener import SILENT
from graft.data.prepare import Dataset, prepare
from graft.models.load import load_tokenizer

ROWS = [{"prompt": f"Question {number}?", "completion": f"Answer {number % 7}."} for number in range(40)]


@pytest.fixture
def tokenizer(tiny_dir: Callable[..., Path]) -> Any:
    return load_tokenizer(str(tiny_dir("llama")))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "MIN_BYTES", 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def settings(tmp_path: Path, **more: Any) -> DataConfig:
    return DataConfig(cache=str(tmp_path / "kept"), **more)


def entries(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "kept").iterdir() if path.is_dir())


def content(dataset: Dataset) -> list[Any]:
    return [(sample.input_ids, sample.labels, sample.where, sample.remarks) for sample in dataset.samples]


def test_what_is_kept_is_what_was_made(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    plain = prepare(str(data), tokenizer, DataConfig(cache=False))
    made = prepare(str(data), tokenizer, settings(tmp_path))
    (entry,) = entries(tmp_path)
    before = {file.name: file.read_bytes() for file in entry.iterdir() if file.suffix != ".json"}
    taken = prepare(str(data), tokenizer, settings(tmp_path))
    assert content(plain) == content(made) == content(taken)
    assert made.report == taken.report
    assert plain.digest == made.digest == taken.digest
    assert [note for note in taken.report.notes if str(entry) in note]
    assert before == {file.name: file.read_bytes() for file in entry.iterdir() if file.suffix != ".json"}
    assert entries(tmp_path) == [entry]


@pytest.mark.parametrize(
    ("more", "again"),
    [
        ({}, False),
        ({"packing": False, "shuffle": False, "workers": 3, "eval_fraction": 0.1}, False),
        ({"max_length": 512}, True),
        ({"loss_on": "all"}, True),
        ({"limit": 3}, True),
    ],
)
def test_settings_that_make_other_samples_make_another_entry(
    data: Path, tokenizer: Any, tmp_path: Path, more: dict[str, Any], again: bool
) -> None:
    prepare(str(data), tokenizer, settings(tmp_path))
    prepare(str(data), tokenizer, settings(tmp_path, **more))
    assert len(entries(tmp_path)) == 1 + again


def test_another_content_or_tokenizer_makes_another_entry(
    data: Path, tokenizer: Any, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    prepare(str(data), tokenizer, settings(tmp_path))
    times = data.stat()
    data.write_text(data.read_text().replace("Question 3?", "Question 4?"))
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = prepare(str(data), tokenizer, settings(tmp_path))
    assert len(entries(tmp_path)) == 2
    assert changed.report.num_duplicates == 0
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    prepare(str(data), tokenizer, settings(tmp_path))
    assert len(entries(tmp_path)) == 3


def test_small_files_and_no_cache_keep_nothing(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "kept"))
    prepare(str(data), tokenizer, DataConfig(cache=False))
    monkeypatch.setattr(cache, "MIN_BYTES", data.stat().st_size + 1)
    prepare(str(data), tokenizer, DataConfig())
    assert not (tmp_path / "kept").exists()
    monkeypatch.setattr(cache, "MIN_BYTES", data.stat().st_size)
    prepare(str(data), tokenizer, DataConfig())
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["short", "missing", "no description"])
def test_a_damaged_entry_is_made_anew(data: Path, tokenizer: Any, tmp_path: Path, damage: str) -> None:
    made = content(prepare(str(data), tokenizer, settings(tmp_path)))
    (entry,) = entries(tmp_path)
    if damage == "short":
        os.truncate(entry / "tokens", 10)
    else:
        (entry / ("spans" if damage == "missing" else "dataset.json")).unlink()
    assert content(prepare(str(data), tokenizer, settings(tmp_path))) == made
    assert entries(tmp_path) == [entry]
    assert (entry / "tokens").stat().st_size > 10


def test_a_row_that_is_refused_leaves_no_entry(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    data.write_text(data.read_text() + '{"prompt": 1, "completion": "a"}\n')
    with pytest.raises(Exception, match="must hold text"):
        prepare(str(data), tokenizer, settings(tmp_path))
    assert entries(tmp_path) == []


def test_entries_used_longest_ago_make_room(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(str(data), tokenizer, settings(tmp_path))
    held = first.samples[3]
    (oldest,) = entries(tmp_path)
    os.utime(oldest / "dataset.json", (1, 1))
    prepare(str(data), tokenizer, settings(tmp_path, limit=5))
    (middle,) = set(entries(tmp_path)) - {oldest}
    size = sum(file.stat().st_size for file in middle.iterdir())
    monkeypatch.setattr(cache, "MAX_BYTES", 2 * size + 1000)
    prepare(str(data), tokenizer, settings(tmp_path, limit=6))
    assert oldest not in entries(tmp_path)
    assert middle in entries(tmp_path)
    assert first.samples[3] == held, "a store that is open goes on"


def _work(path: str, model: str, place: str, start: Any, found: Any) -> None:
    cache.MIN_BYTES = 1
    start.wait()
    told: list[str] = []

    class Told:
        say = staticmethod(told.append)
        preparing = staticmethod(SILENT.preparing)

    made = prepare(path, load_tokenizer(model), DataConfig(cache=place), listener=Told())
    found.put((content(made), made.report.num_tokens))


def test_two_processes_at_once_make_one_entry(
    data: Path, tokenizer: Any, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(3), context.Queue()
    place = str(tmp_path / "kept")
    model = str(tiny_dir("llama"))
    workers = [context.Process(target=_work, args=(str(data), model, place, start, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [found.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0] == results[1] == results[2]
    assert results[0][0] == content(prepare(str(data), tokenizer, DataConfig(cache=False)))
    assert len(entries(tmp_path)) == 1
    assert not list((tmp_path / "kept").glob(".*"))
