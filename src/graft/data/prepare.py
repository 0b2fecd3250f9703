"""From a file to samples and a report, before any model is loaded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from graft.data.cache import Entry, entry_for
from graft.data.chat.templates import read_template
from graft.data.chat.turns import Choice
from graft.data.config import DataConfig
from graft.data.filters.cleaning import Cleaning
from graft.data.filters.content import Content, content_of
from graft.data.formats import Example
from graft.data.garbage import only_new_garbage
from graft.data.held import figures_of, repeats
from graft.data.listener import SILENT, Listener
from graft.data.masking import Encoder
from graft.data.quarantine import Quarantine
from graft.data.reading import LeftOut, Reading, refuse_all
from graft.data.report import Report, num_rows, show_sample
from graft.data.samples import CUT_LEFT, OLDER_CUT, PARTED, SPLIT, TRUNCATED, Rejected, Sample
from graft.data.sources import Row, Source, name_of
from graft.data.store import Store, StoreWriter
from graft.errors import DataError

WORKERS = 1
"""Threads in which texts are encoded while rows are read and rendered."""
TOLD_EVERY = 1_000
"""Rows."""
CUTS = (TRUNCATED, CUT_LEFT, OLDER_CUT)
"""Remarks of samples that lack a part of their row."""


Built = tuple[Store, Report, str]
"""Samples, what is told of them, and the digest of their rows."""
Build = Callable[[Quarantine | None, Path | None], Built]
"""Makes them: where rows go that are left out, and the directory of the samples."""


@dataclass(frozen=True)
class Dataset:
    """Samples ready for a loader.

    Attributes:
        samples: In the order of their rows.
        report: What was read and what became of it.
        digest: SHA-256 over the content of the rows, the same for the same rows in another encoding or
            with other line ends; of a mixture over those of its files and their shares.
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
    choice = Choice(tuple(config.train_on_roles), config.train_on_last_turn)
    return Encoder(tokenizer, chat_template=source, loss_on=config.loss_on, choice=choice, day=config.day)


def prepare(
    source: Source,
    tokenizer: Any,
    config: DataConfig,
    split: str = "train",
    quarantine: Quarantine | None = None,
    cleaning: Cleaning | None = None,
    *,
    listener: Listener = SILENT,
) -> Dataset:
    """Read a source and encode it, row by row: rows are not kept, and samples go to files when they are many.

    Args:
        source: A file, a directory, a data set of the hub, or rows from Python; see `read_rows`.
        tokenizer: A fast tokenizer of transformers, or an `Encoder`.
        config: Format, length, template and what to do with bad rows.
        split: "train" or "eval": which file of a directory, and what errors call it.
        quarantine: Receives each row that is left out under skip_invalid.
        cleaning: What training rows pass through, and evaluation rows are remembered in; own ones if left
            out.
        listener: Is told now and then how far it is.

    Raises:
        DataError: A row is wrong (unless skip_invalid), or no row can be learned from; names file and line.
        StorageError: The file cannot be read, or samples cannot be written.

    Memory: 4 bytes a sample where samples are in files, as they are beyond 64 MiB or in the cache.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else make_encoder(tokenizer, config)
    cleaning = cleaning or Cleaning(config)
    build = partial(_build, source, encoder, config, split, cleaning, listener)
    entry = entry_for(source, encoder, config, split, cleaning.comparisons())
    if entry is None:
        samples, report, digest = build(quarantine, None)
    else:
        again = partial(_send_through, source, encoder, config, split, cleaning)
        with entry.held(listener):
            samples, report, digest = _kept(entry, build, again, quarantine, cleaning)
    cleaning.seen.append(f"{split} {name_of(source)} {digest}")
    return Dataset(samples, report, digest)


def _kept(
    entry: Entry, build: Build, again: Callable[[], None], quarantine: Quarantine | None, cleaning: Cleaning
) -> Built:
    """What the cache has, or is given now; `again` sends the rows through the filters alone."""
    found = entry.open(quarantine)
    if found is not None:
        cleaning.pass_by(again, entry.num_eval())
        return found
    with entry.filled() as directory, Quarantine() as left_out:
        entry.describe(directory, *build(left_out, directory), left_out, cleaning.num_eval)
    found = entry.open(quarantine)
    assert found is not None
    return found


def _send_through(
    source: Source, encoder: Encoder, config: DataConfig, split: str, cleaning: Cleaning
) -> None:
    """Only compare the rows of a source with others."""
    reading = Reading(source, config, split, encoder)
    for _ in cleaning.pass_on(split)(reading.examples(), _content, reading.report):
        pass


def _content(read: tuple[Row, Example]) -> Content:
    return content_of(read[1])


def _build(
    source: Source,
    encoder: Encoder,
    config: DataConfig,
    split: str,
    cleaning: Cleaning,
    listener: Listener,
    quarantine: Quarantine | None,
    directory: Path | None,
) -> Built:
    cleaning.catch_up()
    reading = Reading(source, config, split, encoder, quarantine)
    report = reading.report
    examples = cleaning.pass_on(split)(reading.examples(), _content, report)
    control_ids = encoder.text.control_ids
    num_ids = max(len(encoder.tokenizer), *(id + 1 for id in control_ids), 1)
    writer = StoreWriter(num_ids, control_ids, directory, prefix=report.path)
    with only_new_garbage():
        for sample in _encoded(examples, reading, encoder, config, listener):
            writer.add(sample)
    if not writer.num_samples:
        refuse_all(report)
    samples = writer.store()
    count_samples(samples, encoder, report)
    _note(report, reading.lost_characters())
    report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
    return samples, report, reading.digest


def _encoded(
    examples: Iterator[tuple[Row, Example]],
    reading: Reading,
    encoder: Encoder,
    config: DataConfig,
    listener: Listener,
) -> Iterator[Sample]:
    report, remarks = reading.report, Counter[str]()
    waiting: deque[Row] = deque()
    drawn = _remembered(examples, waiting)
    tokens = 0
    for found in encoder.encode(drawn, config.max_length, config.on_overlong, workers=WORKERS):
        row = waiting.popleft()
        if isinstance(found, Rejected):
            _leave_out(found, row, config, reading.left_out)
            continue
        report.num_used += 1
        if found[0].remarks:
            remarks.update(found[0].remarks)
            if any(cut in found[0].remarks for cut in CUTS):
                report.place("truncated", found[0].where)
        yield from found
        tokens += sum(map(len, found))
        if not report.num_used % TOLD_EVERY:
            listener.preparing(report.num_rows, tokens, reading.share)
    listener.preparing(report.num_rows, tokens, 1.0)
    report.num_split = remarks[SPLIT] + remarks[PARTED]
    report.num_truncated = sum(remarks[cut] for cut in CUTS)
    report.notes += [f"{num_rows(count)} {remark}" for remark, count in remarks.items()]


def _remembered(examples: Iterator[tuple[Row, Example]], waiting: deque[Row]) -> Iterator[Example]:
    """The examples alone, whose rows wait until it is known what became of them."""
    for row, example in examples:
        waiting.append(row)
        yield example


def _leave_out(found: Rejected, row: Row, config: DataConfig, left_out: LeftOut) -> None:
    error = DataError(found.reason, where=found.where, fix=found.fix)
    if config.on_overlong == "error" and found.overlong:
        error.fix = "raise data.max_length, or truncate or drop"
        raise error
    left_out.add(error, row, invalid=found.invalid, overlong=found.overlong)


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
    report.num_duplicates = len(repeats(figures["key"].reshape(-1, 2 * size))[0])


def _note(report: Report, lost: Sequence[str]) -> None:
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
