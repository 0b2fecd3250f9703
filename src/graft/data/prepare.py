"""From a file to samples and a report, before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn

from graft.data.config import DataConfig
from graft.data.formats import Detected, Example, detect, to_example
from graft.data.masking import Encoder
from graft.data.report import Report, show_sample
from graft.data.samples import (
    CUT_LEFT,
    IGNORED,
    OLDER_CUT,
    PARTED,
    SPLIT,
    TRUNCATED,
    Rejected,
    Sample,
)
from graft.data.sources import Row, read_rows
from graft.data.templates import read_template
from graft.data.turns import Choice
from graft.errors import DataError

_NAMED = 3
"""Refused rows that an error names."""
_SHOWN = 40
"""Unknown characters that a note shows."""


@dataclass(frozen=True)
class Dataset:
    """Samples ready for a loader.

    Attributes:
        samples: In the order of their rows.
        report: What was read and what became of it.
        digest: SHA-256 over the content of the rows, the same for the same rows in another encoding or
            with other line ends.
        labels: The classes by number, of texts with a class.
    """

    samples: list[Sample]
    report: Report
    digest: str
    labels: tuple[str, ...] = ()


Read = Callable[[str, Any, DataConfig, str], Dataset]
"""What makes samples of a file: its path, an encoder, the settings, "train" or "eval"."""


def make_encoder(tokenizer: Any, config: DataConfig) -> Encoder:
    """The encoder that a configuration asks for; also turns prompts into ids for generation.

    Raises:
        DataError: The tokenizer is not a fast one, or the template file is no template.
        StorageError: The template file cannot be read.
    """
    source = read_template(config.chat_template) if config.chat_template else None
    choice = Choice(tuple(config.train_on_roles), config.train_on_last_turn)
    return Encoder(tokenizer, chat_template=source, loss_on=config.loss_on, choice=choice)


def prepare(path: str, tokenizer: Any, config: DataConfig, split: str = "train") -> Dataset:
    """Read a file and encode it.

    Args:
        path: The file or directory.
        tokenizer: A fast tokenizer of transformers, or an `Encoder`.
        config: Format, length, template and what to do with bad rows.
        split: "train" or "eval": which file of a directory, and what errors call it.

    Raises:
        DataError: A row is wrong (unless skip_invalid), or no row can be learned from; names file and line.
        StorageError: The file cannot be read.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else make_encoder(tokenizer, config)
    rows, report = read_file(path, config, split)
    detected = detect(rows, config.format)
    report.format, report.reason = detected.format, detected.reason
    examples = _examples(rows, detected, encoder, None if config.skip_invalid else _stop, report)
    samples = _encode(examples, encoder, config, report)
    if not samples:
        refuse_all(path, report.rejected)
    count_samples(samples, encoder, report)
    _note(report, rows, detected, encoder)
    report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
    return Dataset(samples, report, digest_of(rows))


def read_file(path: str, config: DataConfig, split: str) -> tuple[list[Row], Report]:
    """The rows of a file, and a report that says so far how many there are and which cannot be read.

    Raises:
        DataError: A row cannot be read (unless skip_invalid), or there is none.
        StorageError: The file cannot be read.
    """
    invalid: list[DataError] = []
    reading = read_rows(path, split=split, on_invalid=invalid.append if config.skip_invalid else None)
    rows = list(islice(reading, config.limit))
    rejected = [(error.where, error.what) for error in invalid]
    if not rows:
        refuse_all(path, rejected)
    return rows, Report(path, "", "", num_rows=len(rows) + len(invalid), rejected=rejected)


