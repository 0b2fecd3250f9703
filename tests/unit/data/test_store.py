"""Samples as bytes: what comes back is what was put in, wherever the bytes are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.held import chosen, figures_of, lengths_of, repeats
from graft.data.samples import IGNORED, SPLIT, TRUNCATED, Sample
from graft.data.store import COLUMNS, Store, StoreWriter
from graft.errors import StorageError

CONTROLS = {0, 7}


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    ids = draw(st.lists(st.integers(0, 65_535), min_size=1, max_size=12))
    learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    labels = [IGNORED, *(id if use else IGNORED for id, use in zip(ids[1:], learned[1:], strict=True))]
    remarks = draw(st.sampled_from([(), (SPLIT,), (TRUNCATED, SPLIT)]))
    return Sample(ids, labels, f"data/ümlaut.jsonl:{draw(st.integers(1, 10**9))}", remarks)


def written(rows: list[Sample], place: Path | None, spill_bytes: int, num_ids: int = 1 << 16) -> Store:
    writer = StoreWriter(num_ids, CONTROLS, place, spill_bytes, prefix="data/")
    for sample in rows:
        writer.add(sample)
    return writer.store()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(samples(), max_size=20), spill_bytes=st.sampled_from([0, 1 << 30]), wide=st.booleans())
def test_samples_come_back(rows: list[Sample], spill_bytes: int, wide: bool) -> None:
    store = written(rows, None, spill_bytes, 70_000 if wide else 65_536)
    assert list(store) == rows
    assert store[1:3] == rows[1:3]
    assert len(store) == len(rows)
    assert lengths_of(store).tolist() == [len(sample.input_ids) for sample in rows]
    if rows:
        assert store[-1] == rows[-1]
        assert (figures_of(store, CONTROLS) == figures_of(rows, CONTROLS)).all()
    with pytest.raises(IndexError):
        store[len(rows)]


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(samples(), min_size=1, max_size=20))
def test_figures_by_hand(rows: list[Sample]) -> None:
    figures = figures_of(written(rows, None, 1 << 30), CONTROLS)
    for figure, sample in zip(figures, rows, strict=True):
        labels = [*sample.labels, IGNORED]
        assert figure["learned"] == sum(label != IGNORED for label in labels)
        assert figure["ends"] == sum(
            labels[i] in CONTROLS and labels[i + 1] == IGNORED for i in range(len(labels) - 1)
        )
    keys = [(tuple(sample.input_ids), tuple(sample.labels)) for sample in rows]
    later, first = repeats(figures["key"])
    assert later.tolist() == [i for i, key in enumerate(keys) if key in keys[:i]]
    assert first.tolist() == [keys.index(keys[i]) for i in later]


def test_a_directory_is_opened_again(tmp_path: Path) -> None:
    rows = [Sample([n, n + 1, 7], [IGNORED, n + 1, 7], f"data/{n}") for n in range(300)]
    made = written(rows, tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(COLUMNS)
    again = Store.opened(tmp_path, made.token_dtype.str, made.remarks, "elsewhere/")
    assert [sample.input_ids for sample in again] == [sample.input_ids for sample in rows]
    assert again[4].where == "elsewhere/4"
    assert made.sizes() == {name: (tmp_path / name).stat().st_size for name in COLUMNS}
    part = chosen(again, np.asarray([5, 2, 5]))
    assert [sample.input_ids[0] for sample in part] == [5, 2, 5]
    assert lengths_of(part).tolist() == [3, 3, 3]
    assert (figures_of(part, CONTROLS) == figures_of(again, CONTROLS)[[5, 2, 5]]).all()


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    store = written([Sample([1, 2], [IGNORED, 2], "data/1")], tmp_path, 0)
    os.truncate(tmp_path / "tokens", 1)
    with pytest.raises(StorageError, match="tokens"):
        store[0]


def test_samples_that_learn_other_tokens_are_not_equal() -> None:
    """The same ids with the same last learned token, from another begin on."""
    rows = [Sample.of([1, 2, 3, 4], [(begin, 4)]) for begin in (1, 2, 2)]
    later, first = repeats(figures_of(written(rows, None, 1 << 30), CONTROLS)["key"])
    assert (later.tolist(), first.tolist()) == ([2], [1])


@pytest.mark.parametrize("num_ids", [1 << 16, (1 << 16) + 1, 256_000])
def test_the_largest_id_of_a_vocabulary_comes_back(num_ids: int) -> None:
    row = Sample.of([1, num_ids - 1, num_ids - 1], [(1, 3)])
    assert written([row], None, 1 << 30, num_ids)[0] == row
