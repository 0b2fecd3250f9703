"""Training data and the data that a model is measured with: read apart, or one held out of the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graft.data.config import DataConfig
from graft.data.masking import Encoder
from graft.data.prepare import Dataset, count_samples, make_encoder, prepare
from graft.data.quarantine import Quarantine
from graft.data.report import MAX_PLACES, show_sample
from graft.data.samples import Sample
from graft.data.sources import Source
from graft.data.store import chosen, figures_of
from graft.errors import DataError


class Read(Protocol):
    """What makes samples of a source, as `prepare` does."""

    def __call__(
        self,
        source: Source,
        tokenizer: Any,
        config: DataConfig,
        split: str = "train",
        quarantine: Quarantine | None = None,
    ) -> Dataset:
        """Read a source and encode it."""
        ...


def prepare_splits(
    tokenizer: Any,
    config: DataConfig,
    *,
    seed: int = 0,
    read: Read = prepare,
    size: int = 1,
    given: Mapping[str, Source] | None = None,
    quarantine: Quarantine | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Prepare the training data and, where the configuration asks for it, the evaluation data.

    Args:
        tokenizer: A fast tokenizer of transformers.
        config: Must name `train`.
        seed: Decides what `eval_fraction` holds out.
        read: What makes samples of a file.
        size: So many samples after one another belong together.
        given: Rows from Python as "train" and "eval", in the place of what the configuration names.
        quarantine: Receives each row that is left out under skip_invalid.

    Raises:
        DataError: As `prepare`; or no training data is named.
        StorageError: A file cannot be read.
    """
    if config.train is None:
        raise DataError("no training data is named", where="data.train", fix="give --data FILE or data.train")
    encoder = make_encoder(tokenizer, config)
    given = given or {}
    train = read(given.get("train", config.train), encoder, config, "train", quarantine)
    if config.eval is not None:
        held_out = read(given.get("eval", config.eval), encoder, config, "eval", quarantine)
        tell_overlap(train, held_out, encoder, size)
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


def tell_overlap(train: Dataset, held_out: Dataset, encoder: Encoder, size: int = 1) -> None:
    """Write into the report of the evaluation data which of its samples are also in the training data."""
    found = np.flatnonzero(overlapping(train.samples, held_out.samples, encoder, size))
    report = held_out.report
    report.num_overlap = len(found)
    for index in found[:MAX_PLACES].tolist():
        report.place("overlap", held_out.samples[size * index].where)
    if len(found):
        shared = f"{len(found)} of {len(held_out.samples) // size} samples"
        report.notes.append(f"{shared} are also in the training data")


def overlapping(
    train: Sequence[Sample], held_out: Sequence[Sample], encoder: Encoder, size: int = 1
) -> NDArray[np.bool_]:
    """Of each unit of `size` samples of the second: whether it is, token by token, also in the first."""
    known, asked = (_keys(samples, encoder, size) for samples in (train, held_out))
    # Most are told apart by the first 64 bits alone.
    found = np.isin(asked[:, 0], known[:, 0])
    alike = known[np.isin(known[:, 0], asked[found, 0])]
    same = {row.tobytes() for row in alike}
    for index in np.flatnonzero(found).tolist():
        found[index] = asked[index].tobytes() in same
    return found


def _keys(samples: Sequence[Sample], encoder: Encoder, size: int) -> NDArray[np.uint64]:
    """(units, 2 x size) digests of the samples of each unit."""
    keys: NDArray[np.uint64] = figures_of(samples, encoder.text.control_ids)["key"].reshape(-1, 2 * size)
    return np.ascontiguousarray(keys)


def _ranks(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A number for each unit that follows from the seed and what it holds, and is as good as random."""
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    mixed = np.full(len(keys), start, dtype=np.uint64)
    for word in keys.T:
        mixed = _mixed(mixed ^ word)
    return mixed


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result hangs on every bit of the value (the finalizer of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