def prepare_splits(
    tokenizer: Any, config: DataConfig, *, seed: int = 0, read: Read = prepare, size: int = 1
) -> tuple[Dataset, Dataset | None]:
    """Prepare the training data and, where the configuration asks for it, the evaluation data.

    Args:
        tokenizer: A fast tokenizer of transformers.
        config: Must name `train`.
        seed: Decides what `eval_fraction` holds out.
        read: What makes samples of a file.
        size: So many samples after one another belong together.

    Raises:
        DataError: As `prepare`; or no training data is named.
        StorageError: A file cannot be read.
    """
    if config.train is None:
        raise DataError("no training data is named", where="data.train", fix="give --data FILE or data.train")
    encoder = make_encoder(tokenizer, config)
    train = read(config.train, encoder, config, "train")
    if config.eval is not None:
        held_out = read(config.eval, encoder, config, "eval")
        held_out.report.num_overlap = count_overlap(train.samples, held_out.samples, size)
        if held_out.report.num_overlap:
            shared = f"{held_out.report.num_overlap} of {len(held_out.samples) // size} samples"
            held_out.report.notes.append(f"{shared} are also in the training data")
        return train, held_out
    if config.eval_fraction:
        return split_eval(train, config.eval_fraction, seed, encoder, size=size)
    return train, None


def split_eval(
    dataset: Dataset, fraction: float, seed: int, encoder: Encoder, *, size: int = 1
) -> tuple[Dataset, Dataset]:
    """Hold out a share of the samples for evaluation.

    Which ones follows from the seed and each sample's own content, so that adding rows moves no others and
    equal samples stay on one side.

    Args:
        dataset: What to split.
        fraction: Share to hold out, in (0, 1); at least one sample is.
        seed: Another seed holds out others.
        encoder: Counts again what each part has.
        size: So many samples after one another stay together.

    Returns:
        The training part and the evaluation part.

    Raises:
        DataError: The samples are all equal, or there is only one.
    """
    units = _units(dataset.samples, size)
    keys = [hashlib.sha256(str(seed).encode() + b"".join(map(_key, unit))).digest() for unit in units]
    wanted = max(1, round(fraction * len(keys)))
    chosen: set[bytes] = set()
    ranked = sorted(keys)
    for key in ranked[:wanted]:
        chosen.add(key)
    if ranked[-1] in chosen:
        raise DataError(
            f"{len(set(keys))} different samples are too few to hold out {fraction:.0%}",
            where=dataset.report.path,
            fix="give an evaluation file, or more rows",
        )
    parts = []
    for held_out in (False, True):
        kept = [unit for unit, key in zip(units, keys, strict=True) if (key in chosen) == held_out]
        samples = [sample for unit in kept for sample in unit]
        report = replace(
            dataset.report, rejected=list(dataset.report.rejected), notes=list(dataset.report.notes)
        )
        report.notes.append(
            f"{'held out' if held_out else 'kept'} {len(kept)} of {len(keys)} samples, seed {seed}"
        )
        count_samples(samples, encoder, report)
        if not dataset.labels:
            report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
        parts.append(replace(dataset, samples=samples, report=report))
    return parts[0], parts[1]


def count_overlap(train: Sequence[Sample], held_out: Sequence[Sample], size: int = 1) -> int:
    """Samples of the second (in units of `size`) that are, token by token, also in the first."""
    known = {tuple(map(_key, unit)) for unit in _units(train, size)}
    return sum(tuple(map(_key, unit)) in known for unit in _units(held_out, size))


def _units(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[begin : begin + size] for begin in range(0, len(samples), size)]


def render_preview(dataset: Dataset, tokenizer: Any, n: int = 2) -> str:
    """The first samples as text, what is learned standing between ⟦ and ⟧."""
    shown = [f"{sample.where}\n{show_sample(sample, tokenizer)}" for sample in dataset.samples[:n]]
    return "\n\n".join(shown)


def _stop(error: DataError) -> None:
    raise error


def _examples(
    rows: list[Row], detected: Detected, encoder: Encoder, refuse: Any, report: Report
) -> Iterator[Example]:
    for row in rows:
        try:
            yield to_example(row, detected, chat=encoder.has_template)
        except DataError as error:
            if refuse is not None:
                refuse(error)
            report.rejected.append((error.where, error.what))


