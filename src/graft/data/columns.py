"""Which column of a file plays which part: `data.columns`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from graft.config import did_you_mean
from graft.data.readers.rows import Refuse, Row
from graft.errors import ConfigError, DataError

OPTIONAL = ("system", "tools", "history", "input")
"""Parts that a row may be without."""
PARTS = (
    *("prompt", "completion", "text", "messages", "conversations", "instruction", "output"),
    *("chosen", "rejected", "label"),
    *OPTIONAL,
)
"""What columns are called where nothing maps them."""


def check_parts(columns: Mapping[str, str]) -> None:
    """Refuse a map with a part that does not exist, or with one column for two parts.

    Raises:
        ConfigError: It is such a map.
    """
    for part, column in columns.items():
        if part not in PARTS:
            raise ConfigError(
                f"data.columns: {part!r} is no part of a row",
                where="data.columns",
                fix=f"{did_you_mean(part, PARTS)} The part stands left, the file's column right",
            )
        if list(columns.values()).count(column) > 1:
            raise ConfigError(
                f"data.columns: column {column!r} is given two parts",
                where="data.columns",
                fix="keep one of them",
            )


def renamed(rows: Iterable[Row], columns: Mapping[str, str], where: str, refuse: Refuse) -> Iterator[Row]:
    """Rows whose columns are called by their parts.

    A column that has the name of a part which another column plays is left out.

    Args:
        rows: As the file has them.
        columns: The file's column for each part.
        where: The file, for an error about all its rows.
        refuse: Receives rows without one of the columns; those of `OPTIONAL` parts may be missing.

    Yields:
        The rows.

    Raises:
        DataError: `refuse` raises it; or the file has plain texts, or no row has an optional part's column.
    """
    unseen = {part: column for part, column in columns.items() if part in OPTIONAL}
    names: list[str] = []
    for row in rows:
        value = row.value
        if isinstance(value, str):
            raise DataError(
                "a plain text has no columns", where=row.where, fix="leave out data.columns, or give rows"
            )
        names = names or list(value)
        part = next((part for part in columns if part not in OPTIONAL and columns[part] not in value), None)
        if part is not None:
            refuse(_absent(part, columns[part], list(value), row.where), row_text(value))
            continue
        found = {part: value[column] for part, column in columns.items() if column in value}
        for part in found:
            unseen.pop(part, None)
        taken = {*columns, *columns.values()}
        yield Row(found | {name: cell for name, cell in value.items() if name not in taken}, row.where)
    for part, column in unseen.items():
        if names:
            error = _absent(part, column, names, where)
            raise error


def check_used(columns: Mapping[str, str], unused: Iterable[str], format: str, where: str) -> None:
    """Refuse a map for a part that rows of this format do not have.

    Args:
        columns: The map.
        unused: Columns of the rows that have no part.
        format: What the rows were taken for.
        where: The file.

    Raises:
        DataError: A mapped column is among the unused ones.
    """
    part = next((part for part in unused if part in columns), None)
    if part is not None:
        raise DataError(
            f"data.columns gives {part!r} (column {columns[part]!r}), which {format} rows do not have",
            where=where,
            fix="name the format with data.format, or take the part out of data.columns",
        )


def row_text(value: object) -> str:
    """A row as it would stand in a JSON lines file; what JSON lacks as Python writes it."""
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)


def _absent(part: str, column: str, names: list[str], where: str) -> DataError:
    return DataError(
        f"the row has no column {column!r}, which data.columns gives for {part!r}",
        where=where,
        fix=did_you_mean(column, names),
    )
