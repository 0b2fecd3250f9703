"""The error tree of graft: each error says what happened, where, and how to fix it.

GraftError
├── ConfigError        (ValueError)    a field, flag or file of the configuration; may hold several problems
├── DataError          (ValueError)    a row, a file or a template of the training data
├── ModelError         (ValueError)    a base model that cannot be loaded or used as asked
├── QuantError         (ValueError)    a tensor or a setting that cannot be quantized
├── TargetError        (ValueError)    target_modules that select nothing, or not what was meant
├── AdapterError       (ValueError)    an adapter that cannot be attached, loaded, saved or merged
│   └── FingerprintError               ... because it belongs to another base model
├── TrainingError      (RuntimeError)  a run that cannot go on
│   └── CheckpointError                ... because its saved state is missing, damaged or does not match
├── StorageError       (OSError)       a file or directory that cannot be read or written
└── StopRequested      (RuntimeError)  a run that stopped on request, with its state saved
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class GraftError(Exception):
    """Something that the user can understand and mend.

    Args:
        what: What happened, with the value that caused it.
        where: The file, line, field, tensor or row.
        fix: What to do about it: the closest name, a command to run.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by fields, so that an error survives the trip from a worker process."""
        return _rebuild, (type(self), self.__dict__)


def _rebuild(kind: type[GraftError], fields: dict[str, Any]) -> GraftError:
    error = kind.__new__(kind, fields["what"])
    error.__dict__.update(fields)
    return error


class ConfigError(GraftError, ValueError):
    """One or more problems in a configuration, all told at once.

    Args:
        what: What is wrong, or a summary where there are several problems.
        problems: The single problems, where there are several.
    """

    def __init__(
        self, what: str, *, where: str = "", fix: str = "", problems: Sequence[ConfigError] = ()
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if not self.problems:
            return super().__str__()
        return "\n".join([self.what, *(f"- {problem}" for problem in self.problems)])


class DataError(GraftError, ValueError):
    """A row, a file or a template of the training data cannot be used."""


class ModelError(GraftError, ValueError):
    """A base model cannot be loaded or used as asked."""


class QuantError(GraftError, ValueError):
    """A tensor or a setting cannot be quantized."""


class TargetError(GraftError, ValueError):
    """target_modules select nothing, or something that cannot carry an adapter."""


class AdapterError(GraftError, ValueError):
    """An adapter cannot be attached, loaded, saved or merged."""


class FingerprintError(AdapterError):
    """An adapter belongs to another base model than the one given."""


class TrainingError(GraftError, RuntimeError):
    """A training run cannot start or cannot go on."""


class CheckpointError(TrainingError):
    """The saved state of a run is missing, damaged or belongs to another run."""


class StorageError(GraftError, OSError):
    """A file or directory cannot be read or written."""


class StopRequested(GraftError, RuntimeError):  # noqa: N818 - not an error: the user asked for it
    """A run stopped because it was asked to; its state is saved."""

    exit_code = 3