def _encode(
    examples: Iterator[Example], encoder: Encoder, config: DataConfig, report: Report
) -> list[Sample]:
    samples: list[Sample] = []
    remarks: Counter[str] = Counter()
    for found in encoder.encode(examples, config.max_length, config.on_overlong):
        if isinstance(found, Rejected):
            if found.invalid and not config.skip_invalid:
                raise DataError(found.reason, where=found.where, fix=found.fix)
            if config.on_overlong == "error" and found.overlong:
                raise DataError(
                    found.reason, where=found.where, fix="raise data.max_length, or truncate or drop"
                )
            report.rejected.append((found.where, found.reason))
            continue
        report.num_used += 1
        remarks.update(found[0].remarks)
        samples += found
    report.num_split = remarks[SPLIT] + remarks[PARTED]
    report.num_truncated = remarks[TRUNCATED] + remarks[CUT_LEFT] + remarks[OLDER_CUT]
    report.notes += [f"{num_rows(count)} {remark}" for remark, count in remarks.items()]
    return samples


def count_samples(samples: Sequence[Sample], encoder: Encoder, report: Report) -> None:
    """Write into a report what samples hold."""
    report.num_samples = len(samples)
    report.num_tokens = sum(len(sample.input_ids) for sample in samples)
    report.num_labelled_tokens = sum(len(s.labels) - s.labels.count(IGNORED) for s in samples)
    report.num_end_tokens = sum(_num_ends(sample, encoder) for sample in samples)
    report.longest_tokens = max(len(sample.input_ids) for sample in samples)
    report.num_duplicates = len(samples) - len({_key(sample) for sample in samples})


def _num_ends(sample: Sample, encoder: Encoder) -> int:
    following = [*sample.labels[1:], IGNORED]
    return sum(
        label in encoder.text.control_ids and after == IGNORED
        for label, after in zip(sample.labels, following, strict=True)
    )


def _note(report: Report, rows: Sequence[Row], detected: Detected, encoder: Encoder) -> None:
    if unused := detected.unused(rows[0]):
        report.notes.append(f"columns that are not used: {', '.join(unused)}")
    if detected.format in ("alpaca", "sharegpt") and not encoder.has_template:
        report.notes.append(
            "rows are written as '### Instruction:' and '### Response:', there being no chat template"
        )
    if report.num_duplicates:
        report.notes.append(f"{report.num_duplicates} samples are equal to an earlier one")
    if report.rejected:
        report.notes.append(
            f"{num_rows(len(report.rejected))} left out, the first: {': '.join(report.rejected[0])}"
        )
    lost = encoder.text.lost_characters(_characters([row.value for row in rows]))
    if lost:
        report.notes.append(f"characters that the tokenizer does not know: {' '.join(lost[:_SHOWN])}")


def _characters(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(_characters, parts))


def num_rows(count: int) -> str:
    """A count with its noun: "1 row", "2 rows"."""
    return "1 row" if count == 1 else f"{count:,} rows"


def refuse_all(path: str, rejected: list[tuple[str, str]]) -> NoReturn:
    """Say that no row of a file is left, and why.

    Raises:
        DataError: Always.
    """
    if not rejected:
        raise DataError("the file holds no rows", where=path, fix="check that it was written completely")
    named = "; ".join(f"{where}: {reason}" for where, reason in rejected[:_NAMED])
    more = f"; and {len(rejected) - _NAMED} more" if len(rejected) > _NAMED else ""
    raise DataError(
        f"none of {len(rejected)} rows can be learned from ({named}{more})",
        where=path,
        fix="raise data.max_length if answers are cut away; otherwise correct the rows",
    )


def _key(sample: Sample) -> bytes:
    return hashlib.blake2b(repr((sample.input_ids, sample.labels)).encode(), digest_size=16).digest()


def digest_of(rows: Sequence[Row]) -> str:
    """SHA-256 over the content of rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.value, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
