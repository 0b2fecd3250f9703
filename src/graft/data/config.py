"""What the user may say about the data: the `data` section of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from graft.data.columns import check_parts
from graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows are trained on, and how they become tokens.

    Raises:
        ConfigError: A value is out of its range, or two values contradict each other.
    """

    train: str | None = None
    """Training data: a .jsonl, .json, .csv, .tsv, .txt (each also .gz), .parquet or .arrow file, a directory with
    a train file, or "hub:owner/name"."""
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
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a row of more than max_length tokens; a plain text is split into pieces instead."""
    skip_invalid: bool = False
    """Leave out rows that cannot be used, writing each to quarantine.jsonl, instead of stopping at the first."""
    limit: int | None = None
    """Use only the first rows of each file, this many."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The file's column for each part that is called otherwise there: {prompt: question, completion: answer}."""

    workers: int = 1
    """Threads that make batches ahead of the step that uses them; 0 makes each when it is wanted."""
    cache: bool | str = True
    """Keep tokens of files of 16 MiB or more, in graft's cache directory or in the one that is named."""

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
                fix="1 is enough on most machines",
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"limit must be at least 1 row, got {self.limit}",
                where="data.limit",
                fix="leave it out to use every row",
            )
