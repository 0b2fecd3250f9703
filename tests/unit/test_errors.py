"""Every error says what, where and how to mend it, and survives pickling."""

from __future__ import annotations

import pickle

import pytest

from graft import errors

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GraftError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_message_has_what_where_fix(kind: type[errors.GraftError]) -> None:
    told = str(kind("rank = -1", where="adapter.rank, run.yaml line 3", fix="use 1 or more"))
    assert told.splitlines() == [
        "rank = -1",
        "  where: adapter.rank, run.yaml line 3",
        "  fix:   use 1 or more",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_keeps_every_field(kind: type[errors.GraftError]) -> None:
    error = kind("what", where="where", fix="fix")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is kind
    assert (twin.what, twin.where, twin.fix, str(twin)) == ("what", "where", "fix", str(error))


def test_nested_problems_survive_pickling() -> None:
    error = errors.ConfigError(
        "2 problems", problems=[errors.ConfigError("a"), errors.ConfigError("b", fix="c")]
    )
    twin = pickle.loads(pickle.dumps(error))
    assert [str(problem) for problem in twin.problems] == ["a", "b\n  fix:   c"]


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.ModelError, ValueError),
        (errors.QuantError, ValueError),
        (errors.TargetError, ValueError),
        (errors.FingerprintError, errors.AdapterError),
        (errors.AdapterError, ValueError),
        (errors.CheckpointError, RuntimeError),
        (errors.StorageError, OSError),
        (errors.StopRequested, RuntimeError),
    ],
)
def test_kinds_are_also_pythons_own(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


def test_exit_codes() -> None:
    assert errors.DataError("x").exit_code == 2
    assert errors.StopRequested("x").exit_code == 3
