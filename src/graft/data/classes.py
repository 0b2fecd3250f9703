"""Texts with a class: rows of "text" and "label" as samples whose last token carries the class.

The tokens of a sample are those that the tokenizer gives for the text, with no end-of-text token after them,
so that other tools that pool at the last token see the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from graft.config import closest
from graft.data.columns import check_used
from graft.data.config import DataConfig
from graft.data.examples import Pair, column_text
from graft.data.filters.cleaning import Cleaning
from graft.data.filters.content import Content, content_of
from graft.data.masking import Encoder
from graft.data.prepare import Dataset, count_samples, make_encoder
from graft.data.quarantine import Quarantine
from graft.data.reading import LeftOut, read_file, refuse_all
from graft.data.report import Report, num_rows
from graft.data.samples import IGNORED, Sample
from graft.data.sources import Row, Source
from graft.data.tokens import private_character
from graft.errors import DataError

FORMAT = "classification"
"""What a report calls such rows."""

MAX_LABELS = 1000
"""More different labels than this are taken for free text."""

CUT_LEFT = "cut at max_length, so that the begin of the text is not seen"
CUT = "cut at max_length, so that the end of the text is not seen"


class ClassReader:
    """Reads files of texts with labels; those of the training file are the classes of all files.

    Args:
        labels: The classes by number, where they are known already.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = tuple(labels)

    def __call__(
        self,
        source: Source,
        tokenizer: Any,
        config: DataConfig,
        split: str = "train",
        quarantine: Quarantine | None = None,
        cleaning: Cleaning | None = None,
    ) -> Dataset:
        """Read a source and encode it.

        Args:
            source: A file, a directory, a data set of the hub, or rows from Python.
            tokenizer: A fast tokenizer of transformers, or an `Encoder`.
            config: `on_overlong` cuts the end or the begin of a text, drops the row, or is an error.
            split: "train" or "eval".
            quarantine: Receives each row that is left out under skip_invalid.
            cleaning: As of `prepare`.

        Raises:
            ConfigError: A setting has nothing to act on.
            DataError: A text or a label is wrong (unless skip_invalid), a label is not among those of the
                training data, or there are fewer than two; names file and line.
            StorageError: The file cannot be read.
        """
        config.refuse_turns("a text with a class has no turns")
        config.refuse_cache()
        encoder = tokenizer if isinstance(tokenizer, Encoder) else make_encoder(tokenizer, config)
        rows, reading = read_file(source, config, split, encoder, quarantine)
        report = reading.report
        report.format, report.reason = FORMAT, "asked for by the task"
        left_out = reading.left_out
        cleaning = cleaning or Cleaning(config)
        good = list(cleaning.pass_on(split)(self._checked(rows, left_out), _content, report))
        if not self.labels:
            self.labels = _labels_of([label for _, _, label in good], report.path)
        samples = self._encode(good, encoder, config, left_out)
        if not samples:
            refuse_all(report)
        count_samples(samples, encoder, report)
        report.num_used = len(samples)
        unused = [name for name in rows[0].value if name not in ("text", "label")]
        check_used(config.columns, unused, FORMAT, report.path)
        self._note(samples, good, unused, encoder, report)
        return Dataset(samples, report, reading.digest, self.labels)

    def _checked(self, rows: Sequence[Row], left_out: LeftOut) -> list[tuple[Row, str, str]]:
        found = []
        for row in rows:
            try:
                text, label = _text(row), label_of(row)
                if self.labels and label not in self.labels:
                    near = closest(label, self.labels)
                    raise DataError(
                        f"label {label!r:.100} is not among the {len(self.labels)} of the training data",
                        where=row.where,
                        fix=f"did you mean {near!r}?" if near else f"one of: {', '.join(self.labels[:20])}",
                    )
                found.append((row, text, label))
            except DataError as error:
                left_out.add(error, row)
        return found

    def _encode(
        self, good: Sequence[tuple[Row, str, str]], encoder: Encoder, config: DataConfig, left_out: LeftOut
    ) -> list[Sample]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        encodings = encoder.text.encode([text for _, text, _ in good])
        samples = []
        for (row, text, label), encoding in zip(good, encodings, strict=True):
            ids = [*encoder.text.bos_ids, *encoding.ids]
            if not text.strip() or not ids:
                empty = DataError("nothing to learn from: the text is empty", where=row.where)
                left_out.add(empty, row, invalid=False)
                continue
            remarks: tuple[str, ...] = ()
            if len(ids) > config.max_length:
                reason = f"{len(ids):,} tokens, more than max_length {config.max_length:,}"
                if config.on_overlong == "error":
                    fix = "raise data.max_length, or truncate or drop"
                    raise DataError(reason, where=row.where, fix=fix)
                if config.on_overlong == "drop":
                    fix = "raise data.max_length, or truncate"
                    overlong = DataError(reason, where=row.where, fix=fix)
                    left_out.add(overlong, row, invalid=False, overlong=True)
                    continue
                ids, remarks = _cut(ids, len(encoder.text.bos_ids), config)
            classes = [IGNORED] * (len(ids) - 1) + [numbers[label]]
            samples.append(Sample(ids, classes, row.where, remarks))
        left_out.report.num_truncated = sum(bool(sample.remarks) for sample in samples)
        return samples

    def _note(
        self,
        samples: Sequence[Sample],
        good: Sequence[tuple[Row, str, str]],
        unused: Sequence[str],
        encoder: Encoder,
        report: Report,
    ) -> None:
        counts = Counter(sample.labels[-1] for sample in samples)
        shown = ", ".join(f"{self.labels[number]} {count:,}" for number, count in sorted(counts.items())[:20])
        report.notes.append(f"{len(self.labels)} labels: {shown}{', ...' if len(counts) > 20 else ''}")
        if report.num_truncated:
            cut = next(sample.remarks[0] for sample in samples if sample.remarks)
            report.notes.append(f"{num_rows(report.num_truncated)} {cut}")
        told = {text: label for _, text, label in good}
        if torn := len({text for _, text, label in good if told[text] != label}):
            report.notes.append(f"{torn} texts stand there under two labels or more")
        if unused:
            report.notes.append(f"columns that are not used: {', '.join(unused)}")
        if report.rejected:
            left, first = num_rows(report.num_rejected), ": ".join(report.rejected[0])
            report.notes.append(f"{left} left out, the first: {first}")
        report.preview = [
            f"{encoder.tokenizer.decode(sample.input_ids)} -> {self.labels[sample.labels[-1]]}"
            for sample in samples[:2]
        ]


