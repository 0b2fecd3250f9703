"""Training data and the data that a model is measured with: read apart, or one held out of the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graft.data.config import DataConfig
from graft.data.filters.cleaning import Cleaning
from graft.data.held import chosen, figures_of, held, lengths_of
from graft.data.masking import Encoder
from graft.data.mixing import Joined, Mixture, shares
from graft.data.prepare import Dataset, count_samples, make_encoder, prepare
from graft.data.quarantine import Quarantine
from graft.data.report import Report, joined_report, num_rows, show_sample
from graft.data.samples import Kind, Sample
from graft.data.shuffling import key_of, spread
from graft.data.sources import Source
from graft.errors import ConfigError, DataError


class Read(Protocol):
    """What makes samples of a source, as `prepare` does."""

    def __call__(
        self,
        source: Source,
        tokenizer: Any,
        config: DataConfig,
        split: str = "train",
        quarantine: Quarantine | None = None,
        cleaning: Cleaning | None = None,
    ) -> Dataset:
        """Read a source and encode it."""
        ...


def prepare_splits(
    tokenizer: Any,
    config: DataConfig,
    *,
    seed: int = 0,
    read: Read = prepare,
    kind: Kind = "text",
    cleaning: Cleaning | None = None,
    given: Mapping[str, Source] | None = None,
    quarantine: Quarantine | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Prepare the training data and, where the configuration asks for it, the evaluation data.

    Args:
        tokenizer: A fast tokenizer of transformers.
        config: Must name `train`, or the files of `mix`.
        seed: Decides what `eval_fraction` holds out.
        read: What makes samples of a file.
        kind: What samples are. The evaluation data of texts with a class can be read only after the training
            data, which is then not compared with it row by row; equal samples are counted afterwards.
        cleaning: What rows pass through; own filters if left out.
        given: Rows from Python as "train" and "eval", in the place of what the configuration names.
        quarantine: Receives each row that is left out under skip_invalid.

    Raises:
        DataError: As `prepare`; or no training data is named.
        StorageError: A file cannot be read.
    """
    if config.train is None and not config.mix:
        raise DataError("no training data is named", where="data.train", fix="give --data FILE or data.train")
    encoder, given = make_encoder(tokenizer, config), given or {}
    size, train_first = 2 if kind == "pair" else 1, kind == "class"
    cleaning = cleaning or Cleaning(config)

    def held_out() -> Dataset:
        assert config.eval is not None
        return read(given.get("eval", config.eval), encoder, config, "eval", quarantine, cleaning)

    # Training rows are compared with the evaluation data, which comes first where it can.
    measured = None if train_first or config.eval is None else held_out()
    if train_first:
        _check_train_first(config)
    if config.mix:
        parts = {path: read(path, encoder, config, "train", quarantine, cleaning) for path in config.mix}
        train = mixed(parts, config, seed=seed, size=size)
    else:
        source = given.get("train", str(config.train))
        train = read(source, encoder, config, "train", quarantine, cleaning)
    if config.eval is not None:
        measured = measured or held_out()
        compared = cleaning.compares and not train_first
        found = (
            cleaning.num_eval if compared else count_overlap(train.samples, measured.samples, encoder, size)
        )
        tell_overlap(measured.report, found)
        return train, measured
    if config.eval_fraction:
        return split_eval(train, config.eval_fraction, seed, encoder, size=size)
    return train, None


def _check_train_first(config: DataConfig) -> None:
    usual = DataConfig()
    for name in ("mix", "overlap", "overlap_by", "prompt_template"):
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(
                f"data.{name} does not act on texts with a class", where=f"data.{name}", fix="leave it out"
            )


def mixed(parts: Mapping[str, Dataset], config: DataConfig, *, seed: int = 0, size: int = 1) -> Dataset:
    """Several files as one data set whose epochs have the shares that the configuration asks for.

    Args:
        parts: Each file's own, by path.
        config: Weights, unit and temperature.
        seed: Decides the order.
        size: So many samples after one another belong together.
    """
    lengths = {path: lengths_of(part.samples) for path, part in parts.items()}
    sizes = {
        path: int(tokens.sum()) if config.mix_by == "tokens" else tokens.size // size
        for path, tokens in lengths.items()
    }
    wanted = shares(config.mix, sizes, config.mix_temperature)
    mixture = Mixture(lengths, wanted, by=config.mix_by, seed=seed, shuffle=config.shuffle, size=size)
    digest = hashlib.sha256()
    for path, part in parts.items():
        digest.update(f"{part.digest} {wanted[path]!r}\n".encode())
    report = joined_report([part.report for part in parts.values()])
    told = [f"mixture by {config.mix_by}: {source.describe()}" for source in mixture.sources()]
    report.notes = told + report.notes
    samples = Joined([held(part.samples) for part in parts.values()], mixture)
    return Dataset(samples, report, digest.hexdigest())


def tell_overlap(report: Report, count: int) -> None:
    """Write into the report of the evaluation data how many of its rows are also in the training data."""
    report.num_overlap = count
    if count:
        shared = f"{count:,} of {num_rows(report.num_used)}"
        report.notes.append(f"{shared} {'is' if count == 1 else 'are'} also in the training data")


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
    ranks = _ranks(_keys(dataset.samples, encoder, size), seed)
    wanted = max(1, round(fraction * len(ranks)))
    last = np.partition(ranks, wanted - 1)[wanted - 1]
    held_out = ranks <= last
    if held_out.all():
        raise DataError(
            f"{len(np.unique(ranks))} different samples are too few to hold out {fraction:.0%}",
            where=dataset.report.path,
            fix="give an evaluation file, or more rows",
        )
    return (
        _part(dataset, ~held_out, encoder, size, f"kept {{}} of {len(ranks)} samples, seed {seed}"),
        _part(dataset, held_out, encoder, size, f"held out {{}} of {len(ranks)} samples, seed {seed}"),
    )


def _part(dataset: Dataset, wanted: NDArray[np.bool_], encoder: Encoder, size: int, note: str) -> Dataset:
    units = np.flatnonzero(wanted)
    samples = chosen(dataset.samples, (units[:, None] * size + np.arange(size)).reshape(-1))
    told = dataset.report
    report = replace(
        told,
        rejected=list(told.rejected),
        places={kind: list(places) for kind, places in told.places.items()},
        notes=[*told.notes, note.format(len(units))],
    )
    count_samples(samples, encoder, report, size)
    if not dataset.labels:
        report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
    return replace(dataset, samples=samples, report=report)


def count_overlap(
    train: Sequence[Sample], held_out: Sequence[Sample], encoder: Encoder, size: int = 1
) -> int:
    """Units of `size` samples of the second that are, token by token, also in the first."""
    known, asked = (_keys(samples, encoder, size) for samples in (train, held_out))
    # Most are told apart by the first 64 bits alone.
    maybe = asked[np.isin(asked[:, 0], known[:, 0])]
    same = {row.tobytes() for row in known[np.isin(known[:, 0], maybe[:, 0])]}
    return sum(row.tobytes() in same for row in maybe)


def _keys(samples: Sequence[Sample], encoder: Encoder, size: int) -> NDArray[np.uint64]:
    """(units, 2 x size) digests of the samples of each unit."""
    keys: NDArray[np.uint64] = figures_of(samples, encoder.text.control_ids)["key"].reshape(-1, 2 * size)
    return np.ascontiguousarray(keys)


def _ranks(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A number for each unit that follows from the seed and what it holds, and is as good as random."""
    ranks = np.full(len(keys), key_of("held out", seed), dtype=np.uint64)
    for word in keys.T:
        ranks = spread(ranks ^ word)
    return ranks
