"""From a file to samples and a report, before any model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from graft.data.ahead import in_order
from graft.data.cache import entry_for
from graft.data.config import DataConfig
from graft.data.formats import Example
from graft.data.listener import SILENT, Listener
from graft.data.masking import Encoder
from graft.data.reading import Reading, num_rows, refuse_all
from graft.data.report import MAX_PLACES, Report, show_sample
from graft.data.samples import SPLIT, TRUNCATED, Rejected, Sample
from graft.data.store import Store, StoreWriter, figures_of, repeats
from graft.data.templates import read_template
from graft.errors import DataError

CHUNK = 512
"""Rows that are encoded together."""
WORKERS = 2
"""Chunks that are encoded at a time: while one is in the tokenizer, Python has the other."""


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

    samples: Sequence[Sample]
    report: Report
    digest: str
    labels: tuple[str, ...] = ()


def make_encoder(tokenizer: Any, config: DataConfig) -> Encoder:
    """The encoder that a configuration asks for; also turns prompts into ids for generation.

    Raises:
        DataError: The tokenizer is not a fast one, or the template file is no template.
        StorageError: The template file cannot be read.
    """
    source = read_template(config.chat_template) if config.chat_template else None
    return Encoder(tokenizer, chat_template=source, loss_on=config.loss_on)


def prepare(
    path: str, tokenizer: Any, config: DataConfig, split: str = "train", *, listener: Listener = SILENT
) -> Dataset:
    """Read a file and encode it, row by row: rows are not kept, and samples go to files when they are many.

    Args:
        path: The file or directory.
        tokenizer: A fast tokenizer of transformers, or an `Encoder`.
        config: Format, length, template and what to do with bad rows.
        split: "train" or "eval": which file of a directory, and what errors call it.
        listener: Is told now and then how far it is.

    Raises:
        DataError: A row is wrong (unless skip_invalid), or no row can be learned from; names file and line.
        StorageError: The file cannot be read, or samples cannot be written.

    Memory: 4 bytes a sample where samples are in files, as they are beyond 64 MiB or in the cache.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else make_encoder(tokenizer, config)
    entry = entry_for(path, encoder, config, split)
    if entry is None:
        return Dataset(*_build(path, encoder, config, split, listener, None))
    with entry.held(listener):
        found = entry.open()
        if found is None:
            with entry.filled() as directory:
                entry.describe(directory, *_build(path, encoder, config, split, listener, directory))
            found = entry.open()
    assert found is not None
    return Dataset(*found)


def _build(
    path: str, encoder: Encoder, config: DataConfig, split: str, listener: Listener, directory: Path | None
) -> tuple[Store, Report, str]:
    reading = Reading(path, config, split, encoder)
    report = reading.report
    control_ids = encoder.text.control_ids
    num_ids = max(len(encoder.tokenizer), *(id + 1 for id in control_ids), 1)
    writer = StoreWriter(num_ids, control_ids, directory)
    for sample in _encoded(reading, encoder, config, listener):
        writer.add(sample, sample.where.removeprefix(path))
    if not writer.num_samples:
        refuse_all(report)
    samples = writer.store(path)
    count_samples(samples, encoder, report)
    _note(report, reading.lost_characters())
    report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
    return samples, report, reading.digest


def _encoded(reading: Reading, encoder: Encoder, config: DataConfig, listener: Listener) -> Iterator[Sample]:
    report, remarks = reading.report, Counter[str]()
    examples = reading.examples()
    chunks = iter(partial(_chunk, examples), [])
    tokens = 0

    def encode(chunk: list[Example]) -> list[list[Sample] | Rejected]:
        return list(encoder.encode(chunk, config.max_length, config.on_overlong))

    for encoded in in_order(encode, chunks, WORKERS):
        for found in encoded:
            if isinstance(found, Rejected):
                _reject(found, config, report)
                continue
            report.num_used += 1
            remarks.update(found[0].remarks)
            if TRUNCATED in found[0].remarks:
                report.place("truncated", found[0].where)
            yield from found
            tokens += sum(len(sample.input_ids) for sample in found)
        listener.preparing(report.num_rows, tokens, reading.share)
    listener.preparing(report.num_rows, tokens, 1.0)
    report.num_split, report.num_truncated = remarks[SPLIT], remarks[TRUNCATED]
    report.notes += [f"{num_rows(count)} {remark}" for remark, count in remarks.items()]


def _chunk(examples: Iterator[Example]) -> list[Example]:
    return list(islice(examples, CHUNK))


def _reject(found: Rejected, config: DataConfig, report: Report) -> None:
    if found.invalid and not config.skip_invalid:
        raise DataError(found.reason, where=found.where, fix=found.fix)
    if config.on_overlong == "error" and found.overlong:
        raise DataError(found.reason, where=found.where, fix="raise data.max_length, or truncate or drop")
    report.reject(found.where, found.reason, overlong=found.overlong)


def count_samples(samples: Sequence[Sample], encoder: Encoder, report: Report, size: int = 1) -> None:
    """Write into a report what samples hold.

    Args:
        samples: At least one.
        encoder: Knows which tokens are control tokens.
        report: Its counts of samples and tokens are replaced.
        size: So many samples after one another belong together and are counted as one where they are equal.
    """
    figures = figures_of(samples, encoder.text.control_ids)
    report.num_samples = len(samples)
    report.num_tokens = int(figures["tokens"].sum(dtype=np.int64))
    report.num_labelled_tokens = int(figures["learned"].sum(dtype=np.int64))
    report.num_end_tokens = int(figures["ends"].sum(dtype=np.int64))
    report.longest_tokens = int(figures["tokens"].max())
    later, first = repeats(figures["key"].reshape(-1, 2 * size))
    report.num_duplicates = len(later)
    pairs = zip(later[:MAX_PLACES].tolist(), first[:MAX_PLACES].tolist(), strict=True)
    report.places["duplicate"] = [
        f"{samples[size * index].where} = {samples[size * earlier].where}" for index, earlier in pairs
    ]


def _note(report: Report, lost: Sequence[str]) -> None:
    if report.num_duplicates:
        report.notes.append(f"{report.num_duplicates} samples are equal to an earlier one")
    if report.num_rejected:
        report.notes.append(
            f"{num_rows(report.num_rejected)} left out, the first: {': '.join(report.rejected[0])}"
        )
    if lost:
        report.notes.append(f"characters that the tokenizer does not know: {' '.join(lost)}")


def render_preview(dataset: Dataset, tokenizer: Any, n: int = 2) -> str:
    """The first samples as text, what is learned standing between ⟦ and ⟧."""
    shown = [f"{sample.where}\n{show_sample(sample, tokenizer)}" for sample in dataset.samples[:n]]
    return "\n\n".join(shown)
