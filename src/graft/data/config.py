"""What the user may say about the data: the `data` section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graft.config import closest
from graft.data.examples import ROLES
from graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows are trained on, and how they become tokens.

    Raises:
        ConfigError: A value is out of its range, or two values contradict each other.
    """

    train: str | None = None
    """Training data: a .jsonl, .json, .csv, .tsv or .txt file, or a directory with a train file."""
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
    """Leave out rows that cannot be read, naming each, instead of stopping at the first."""
    limit: int | None = None
    """Use only the first rows of each file, this many."""
    train_on_roles: tuple[str, ...] = ("assistant",)
    """Roles of conversations whose messages are learned; a message's own "train": true or false comes
    first."""
    train_on_last_turn: bool = False
    """Learn only the last of these messages of each conversation."""

    def __post_init__(self) -> None:
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
        self._check_roles()
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"limit must be at least 1 row, got {self.limit}",
                where="data.limit",
                fix="leave it out to use every row",
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