def _content(checked: tuple[Row, str, str]) -> Content:
    row, text, label = checked
    return content_of(Pair(text, label, row.where))


def _cut(ids: list[int], head: int, config: DataConfig) -> tuple[list[int], tuple[str, ...]]:
    if config.on_overlong == "truncate_left":
        return [*ids[:head], *ids[len(ids) - config.max_length + head :]], (CUT_LEFT,)
    return ids[: config.max_length], (CUT,)


def label_of(row: Row) -> str:
    """The label of a row: a text, or a whole number, which is named by its digits.

    Raises:
        DataError: There is none, or it is something else.
    """
    value = row.value
    if not isinstance(value, dict) or "label" not in value:
        names = list(value) if isinstance(value, dict) else []
        near = closest("label", names)
        raise DataError(
            f"the row has no label; its columns are {', '.join(map(repr, names)) or 'none'}",
            where=row.where,
            fix=f"rename {near!r} to 'label'" if near else 'write {"text": "...", "label": "..."}',
        )
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise DataError(
            f"a label must be a text or a whole number, not {label!r:.60}",
            where=row.where,
            fix='write "label": "sports", or "label": 3',
        )
    return str(label)


def _text(row: Row) -> str:
    if isinstance(row.value, str):
        raise DataError(
            "a plain text file has no labels", where=row.where, fix='rows of {"text": "...", "label": "..."}'
        )
    text = column_text(row, "text")
    if char := private_character(text):
        raise DataError(
            f"the text holds the private character U+{ord(char):X}, which graft needs for itself",
            where=row.where,
            fix="remove the character",
        )
    return text


def _labels_of(labels: Sequence[str], path: str) -> tuple[str, ...]:
    """The different labels in a fixed order: numbers by size, texts by their letters.

    Raises:
        DataError: There are fewer than two, or so many that they are no classes.
    """
    known = set(labels)
    if len(known) < 2 and labels:
        raise DataError(
            f"every row has the label {labels[0]!r:.60}: there is nothing to tell apart",
            where=path,
            fix="give rows of at least two labels",
        )
    if len(known) > MAX_LABELS:
        raise DataError(
            f"{len(known):,} different labels, more than {MAX_LABELS:,}",
            where=path,
            fix="is 'label' the right column? Free answers are trained with --task generation",
        )
    whole = all(label.lstrip("-").isdecimal() and label.isascii() for label in known)
    return tuple(sorted(known, key=(lambda label: (int(label), label)) if whole else None))
