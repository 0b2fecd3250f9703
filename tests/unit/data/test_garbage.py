"""The collector rests only while it is asked to, and only where nobody else had asked."""

from __future__ import annotations

import gc

import pytest

from graft.data.garbage import only_new_garbage


def test_old_objects_are_set_aside_and_given_back() -> None:
    assert gc.get_freeze_count() == 0
    with only_new_garbage():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_they_are_given_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), only_new_garbage():
        raise ValueError("inside")
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_set_aside_stays() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with only_new_garbage():
            assert gc.get_freeze_count() == count
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
