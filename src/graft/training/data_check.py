"""A run's data as the run would see it, before any training: the tokenizer is loaded, never the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from graft.data.check.checking import Split, examine
from graft.data.check.facts import Facts
from graft.data.check.rules import Finding, find
from graft.data.masking import Encoder
from graft.data.prepare import Dataset, make_encoder
from graft.data.tokens import TextEncoder
from graft.errors import DataError
from graft.models.architecture import context_tokens, read_config
from graft.models.locate import resolve
from graft.models.tokenizer import load_tokenizer
from graft.training.choices import loader_of, sample_kind
from graft.training.config import RunConfig
from graft.training.inputs import dated, prepare_data, rooted, within_context
from graft.training.monitors import Silent

Progress = Callable[[str], Callable[[int, int], None]]
"""Given what is done, gives what is told how much of it."""


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        facts: Of the training data and, where there is one, of the evaluation data.
        datasets: The same data.
        findings: What to know about it, the worst first.
        encoder: What made the samples.
        config: The configuration, with full paths and within the model's context.
        error: Why a run of it stops at a row; the data is shown without such rows then.
    """

    facts: tuple[Facts, ...]
    datasets: tuple[Dataset, ...]
    findings: tuple[Finding, ...]
    encoder: Encoder
    config: RunConfig
    error: DataError | None

    @property
    def trainable(self) -> bool:
        """Whether a run of this configuration gets past its data."""
        return self.error is None


def check_data(config: RunConfig, progress: Progress | None = None) -> Checked:
    """Look at the data of a configuration.

    Args:
        config: The whole configuration; `data.train` is required.
        progress: Makes what is told how far it is.

    Raises:
        ConfigError: The configuration cannot be run.
        DataError: No row can be learned from, or the file as a whole is wrong.
        ModelError: There is no tokenizer or no config there.
        StorageError: A file cannot be read.
    """
    asked = config.data.max_length
    config = rooted(config)
    model_config = read_config(resolve(config.model.name, config.model.revision))
    config = within_context(config, model_config, Silent())
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    config, text = dated(config, tokenizer), TextEncoder(tokenizer)
    datasets, config, error = _prepared(config, text)
    encoder = make_encoder(text, config.data)
    facts = []
    for split, data in zip(("training", "evaluation"), datasets, strict=False):
        loader = loader_of(data, config, encoder.tokenizer, train=split == "training")
        facts.append(
            examine(
                data,
                loader,
                encoder,
                config.data,
                Split(
                    name=split,
                    kind=sample_kind(config),
                    against=datasets[0] if split == "evaluation" else None,
                    accumulation=config.training.gradient_accumulation_steps if split == "training" else 1,
                    asked_max_length=asked,
                    context=context_tokens(model_config),
                    **_of(error, data),
                ),
                progress(f"{split} data") if progress is not None else None,
            )
        )
    return Checked(tuple(facts), datasets, tuple(find(facts)), encoder, config, error)


def _prepared(
    config: RunConfig, text: TextEncoder
) -> tuple[tuple[Dataset, ...], RunConfig, DataError | None]:
    """The data of a run, or of the same run without the rows that would stop it, and what stops it.

    Raises:
        DataError: Without such rows nothing is left, or it is no row that stops it.
    """
    try:
        return _both(config, text), config, None
    except DataError as error:
        length = "drop" if config.data.on_overlong == "error" else config.data.on_overlong
        overlap = "tell" if config.data.overlap == "error" else config.data.overlap
        data = dataclasses.replace(config.data, skip_invalid=True, on_overlong=length, overlap=overlap)
        if data == config.data:
            raise
        lenient = dataclasses.replace(config, data=data)
        try:
            return _both(lenient, text), lenient, error
        except DataError:
            raise error from None


def _both(config: RunConfig, text: TextEncoder) -> tuple[Dataset, ...]:
    train, held_out = prepare_data(config, Silent(), text, thorough=True)
    return (train,) if held_out is None else (train, held_out)


def _of(error: DataError | None, data: Dataset) -> dict[str, str]:
    """What stops the run, where it stands in this file."""
    if error is None or not error.where.startswith(tuple(data.report.path.split(", "))):
        return {}
    return {"error": f"{error.where}: {error.what}", "error_fix": error.fix}
