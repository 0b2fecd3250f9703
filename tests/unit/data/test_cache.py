"""Tokens that are kept: what they hang on, two processes at once, damage, room."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft import files
from graft.data import batches, cache, store
from graft.data.config import DataConfig
from graft.data.filters import cleaning
from graft.data.listener import SILENT
from graft.data.loader import Loader
from graft.data.prepare import Dataset, prepare
from graft.data.quarantine import Quarantine
from graft.data.splits import prepare_splits
from graft.errors import DataError, StorageError
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


def test_a_copy_of_a_file_keeps_its_own_places(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    prepare(str(data), tokenizer, settings(tmp_path))
    copy = tmp_path / "copy" / data.name
    copy.parent.mkdir()
    shutil.copy(data, copy)
    found = prepare(str(copy), tokenizer, settings(tmp_path))
    assert found.report.path == str(copy)
    assert found.samples[0].where == f"{copy}:1"


def test_rows_left_out_of_training_data_are_there_in_evaluation_data(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The same file: cleaning acts on training rows only."""
    data.write_text(data.read_text() * 2)
    asked = settings(tmp_path, deduplicate="exact")
    assert len(prepare(str(data), tokenizer, asked).samples) == len(ROWS)
    assert len(prepare(str(data), tokenizer, asked, "eval").samples) == 2 * len(ROWS)


