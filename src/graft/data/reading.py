"""Rows of a file to examples, one after another, and what is told about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NoReturn

from graft.data.columns import check_used, row_text
from graft.data.config import DataConfig
from graft.data.formats import Detected, Example, detect, to_example
from graft.data.masking import Encoder
from graft.data.quarantine import Quarantine
from graft.data.report import Report
from graft.data.sources import Row, Source, name_of, read_rows, source_bytes
from graft.errors import DataError

LOOKED_AT = 100
"""Rows that the format is read from."""
_WRITER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=repr)
_NAMED = 3
"""Refused rows that an error names."""
_SHOWN = 40
"""Unknown characters that a note shows."""


class LeftOut:
    """Where rows go that give no sample: into the report and, under skip_invalid, the quarantine.

    Args:
        config: Its skip_invalid.
        report: Of the file.
        quarantine: Where they are kept, if anywhere.
    """

    def __init__(self, config: DataConfig, report: Report, quarantine: Quarantine | None) -> None:
        self.report = report
        self._skip = config.skip_invalid
        self._quarantine = quarantine if config.skip_invalid else None

    def add(self, error: DataError, row: str | Row, *, invalid: bool = True, overlong: bool = False) -> None:
        """Leave a row out.

        Args:
            error: Why.
            row: The row, or its text.
            invalid: Whether it is wrong, rather than of no use: only a wrong row stops the reading.
            overlong: Whether it is left out only because it is too long.

        Raises:
            DataError: The row is wrong and skip_invalid is not set.
        """
        if invalid and not self._skip:
            raise error
        self.report.reject(error.where, error.what, overlong=overlong)
        if self._quarantine is not None:
            self._quarantine.add(error, row if isinstance(row, str) else row_text(row.value))


class Reading:
    """One way through a source: it counts rows, keeps what they said in a digest, and tells what was refused.

    Args:
        source: A file, a directory, a data set of the hub, or rows from Python.
        config: Which rows, and what happens to bad ones.
        split: "train" or "eval".
        encoder: Says which characters it does not know, and whether there is a chat template.
        quarantine: Receives each row that is left out under skip_invalid.

    Attributes:
        report: Filled as rows are drawn.
        left_out: Takes rows that give no sample.

    Raises:
        DataError: A row cannot be read (unless skip_invalid), from `rows` and `examples`.
        StorageError: The file cannot be read.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        split: str,
        encoder: Encoder,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.report = Report(name_of(source), "", "")
        self.left_out = LeftOut(config, self.report, quarantine)
        self._source = source
        self._config = config
        self._split = split
        self._digest = hashlib.sha256()
        self._encoder = encoder
        self._characters: set[str] = set()
        self._knows_ascii = not encoder.text.lost_characters(map(chr, range(128)))
        self._read_bytes = 0
        self._num_bytes = source_bytes(source, split)

    @property
    def share(self) -> float | None:
        """How much of the file is read, about; None where its size does not tell."""
        return min(self._read_bytes / self._num_bytes, 0.99) if self._num_bytes else None

    @property
    def digest(self) -> str:
        """SHA-256 over the content of the rows that were drawn."""
        return self._digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """The rows, up to the limit."""
        found = read_rows(
            self._source, split=self._split, on_invalid=self._refuse, columns=self._config.columns
        )
        for row in islice(found, self._config.limit):
            self.report.num_rows += 1
            line = line_of(row)
            self._read_bytes += len(line)
            self._digest.update(line)
            if not (self._knows_ascii and line.isascii()):
                self._look_at(row.value)
            yield row

    def _refuse(self, error: DataError, row: str) -> None:
        self.left_out.add(error, row)
        self.report.num_rows += 1

    def examples(self) -> Iterator[tuple[Row, Example]]:
        """The rows, each with the example that it is in the format that the first hundred have.

        Raises:
            DataError: There are no rows, or they fit no format.
        """
        rows = self.rows()
        first = list(islice(rows, LOOKED_AT))
        if not first:
            refuse_all(self.report)
        detected = detect(first, self._config.format, self._config.prompt_template)
        report = self.report
        report.format, report.reason = detected.format, detected.reason
        unused = detected.unused(first[0])
        check_used(self._config.columns, unused, detected.format, report.path)
        if unused:
            report.notes.append(f"columns that are not used: {', '.join(unused)}")
        if detected.format in ("alpaca", "sharegpt") and not self._encoder.has_template:
            report.notes.append(
                "rows are written as '### Instruction:' and '### Response:', there being no chat template"
            )
        return self._examples(chain(first, rows), detected)

    def lost_characters(self) -> list[str]:
        """Characters of the rows that the tokenizer does not know; the first forty."""
        return self._encoder.text.lost_characters(self._characters)[:_SHOWN]

    def _examples(self, rows: Iterable[Row], detected: Detected) -> Iterator[tuple[Row, Example]]:
        chat = self._encoder.has_template
        for row in rows:
            try:
                example = to_example(row, detected, chat=chat)
            except DataError as error:
                self.left_out.add(error, row)
                continue
            yield row, example

    def _look_at(self, value: Any) -> None:
        if isinstance(value, str):
            self._characters.update(value)
        elif isinstance(value, dict):
            for part in value.values():
                self._look_at(part)
        elif isinstance(value, list):
            for part in value:
                self._look_at(part)


def read_file(
    source: Source, config: DataConfig, split: str, encoder: Encoder, quarantine: Quarantine | None = None
) -> tuple[list[Row], Reading]:
    """All rows of a source, and what was told about them.

    Raises:
        DataError: A row cannot be read (unless skip_invalid), or there is none.
        StorageError: The file cannot be read.
    """
    reading = Reading(source, config, split, encoder, quarantine)
    rows = list(reading.rows())
    if not rows:
        refuse_all(reading.report)
    return rows, reading


def line_of(row: Row) -> bytes:
    """What a row says, in one way for all files that say the same."""
    return _WRITER.encode(row.value).encode() + b"\n"


def refuse_all(report: Report) -> NoReturn:
    """Say that no row of a file is left, and why.

    Raises:
        DataError: Always.
    """
    if not report.num_rejected:
        raise DataError(
            "there are no rows",
            where=report.path,
            fix="check that the file was written completely; a generator gives its rows only once",
        )
    named = "; ".join(f"{where}: {reason}" for where, reason in report.rejected[:_NAMED])
    more = f"; and {report.num_rejected - _NAMED} more" if report.num_rejected > _NAMED else ""
    raise DataError(
        f"none of {report.num_rejected} rows can be learned from ({named}{more})",
        where=report.path,
        fix="raise data.max_length if answers are cut away; otherwise correct the rows",
    )
