"""A file of unlike rows, each read by its own columns when the user says so."""

from __future__ import annotations

import pytest

from graft.data.formats import Conversation, Pair, Text, detect, to_example
from graft.data.sources import Row
from graft.errors import DataError

ROWS = [
    Row({"text": "Once."}, "rows:1"),
    Row({"prompt": "2+2=", "completion": "4"}, "rows:2"),
    Row({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "rows:3"),
]


def test_each_row_is_read_by_its_own_columns() -> None:
    detected = detect(ROWS, "mixed")
    assert [type(to_example(row, detected)) for row in ROWS] == [Text, Pair, Conversation]


def test_rows_are_not_mixed_unless_asked() -> None:
    detected = detect(ROWS)
    with pytest.raises(DataError, match="column"):
        [to_example(row, detected) for row in ROWS]


def test_a_row_of_no_known_kind_is_still_refused() -> None:
    with pytest.raises(DataError, match="fit no known format") as caught:
        to_example(Row({"speech": "Hi"}, "rows:9"), detect(ROWS, "mixed"))
    assert caught.value.where == "rows:9"


def test_unused_columns_are_told_for_the_kind_of_the_row() -> None:
    row = Row({"text": "Once.", "year": 1900}, "rows:1")
    assert detect(ROWS, "mixed").unused(row) == ["year"]
