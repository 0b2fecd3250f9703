"""Rows of a data set on the Hugging Face hub, streamed; needs the `datasets` package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graft.config import did_you_mean
from graft.data.readers.arrow_files import plain
from graft.data.readers.rows import Refuse, Row, check_text
from graft.errors import DataError, StorageError

PREFIX = "hub:"
_NAME = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@:\s]+))?(?:@(?P<revision>\S+))?$")


def is_hub(path: str) -> bool:
    """Whether a path names a data set on the hub: hub:owner/name, hub:owner/name:config, ...@revision."""
    return path.startswith(PREFIX)


def read_hub(path: str, splits: Sequence[str], refuse: Refuse) -> Iterator[Row]:
    """Read a split of a data set.

    Args:
        path: "hub:owner/name", "hub:owner/name:config", either with "@revision".
        splits: Names of the split; the first one that the data set has is read.
        refuse: Receives rows that cannot be read.

    Yields:
        The rows, with "hub:owner/name:row" counted from 1.

    Raises:
        DataError: `refuse` raises it; or the name is malformed, there is no such data set, configuration or
            split, or `datasets` is not installed.
        StorageError: The hub cannot be reached.

    Cost: one row at a time; nothing is kept on the disk but what `datasets` itself caches.
    """
    found = _NAME.match(path)
    if found is None:
        raise DataError("not the name of a data set", where=path, fix="hub:owner/name, hub:owner/name:config")
    stream = _open(path, found["name"], found["config"], found["revision"], splits)
    number = 0
    rows = iter(stream)
    while True:
        with _telling(path):
            value = next(rows, None)
        if value is None:
            return
        number += 1
        where = f"{path}:{number}"
        value = plain(value)
        try:
            check_text(value, where)
        except DataError as error:
            refuse(error, repr(value))
            continue
        yield Row(value, where)


def _open(path: str, name: str, config: str | None, revision: str | None, splits: Sequence[str]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data sets of the hub need the package datasets, which is not installed",
            where=path,
            fix="pip install 'graft[datasets]'",
        ) from error
    with _telling(path):
        known = datasets.get_dataset_split_names(name, config, revision=revision)
    split = next((split for split in splits if split in known), None)
    if split is None:
        raise DataError(
            f"the data set has no split {splits[0]!r}; it has {', '.join(map(repr, known)) or 'none'}",
            where=path,
            fix=did_you_mean(splits[0], known),
        )
    with _telling(path):
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)


@contextmanager
def _telling(path: str) -> Iterator[None]:
    # Tells errors of `datasets` and of the network as ours.
    try:
        yield
    except ValueError as error:
        raise DataError(str(error).partition("\n")[0], where=path, fix="check the name") from error
    except OSError as error:
        raise StorageError(
            "the hub cannot be reached, or has no such data set: "
            + (str(error).partition("\n")[0] or type(error).__name__),
            where=path,
            fix="check the name and the network; a data set on this machine is given by its path",
        ) from error