def test_other_code_makes_another_entry(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(str(data), tokenizer, settings(tmp_path))
    monkeypatch.setattr(cache, "_code", lambda: "of another version")
    prepare(str(data), tokenizer, settings(tmp_path))
    assert len(entries(tmp_path)) == 2


def test_another_word_that_templates_write_makes_another_entry(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """`bos_token` stands in no tokenizer.json, and `{{ bos_token }}` writes it."""
    prepare(str(data), tokenizer, settings(tmp_path))
    before, tokenizer.bos_token = tokenizer.bos_token, tokenizer.eos_token
    try:
        prepare(str(data), tokenizer, settings(tmp_path))
    finally:
        tokenizer.bos_token = before
    assert len(entries(tmp_path)) == 2


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


@pytest.mark.parametrize(
    "damage", ["short", "missing", "no description", "torn description", "other description", "flipped"]
)
def test_a_damaged_entry_is_made_anew(data: Path, tokenizer: Any, tmp_path: Path, damage: str) -> None:
    made = content(prepare(str(data), tokenizer, settings(tmp_path)))
    (entry,) = entries(tmp_path)
    if damage == "short":
        os.truncate(entry / "tokens", 10)
    elif damage == "flipped":
        tokens = bytearray((entry / "tokens").read_bytes())
        tokens[len(tokens) // 2] ^= 1
        (entry / "tokens").write_bytes(tokens)
    elif damage.endswith(" description") and damage != "no description":
        (entry / "dataset.json").write_text("{" if damage == "torn description" else "[]")
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


def test_a_file_that_changes_while_it_is_read_leaves_no_entry(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    class Writing:
        say = staticmethod(SILENT.say)

        @staticmethod
        def preparing(num_rows: int, num_tokens: int, share: float | None) -> None:
            data.write_text(data.read_text() + '{"prompt": "one", "completion": "more"}\n')

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(str(data), tokenizer, settings(tmp_path), listener=Writing())
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


def test_only_entries_make_room(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else lies in a directory that the user named stays, whatever its files are called."""
    others = tmp_path / "kept" / "photographs"
    others.mkdir(parents=True)
    (others / "dataset.json").write_text("{}")
    monkeypatch.setattr(cache, "MAX_BYTES", 0)
    prepare(str(data), tokenizer, settings(tmp_path))
    assert (others / "dataset.json").exists()


def test_what_a_killed_process_left_is_removed_and_what_is_being_made_is_not(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    prepare(str(data), tokenizer, settings(tmp_path))
    (entry,) = entries(tmp_path)
    root = entry.parent
    left = [root / f".{key}.1{files.PARTIAL}" for key in (entry.name, "a" * 64, "b" * 64)]
    for partial in left:
        partial.mkdir()
        (partial / "tokens").write_bytes(b"0")
    shutil.rmtree(entry)
    with files.locked(root / f"{'b' * 64}.lock"):
        prepare(str(data), tokenizer, settings(tmp_path))
    assert [partial.exists() for partial in left] == [False, False, True]


def test_an_entry_that_another_process_opens_is_not_removed(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(str(data), tokenizer, settings(tmp_path))
    (entry,) = entries(tmp_path)
    monkeypatch.setattr(cache, "MAX_BYTES", 0)
    with files.locked(entry.with_name(f"{entry.name}.lock")):
        prepare(str(data), tokenizer, settings(tmp_path, limit=5))
    assert entry.exists()
    prepare(str(data), tokenizer, settings(tmp_path, limit=6))
    assert not entry.exists()


def test_a_cache_that_cannot_be_written_says_which_setting_names_it(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="tokens cannot be kept") as caught:
        prepare(str(data), tokenizer, DataConfig(cache=str(tmp_path / "file")))
    assert "data.cache" in caught.value.fix


def test_a_cache_that_may_only_be_read_is_used(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(str(data), tokenizer, settings(tmp_path))
    (entry,) = entries(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in [entry.parent, *entry.iterdir()]}
    monkeypatch.setattr(cache, "_writable", lambda directory: False)  # root may write everywhere
    assert content(prepare(str(data), tokenizer, settings(tmp_path))) == content(made)
    assert {file: file.stat().st_mtime_ns for file in [entry.parent, *entry.iterdir()]} == before
    with pytest.raises(StorageError, match="tokens cannot be kept"):
        prepare(str(data), tokenizer, settings(tmp_path, limit=5))
    (entry / "dataset.json").write_text("{")
    with pytest.raises(StorageError, match="damaged, and the cache may only be read") as caught:
        prepare(str(data), tokenizer, settings(tmp_path))
    assert "data.cache" in caught.value.fix
    assert entry.exists()


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


def twins(tmp_path: Path) -> tuple[str, str]:
    """Two files of which the second has rows of the first."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:20]))
    second.write_text("".join(json.dumps(row) + "\n" for row in ROWS[10:]))
    return str(first), str(second)


def places(dataset: Dataset | None) -> list[str]:
    assert dataset is not None
    return [sample.where for sample in dataset.samples]


@pytest.mark.parametrize("kept", ["none", "first", "both"])
def test_rows_are_compared_with_files_whose_tokens_were_kept(
    data: Path, tokenizer: Any, tmp_path: Path, kept: str
) -> None:
    first, second = twins(tmp_path)
    mix = {first: 1.0, second: 1.0}
    asked = settings(tmp_path, mix=mix, deduplicate="exact")
    plain, _ = prepare_splits(tokenizer, DataConfig(mix=mix, deduplicate="exact", cache=False))
    if kept != "none":
        prepare_splits(tokenizer, asked)
    if kept == "first":
        for entry in entries(tmp_path):
            if "second.jsonl" in (entry / "dataset.json").read_text():
                shutil.rmtree(entry)
        assert len(entries(tmp_path)) == 1
    found, _ = prepare_splits(tokenizer, asked)
    assert places(found) == places(plain)
    assert len(found.samples) == 40
    assert found.report.removed == plain.report.removed == {"duplicate": 10}
    assert len(entries(tmp_path)) == 2


def test_a_run_takes_the_tokens_of_a_check(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    asked = settings(tmp_path)
    checked = prepare(str(data), tokenizer, asked, cleaning=cleaning.Cleaning(asked, thorough=True))
    taken = prepare(str(data), tokenizer, asked)
    assert content(taken) == content(checked)
    assert len(entries(tmp_path)) == 1
    # What a run looked at is less than a check has to: that is made anew.
    other = settings(tmp_path, max_length=77)
    prepare(str(data), tokenizer, other)
    prepare(str(data), tokenizer, other, cleaning=cleaning.Cleaning(other, thorough=True))
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("again", [False, True])
def test_overlap_with_evaluation_data_is_known_from_the_cache(
    data: Path, tokenizer: Any, tmp_path: Path, again: bool
) -> None:
    first, second = twins(tmp_path)
    asked = settings(tmp_path, train=first, eval=second, overlap="drop")
    if again:
        prepare_splits(tokenizer, asked)
    train, held_out = prepare_splits(tokenizer, asked)
    assert held_out is not None
    assert places(train) == [f"{first}:{line}" for line in range(1, 11)]
    assert held_out.report.num_overlap == 10
    # Other evaluation data leaves other rows: it is another entry.
    Path(second).write_text("".join(json.dumps(row) + "\n" for row in ROWS[5:]))
    train, held_out = prepare_splits(tokenizer, asked)
    assert places(train) == [f"{first}:{line}" for line in range(1, 6)]


def test_new_training_rows_are_compared_with_evaluation_data_whose_tokens_were_kept(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    first, second = twins(tmp_path)
    asked = settings(tmp_path, train=first, eval=second, overlap="drop")
    prepare_splits(tokenizer, asked)
    Path(first).write_text("".join(json.dumps(row) + "\n" for row in ROWS[5:20]))
    train, held_out = prepare_splits(tokenizer, asked)
    assert places(train) == [f"{first}:{line}" for line in range(1, 6)]
    assert held_out is not None
    assert held_out.report.num_overlap == 10


def test_a_file_compared_with_evaluation_data_is_not_taken_for_one_of_a_mixture(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The same two files in the same order: rows of the second stay in the one case and go in the other."""
    first, second = twins(tmp_path)
    apart = settings(tmp_path, train=second, eval=first, deduplicate="exact")
    train, _ = prepare_splits(tokenizer, apart)
    assert train.report.removed == {}
    together = settings(tmp_path, mix={first: 1.0, second: 1.0}, deduplicate="exact")
    found, _ = prepare_splits(tokenizer, together)
    assert found.report.removed == {"duplicate": 10}


def test_notes_about_other_evaluation_data_are_not_told_again(
    data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    first, second = twins(tmp_path)
    train, _ = prepare_splits(tokenizer, settings(tmp_path, train=first, eval=second))
    assert len(train.report.places["overlap"]) == 10
    Path(second).write_text('{"prompt": "Something else?", "completion": " Yes"}\n')
    train, _ = prepare_splits(tokenizer, settings(tmp_path, train=first, eval=second))
    assert "overlap" not in train.report.places
    assert not [note for note in train.report.notes if "evaluation data" in note]


def test_rows_left_out_are_known_from_the_cache(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    data.write_text(data.read_text() + "not json\n" + '{"prompt": 1, "completion": "a"}\n')
    found, reports = [], []
    for _ in range(2):
        with Quarantine() as quarantine:
            made = prepare(str(data), tokenizer, settings(tmp_path, skip_invalid=True), quarantine=quarantine)
            reports.append(made.report)
            quarantine.save(tmp_path / "left.jsonl")
            found.append((quarantine.count, (tmp_path / "left.jsonl").read_text()))
    assert found[0] == found[1]
    assert found[0][0] == 2
    assert reports[0] == reports[1]
    assert len(reports[0].rejected) == 2


def test_memory_does_not_follow_the_number_of_rows(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times the rows, and less than 300 bytes more for each, where a row held takes 800."""
    monkeypatch.setattr(store, "SPILL_BYTES", 1 << 16)
    monkeypatch.setattr(cleaning, "LOOKED_AT", 1_000)
    monkeypatch.setattr(batches, "MAX_ROWS", 256)
    text = "A question that is as long as questions are, with a number in it: "
    peaks = []
    for count in (3_000, 3_000, 24_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                row = {"prompt": f"{text}{number}", "completion": f"{text}{number}"}
                file.write(json.dumps(row) + "\n")
        tracemalloc.start()
        found = prepare(str(path), tokenizer, DataConfig())
        loader = Loader(found.samples, 4, 512, packing=True)
        assert sum(batch.num_tokens for batch in loader.epoch(0)) == found.report.num_tokens
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 300 * 21_000
