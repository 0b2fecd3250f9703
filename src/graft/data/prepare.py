"""From a file to samples and a report, before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn

from graft.data.config import DataConfig
from graft.data.formats import Detected, Example, detect, to_example
from graft.data.masking import Encoder
from graft.data.report import Report, show_sample
from graft.data.samples import IGNORED, SPLIT, TRUNCATED, Rejected, Sample
from graft.data.sources import Row, read_rows
from graft.data.templates import read_template
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
    """

    samples: list[Sample]
    report: Report
    digest: str


def make_encoder(tokenizer: Any, config: DataConfig) -> Encoder:
    """The encoder that a configuration asks for; also turns prompts into ids for generation.

    Raises:
        DataError: The tokenizer is not a fast one, or the template file is no template.
        StorageError: The template file cannot be read.
    """
    source = read_template(config.chat_template) if config.chat_template else None
    return Encoder(tokenizer, chat_template=source, loss_on=config.loss_on)


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
    invalid: list[DataError] = []
    reading = read_rows(path, split=split, on_invalid=invalid.append if config.skip_invalid else None)
    rows = list(islice(reading, config.limit))
    if not rows:
        _refuse_all(path, [(error.where, error.what) for error in invalid])
    detected = detect(rows, config.format)
    report = Report(path, detected.format, detected.reason, num_rows=len(rows) + len(invalid))
    report.rejected = [(error.where, error.what) for error in invalid]
    examples = _examples(rows, detected, encoder, None if config.skip_invalid else _stop, report)
    samples = _encode(examples, encoder, config, report)
    if not samples:
        _refuse_all(path, report.rejected)
    _count(samples, encoder, report)
    _note(report, rows, detected, encoder)
    report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
    return Dataset(samples, report, _digest(rows))


def prepare_splits(tokenizer: Any, config: DataConfig, *, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """Prepare the training data and, where the configuration asks for it, the evaluation data.

    Args:
        tokenizer: A fast tokenizer of transformers.
        config: Must name `train`.
        seed: Decides what `eval_fraction` holds out.

    Raises:
        DataError: As `prepare`; or no training data is named.
        StorageError: A file cannot be read.
    """
    if config.train is None:
        raise DataError("no training data is named", where="data.train", fix="give --data FILE or data.train")
    encoder = make_encoder(tokenizer, config)
    train = prepare(config.train, encoder, config)
    if config.eval is not None:
        held_out = prepare(config.eval, encoder, config, "eval")
        held_out.report.num_overlap = count_overlap(train.samples, held_out.samples)
        if held_out.report.num_overlap:
            shared = f"{held_out.report.num_overlap} of {len(held_out.samples)} samples"
            held_out.report.notes.append(f"{shared} are also in the training data")
        return train, held_out
    if config.eval_fraction:
        return split_eval(train, config.eval_fraction, seed, encoder)
    return train, None


def split_eval(dataset: Dataset, fraction: float, seed: int, encoder: Encoder) -> tuple[Dataset, Dataset]:
    """Hold out a share of the samples for evaluation.

    Which ones follows from the seed and each sample's own content, so that adding rows moves no others and
    equal samples stay on one side.

    Args:
        dataset: What to split.
        fraction: Share to hold out, in (0, 1); at least one sample is.
        seed: Another seed holds out others.
        encoder: Counts again what each part has.

    Returns:
        The training part and the evaluation part.

    Raises:
        DataError: The samples are all equal, or there is only one.
    """
    keys = [hashlib.sha256(str(seed).encode() + _key(sample)).digest() for sample in dataset.samples]
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
        samples = [s for s, key in zip(dataset.samples, keys, strict=True) if (key in chosen) == held_out]
        report = replace(
            dataset.report, rejected=list(dataset.report.rejected), notes=list(dataset.report.notes)
        )
        report.notes.append(
            f"{'held out' if held_out else 'kept'} {len(samples)} of {len(keys)} samples, seed {seed}"
        )
        _count(samples, encoder, report)
        report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
        parts.append(Dataset(samples, report, dataset.digest))
    return parts[0], parts[1]


def count_overlap(train: Sequence[Sample], held_out: Sequence[Sample]) -> int:
    """Samples of the second that are, token by token, also in the first."""
    known = {_key(sample) for sample in train}
    return sum(_key(sample) in known for sample in held_out)


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
    report.num_split, report.num_truncated = remarks[SPLIT], remarks[TRUNCATED]
    report.notes += [f"{_rows(count)} {remark}" for remark, count in remarks.items()]
    return samples


def _count(samples: Sequence[Sample], encoder: Encoder, report: Report) -> None:
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
            f"{_rows(len(report.rejected))} left out, the first: {': '.join(report.rejected[0])}"
        )
    lost = encoder.text.lost_characters(_characters([row.value for row in rows]))
    if lost:
        report.notes.append(f"characters that the tokenizer does not know: {' '.join(lost[:_SHOWN])}")


def _characters(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(_characters, parts))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _refuse_all(path: str, rejected: list[tuple[str, str]]) -> NoReturn:
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


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.value, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
