"""What the user may say about the data: the `data` section of a configuration."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from graft.config import closest, did_you_mean
from graft.data.columns import check_parts
from graft.data.conversations import ROLES
from graft.data.filters.findings import SCRIPTS, Finding
from graft.data.prompts import FORMATS, PromptTemplate
from graft.errors import ConfigError

_TRUTHS = ("true", "false", "yes", "no", "on", "off", "none", "null")
"""Texts that are no directory of that name, unless it is written as a path."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows are trained on, and how they become tokens.

    Raises:
        ConfigError: A value is out of its range, or two values contradict each other.
    """

    train: str | None = None
    """Training data: a .jsonl, .json, .csv, .tsv, .txt (each also .gz), .parquet or .arrow file, a directory
    with a train file, or "hub:owner/name"."""
    eval: str | None = None
    """Evaluation data, same kinds; rows that are also in the training data are counted and told."""
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt", "mixed"] = "auto"
    """What the columns mean; auto reads it from their names for all rows, mixed for each row anew."""
    max_length: int = 1024
    """Longest sample in tokens; also the length of a packed row."""
    packing: bool = True
    """Put several samples in one row, each seeing only itself, instead of padding."""
    loss_on: Literal["auto", "completion", "all"] = "auto"
    """Which tokens are learned: auto is the completion or the assistant turns, and all of a plain text."""
    chat_template: str | None = None
    """A Jinja file used instead of the tokenizer's own chat template."""
    eval_fraction: float = 0.0
    """Share of the training samples held out for evaluation when no `eval` is given."""
    shuffle: bool = True
    """Draw the samples in a new order each epoch; the order follows from the seed."""
    on_overlong: Literal["truncate", "truncate_left", "split", "drop", "error"] = "truncate"
    """What happens to a row of more than max_length tokens: its end is cut away; or the begin of its prompt
    and its oldest exchanges; or it becomes several conversations; a plain text is split into pieces."""
    skip_invalid: bool = False
    """Leave out rows that cannot be used, each into quarantine.jsonl, instead of stopping at the first."""
    limit: int | None = None
    """Use only the first rows of each file, this many."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The file's column for each part that has another name there: {prompt: question, completion: answer}."""

    workers: int = 0
    """Threads that make batches ahead of the step that uses them; a batch takes a millisecond."""
    cache: bool | str = True
    """Keep tokens of files of 16 MiB or more, in graft's cache directory or in the one that is named."""
    prompt_template: str | None = None
    """Writes the prompt of each row from its columns ("Question: {question}\\nAnswer:"); the answer stands in
    completion, response, answer or output."""
    mix: Mapping[str, float | None] = field(default_factory=dict)
    """In place of train: several files, each with its weight ({domain.jsonl: 0.7, general.jsonl: 0.3});
    without weights (null) their sizes weigh."""
    mix_by: Literal["examples", "tokens"] = "examples"
    """What the weights of mix are shares of; an epoch has as many of these as all its files together."""
    mix_temperature: float = 1.0
    """Shares are in proportion to weight^(1/temperature): more than 1 makes them more equal."""
    deduplicate: Literal["no", "exact", "near"] = "no"
    """Leave out training rows that an earlier one is equal to (exact), or also nearly so (near); no only
    counts."""
    near_threshold: float = 0.8
    """Jaccard similarity of word 3-grams from which on rows are near duplicates."""
    overlap: Literal["tell", "drop", "error"] = "tell"
    """What happens with training rows that are also in the evaluation data."""
    overlap_by: Literal["exact", "near", "ngrams"] = "exact"
    """Which rows these are: equal ones, near duplicates too, or also those that share 13 words in a row."""
    drop: tuple[Finding, ...] = ()
    """Leave out training rows with these findings, which are told anyway: blank_answer, copied_prompt,
    repetitive, few_letters, mojibake, placeholder."""
    scripts: tuple[str, ...] = ()
    """Leave out training rows that are mainly in another script than these: [Latin], [Han, Latin]."""
    train_on_roles: tuple[str, ...] = ("assistant",)
    """Roles of conversations whose messages are learned; a message's own "train": true or false comes
    first."""
    train_on_last_turn: bool = False
    """Learn only the last of these messages of each conversation."""
    date: str | None = None
    """What chat templates that write the date take for today ("2026-11-30"); a run notes the day it began."""

    def __post_init__(self) -> None:
        check_parts(self.columns)
        if self.max_length < 2:
            raise ConfigError(
                f"max_length must be at least 2 tokens, got {self.max_length}",
                where="data.max_length",
                fix="a token is learned from the one before it; 512 to 4096 is usual",
            )
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ConfigError(
                f"eval_fraction must be in [0, 1), got {self.eval_fraction}",
                where="data.eval_fraction",
                fix="0.1 holds out a tenth",
            )
        if self.eval_fraction and self.eval is not None:
            raise ConfigError(
                "eval and eval_fraction are both given",
                where="data.eval_fraction",
                fix="keep the evaluation file, or the fraction",
            )
        if self.workers < 0:
            raise ConfigError(
                f"workers must be at least 0 threads, got {self.workers}",
                where="data.workers",
                fix="0 makes each batch when it is wanted",
            )
        self._check_roles()
        self._check_date()
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"limit must be at least 1 row, got {self.limit}",
                where="data.limit",
                fix="leave it out to use every row",
            )
        self._check_places()
        self._check_prompts()
        self._check_mix()
        self._check_cleaning()

    def _check_date(self) -> None:
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ConfigError(
                    f"date must be a day, got {self.date!r}: {error}",
                    where="data.date",
                    fix='write "2026-11-30", or leave it out for the day the run begins',
                ) from error

    @property
    def day(self) -> datetime.date | None:
        """What templates take for today."""
        return None if self.date is None else datetime.date.fromisoformat(self.date)

    def _check_places(self) -> None:
        for name in ("train", "eval", "chat_template", "cache"):
            if getattr(self, name) == "":
                raise ConfigError(
                    f"{name} is an empty name", where=f"data.{name}", fix="name it, or leave it out"
                )
        if isinstance(self.cache, str) and self.cache.lower() in _TRUTHS:
            raise ConfigError(
                f"cache is the text {self.cache!r}, which would be the name of a directory",
                where="data.cache",
                fix=f"write {self.cache.lower()} without quotes, or ./{self.cache} for such a directory",
            )

    def _check_prompts(self) -> None:
        if self.prompt_template is None:
            return
        PromptTemplate.parse(self.prompt_template)
        if self.chat_template is not None:
            raise ConfigError(
                "prompt_template and chat_template are both given",
                where="data.prompt_template",
                fix="keep the one that the rows are for: columns of text, or messages",
            )
        if self.format not in FORMATS:
            raise ConfigError(
                f"prompt_template does not act on rows of format {self.format}",
                where="data.prompt_template",
                fix=f"leave it out, or format: {' or '.join(FORMATS[1:])}",
            )

    def _check_mix(self) -> None:
        if not self.mix:
            for name, usual in (("mix_by", "examples"), ("mix_temperature", 1.0)):
                if getattr(self, name) != usual:
                    raise _idle(name, "mix", "give the files under mix, or leave it out")
            return
        for name in ("train", "eval_fraction"):
            if getattr(self, name):
                fix = "keep one of them" if name == "train" else "give an evaluation file: data.eval"
                raise ConfigError(f"mix and {name} are both given", where="data.mix", fix=fix)
        if len(self.mix) < 2:
            raise ConfigError(
                f"mix names only {next(iter(self.mix))}", where="data.mix", fix="use data.train for one file"
            )
        self._check_weights()

    def _check_weights(self) -> None:
        weights = list(self.mix.values())
        if None in weights and any(weight is not None for weight in weights):
            raise ConfigError(
                f"some files of mix have a weight and some have none: {dict(self.mix)}",
                where="data.mix",
                fix="give each a weight, or none for their sizes",
            )
        for path, weight in self.mix.items():
            if weight is not None and not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"the weight of {path} is {weight:g}; it must be above 0",
                    where="data.mix",
                    fix="leave the file out, or give it a share",
                )
        if not (math.isfinite(self.mix_temperature) and self.mix_temperature > 0):
            raise ConfigError(
                f"mix_temperature must be above 0, got {self.mix_temperature:g}",
                where="data.mix_temperature",
                fix="1 keeps the weights, 2 to 5 make them more equal",
            )

    def _check_cleaning(self) -> None:
        if not 0.5 <= self.near_threshold <= 1.0:
            raise ConfigError(
                f"near_threshold must be from 0.5 to 1, got {self.near_threshold:g}",
                where="data.near_threshold",
                fix="0.8 is usual",
            )
        if self.near_threshold != 0.8 and "near" not in (self.deduplicate, self.overlap_by):
            raise _idle("near_threshold", "near duplicates", "deduplicate: near, or overlap_by: near")
        for name, usual in (("overlap", "tell"), ("overlap_by", "exact")):
            if getattr(self, name) != usual and self.eval is None:
                fix = "give data.eval; equal rows always stay on one side of eval_fraction"
                raise _idle(name, "an evaluation file", fix)
        if unknown := next((name for name in self.scripts if name not in SCRIPTS), ""):
            raise ConfigError(
                f"no script is called {unknown!r}", where="data.scripts", fix=did_you_mean(unknown, SCRIPTS)
            )

    def _check_roles(self) -> None:
        for role in self.train_on_roles:
            if role not in ROLES:
                near = closest(role, ROLES)
                raise ConfigError(
                    f"train_on_roles has {role!r}, which is no role; roles are {', '.join(ROLES)}",
                    where="data.train_on_roles",
                    fix=f"did you mean {near!r}?" if near else "assistant is usual",
                )
        if not self.train_on_roles:
            raise ConfigError(
                "train_on_roles is empty: nothing would be learned",
                where="data.train_on_roles",
                fix="leave it out to learn the assistant's messages",
            )
        if self.loss_on == "all" and (self.train_on_roles != ("assistant",) or self.train_on_last_turn):
            raise ConfigError(
                "loss_on is all, so that train_on_roles and train_on_last_turn choose nothing",
                where="data.loss_on",
                fix="leave out one of them",
            )

    def refuse_cache(self) -> None:
        """Refuse a directory for tokens, for data whose tokens are not kept.

        Raises:
            ConfigError: One is named.
        """
        if isinstance(self.cache, str):
            raise ConfigError(
                f"cache names {self.cache}, but tokens of preferences and of texts with a class are not kept",
                where="data.cache",
                fix="leave it out",
            )

    def refuse_turns(self, reason: str, cuts: tuple[str, ...] = ("split",)) -> None:
        """Refuse what only conversations have, for data of another kind.

        Args:
            reason: Why it has no meaning there.
            cuts: Values of on_overlong that have none.

        Raises:
            ConfigError: A field says something that would not act.
        """
        if self.on_overlong in cuts:
            raise ConfigError(
                f"on_overlong is {self.on_overlong}, but {reason}",
                where="data.on_overlong",
                fix="truncate, drop or error",
            )
        if self.train_on_roles != ("assistant",) or self.train_on_last_turn:
            name = "train_on_last_turn" if self.train_on_last_turn else "train_on_roles"
            raise ConfigError(f"{name} is set, but {reason}", where=f"data.{name}", fix="leave it out")


def _idle(name: str, lacking: str, fix: str) -> ConfigError:
    return ConfigError(f"{name} has nothing to act on without {lacking}", where=f"data.{name}", fix=fix)
