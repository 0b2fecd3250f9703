"""What a run starts from: its configuration with full paths, its samples, its base."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.attach import install
from graft.adapters.attached import Adapter, num_base_parameters
from graft.adapters.data_starts import IGNORED, Pass
from graft.adapters.selected import selection_of
from graft.adapters.settings import DATA, RANDOM
from graft.adapters.starts import SUBTRACTED, stored_starts
from graft.adapters.targets import select_targets
from graft.data.chat.templates import read_template, writes_date
from graft.data.classes import ClassReader
from graft.data.filters.cleaning import Cleaning
from graft.data.loader import Batch
from graft.data.preferences import PLAIN, prepare_pairs
from graft.data.prepare import Dataset, prepare
from graft.data.quarantine import Quarantine
from graft.data.readers.hub import is_hub
from graft.data.report import num_rows, shorten_sample
from graft.data.sources import IN_MEMORY, Source
from graft.data.splits import Read, prepare_splits
from graft.errors import ConfigError
from graft.evaluate.loss import token_losses
from graft.models.architecture import context_tokens
from graft.models.classifier import HEAD, as_classifier, is_classifier, labels_of
from graft.models.load import BaseModel, load, load_tokenizer
from graft.models.locate import rooted_name
from graft.quant.advice import advice
from graft.quant.linear import quantized_modules
from graft.training.choices import make_loader, objective, sample_kind
from graft.training.config import RunConfig
from graft.training.monitors import Monitor


def rooted(config: RunConfig) -> RunConfig:
    """The same configuration with full paths, so that the run can be resumed from any directory.

    Raises:
        ConfigError: Two names of `data.mix` are the same file.
    """
    places: dict[str, Any] = {
        name: _rooted_path(value)
        for name in ("train", "eval", "chat_template", "cache")
        if isinstance(value := getattr(config.data, name), str)
    }
    directories: dict[str, Any] = {
        name: _rooted_path(value)
        for name in ("optimizer_spill", "activation_offload")
        if isinstance(value := getattr(config.training, name), str)
    }
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=rooted_name(config.model.name)),
        data=dataclasses.replace(config.data, **places, mix=_rooted_mix(config)),
        training=dataclasses.replace(config.training, **directories),
    )


def _rooted_path(path: str) -> str:
    return path if is_hub(path) or path == IN_MEMORY else os.path.abspath(os.path.expanduser(path))


def _rooted_mix(config: RunConfig) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for path, weight in config.data.mix.items():
        place = _rooted_path(path)
        if place in found:
            raise ConfigError(
                f"mix names {place} twice", where="data.mix", fix="name it once, with the sum of the weights"
            )
        found[place] = weight
    return found


def dated(config: RunConfig, tokenizer: Any) -> RunConfig:
    """With today's date where the chat template writes one: texts are the same when it is resumed.

    Raises:
        ConfigError: A date is given, and the template writes none.
        DataError: The template file is no template.
        StorageError: The template file cannot be read.
    """
    data = config.data
    if not writes_date(read_template(data.chat_template) if data.chat_template else tokenizer.chat_template):
        if data.date is not None:
            raise ConfigError(
                "the chat template writes no date", where="data.date", fix="leave data.date out"
            )
        return config
    day = data.date or str(datetime.date.today())
    return dataclasses.replace(config, data=dataclasses.replace(data, date=day))


def check_places(config: RunConfig) -> None:
    """Refuse directories that are not there, before anything is made.

    Args:
        config: With full paths.

    Raises:
        ConfigError: One is missing or is no directory.
    """
    for name, otherwise in (("optimizer_spill", "leave it out"), ("activation_offload", "set it to true")):
        place = getattr(config.training, name)
        if isinstance(place, str) and not os.path.isdir(place):
            raise ConfigError(
                f"training.{name} names {place}, which is no directory",
                where=f"training.{name}",
                fix=f"make it, or {otherwise}: the file is then in the run's own directory",
            )


def within_context(config: RunConfig, model_config: Any, monitor: Monitor) -> RunConfig:
    """Samples no longer than what the model can see; beyond it there are no positions, or untrained ones."""
    context = context_tokens(model_config)
    if context is None or config.data.max_length <= context:
        return config
    monitor.say(f"max_length: {context}, the model's context, instead of {config.data.max_length}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=context))


def prepare_data(
    config: RunConfig,
    monitor: Monitor,
    tokenizer: Any = None,
    *,
    given: Mapping[str, Source] | None = None,
    quarantine: Quarantine | None = None,
    thorough: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """The samples to train on and to evaluate with, and what is told about them.

    Args:
        config: The configuration.
        monitor: Who is told.
        tokenizer: That of the base, where it is loaded already.
        given: Rows from Python as "train" and "eval".
        quarantine: Receives each row that is left out under skip_invalid.
        thorough: Whether all rows are looked at for what is only told; see `Cleaning`.

    Raises:
        ConfigError: There is no training data, or a setting has nothing to act on.
    """
    if not config.data.train and not config.data.mix:
        raise ConfigError(
            "no training data", where="data.train", fix="--data FILE, or data.train in the config"
        )
    tokenizer = tokenizer or load_tokenizer(config.model.name, config.model.revision)
    cleaning = Cleaning(config.data, thorough=thorough)
    train_data, eval_data = _splits(tokenizer, config, monitor, given, quarantine, cleaning)
    if config.data.chat_template and train_data.report.format in ("text", "prompt_completion", PLAIN):
        raise ConfigError(
            f"a chat template does not act on {train_data.report.format} data",
            where="data.chat_template",
            fix="leave it out, or give the data as messages",
        )
    if config.training.eval_steps and eval_data is None:
        raise ConfigError(
            "training.eval_steps needs an evaluation loss",
            where="training.eval_steps",
            fix="--eval-data FILE, data.eval or data.eval_fraction; or leave it out",
        )
    for name, data in (("training", train_data), ("evaluation", eval_data)):
        if data is not None:
            monitor.say(_describe_data(name, data))
    if quarantine is not None and quarantine.count:
        monitor.say(f"{num_rows(quarantine.count)} left out; they are in quarantine.jsonl of the run")
    for sample in train_data.report.preview:
        monitor.say(f"  {shorten_sample(sample)}")
    return train_data, eval_data


def _splits(
    tokenizer: Any,
    config: RunConfig,
    monitor: Monitor,
    given: Mapping[str, Source] | None,
    quarantine: Quarantine | None,
    cleaning: Cleaning,
) -> tuple[Dataset, Dataset | None]:
    read: Read = partial(prepare, listener=monitor)
    if config.task == "classification":
        read = ClassReader()
    elif config.training.loss != "cross_entropy":
        read = prepare_pairs
        if config.data.prompt_template is not None:
            raise ConfigError(
                "data.prompt_template does not act on preferences",
                where="data.prompt_template",
                fix="write the prompts into the rows",
            )
    return prepare_splits(
        tokenizer,
        config.data,
        seed=config.training.seed,
        read=read,
        kind=sample_kind(config),
        cleaning=cleaning,
        given=given,
        quarantine=quarantine,
    )


def _describe_data(name: str, data: Dataset) -> str:
    report = data.report
    lines = [
        f"{name} data {report.path}: {report.format} ({report.reason}); {report.num_used:,} of "
        f"{report.num_rows:,} rows, {report.num_samples:,} samples, {report.num_tokens:,} tokens, "
        f"{report.num_labelled_tokens:,} of them learned"
    ]
    return "\n".join([*lines, *(f"  {note}" for note in report.notes)])


def load_base(
    config: RunConfig, monitor: Monitor, labels: Sequence[str] = (), *, in_memory: bool = False
) -> BaseModel:
    """The base that the configuration names, a classifier where it asks for one.

    Args:
        config: The configuration.
        monitor: Who is told.
        labels: The classes by number, for a classifier.
        in_memory: Whether the run began with a model loaded before.
    """
    # Weights that train start from what the files hold, unless their caller had loaded them in another dtype.
    as_stored = config.adapter is None and not in_memory
    base = load(
        config.model.name,
        quantization=config.quantization,
        dtype=None if as_stored else config.model.dtype,
        revision=config.model.revision,
        progress=monitor.loading,
    )
    monitor.say(f"base {base.name}: {_describe(base)}")
    if base.quantization is not None:
        layers = quantized_modules(base.model).values()
        num_quantized = sum(layer.in_features * layer.out_features for layer in layers)
        if told := advice(base.quantization, num_base_parameters(base.model), num_quantized):
            monitor.say(f"advice: {told}")
    if config.task == "classification":
        as_classifier(base, labels, seed=config.training.seed)
    return base


def attach_adapter(
    base: BaseModel,
    config: RunConfig,
    data: Dataset,
    monitor: Monitor,
    stored: Mapping[str, Tensor] | None = None,
) -> None:
    """Put the adapter that the configuration asks for on a base; a classifier's head trains with it.

    Args:
        base: The base.
        config: The configuration.
        data: What it is trained on, for starts that look at it.
        monitor: Who is told.
        stored: The adapter's tensors from a checkpoint, from which its start is taken.
    """
    wanted: Any = config.adapter
    if wanted is None:
        return
    if config.task == "classification" and HEAD not in wanted.modules_to_save:
        wanted = dataclasses.replace(wanted, modules_to_save=(*wanted.modules_to_save, HEAD))
    selection = selection_of(wanted)
    starts = None
    if stored is not None:
        starts = stored_starts(wanted, tuple(select_targets(base.model, selection)), stored)
    looks = starts is None and getattr(wanted, "init", "") in DATA
    batches = passes(base, config, data) if looks else None
    begun = time.perf_counter()
    made = install(
        base.model, wanted, selection, "default", seed=config.training.seed, batches=batches, starts=starts
    )
    if starts is None and getattr(wanted, "init", "kaiming") not in RANDOM:
        saved = "; saved as a plain LoRA of twice the rank" if wanted.init in SUBTRACTED else ""
        monitor.say(f"init {wanted.init}: made in {time.perf_counter() - begun:.1f} s{saved}")
    for note in made.notes:
        monitor.say(note)


def passes(base: BaseModel, config: RunConfig, data: Dataset) -> Iterator[Pass]:
    """The first batches of the training data, for a start that looks at them."""
    learned = objective(config, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base.model.to(device)

    def of(batch: Batch) -> Pass:
        def loss(model: nn.Module) -> Tensor:
            return token_losses(model, batch)[0] if learned is None else learned.loss(model, batch)

        return Pass(loss, None if config.task == "classification" else batch.labels != IGNORED)

    for batch in make_loader(data, config, base, train=True).epoch(0):
        yield of(batch.to(device))


def check_labels(base: BaseModel, data: Dataset, adapter: Adapter | None) -> None:
    """Refuse a classifier in memory whose classes are not those of the data, or whose head does not train.

    Raises:
        ConfigError: In these cases.
    """
    if not is_classifier(base.model):
        return
    if labels_of(base.model) != data.labels:
        raise ConfigError(
            f"the model has the labels {list(labels_of(base.model))[:10]}, the data {list(data.labels)[:10]}",
            where=data.report.path,
            fix="graft.as_classifier(base, labels) with the labels of the data, in this order",
        )
    if adapter is not None and HEAD not in adapter.saved_modules:
        raise ConfigError(
            f"the head of the classifier is frozen at its random start: {HEAD!r} is not in modules_to_save",
            where="adapter.modules_to_save",
            fix=f'LoraConfig(modules_to_save=("{HEAD}",))',
        )


def _describe(base: BaseModel) -> str:
    stored = {id(t): t for t in [*base.model.parameters(), *base.model.buffers()]}.values()
    size = sum(t.numel() * t.element_size() for t in stored)
    kind = "dense" if base.quantization is None else base.quantization.quant_type
    return f"{kind}, {base.dtype}, {size / 2**20:,.1f} MiB, fingerprint {base.fingerprint.short}"
