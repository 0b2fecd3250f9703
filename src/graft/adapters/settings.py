"""What the settings of all methods have in common: checks of their fields, patterns for single layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

from graft.errors import ConfigError

MAX_RANK = 8192
"""Largest rank accepted; beyond it a setting is taken for a mistake before it takes the memory."""


def check_placement(config: Any) -> None:
    """Check where an adapter goes: targets, blocks, and fields that need them.

    Args:
        config: Settings of any method.

    Raises:
        ConfigError: Nothing would train, a block number is none, or a field cannot act.
    """
    if not config.target_modules and not config.modules_to_save:
        raise ConfigError("nothing to train", where="adapter.target_modules", fix='use "all-linear"')
    if config.layers is not None and not _are_block_numbers(config.layers):
        raise ConfigError(
            f"layers {config.layers!r} are not block numbers",
            where="adapter.layers",
            fix="list numbers from 0, or leave it out for all blocks",
        )
    for field in ("exclude_modules", "layers", "rank_pattern", "alpha_pattern"):
        value = getattr(config, field, None)
        if value and not config.target_modules:
            raise ConfigError(
                f"{field} {value!r} cannot act: target_modules is empty",
                where=f"adapter.{field}",
                fix=f'leave {field} out, or name targets such as "all-linear"',
            )


def check_low_rank(config: Any) -> None:
    """Check rank, alpha and dropout, and the patterns for single layers.

    Args:
        config: Settings that have these fields; dropout may be missing.

    Raises:
        ConfigError: A value is out of its range.
    """
    check_rank(config.rank, "adapter.rank")
    check_alpha(config.alpha, "adapter.alpha")
    check_dropout(getattr(config, "dropout", 0.0))
    for item in config.rank_pattern:
        check_rank(pair(item, "adapter.rank_pattern")[1], "adapter.rank_pattern")
    for item in config.alpha_pattern:
        check_alpha(pair(item, "adapter.alpha_pattern")[1], "adapter.alpha_pattern")


RANDOM = ("kaiming", "gaussian", "orthogonal")
"""Starts that are drawn."""

DATA = ("eva", "lora_ga")
"""Starts that are made from batches of data."""

SUBTRACTED = ("pissa", "olora", "lora_ga")
"""Starts that are not zero, from which the update is measured."""

ITERATED = ("pissa", "loftq")
"""Starts that init_iterations acts on."""


def check_start(config: Any, *starts: str) -> None:
    """Check how an adapter starts, and the fields of that.

    Args:
        config: Settings with an init; the fields that act on some of its values may be missing.
        starts: What init may be for this method.

    Raises:
        ConfigError: The method has no such start, or a field cannot act.
    """
    init, method = config.init, config.method
    if init not in starts:
        known = init in (*RANDOM, *DATA, *ITERATED, "olora")
        told = f"init {init!r} is not for {method}" if known else f"init {init!r} is unknown"
        fix = f"one of: {', '.join(starts)}" + ("; or method lora, which has it" if known else "")
        raise ConfigError(told, where="adapter.init", fix=fix)
    for field, acting, least in (
        ("init_iterations", ITERATED, 0 if init == "pissa" else 1),
        ("init_batches", DATA, 1),
        ("eva_rho", ("eva",), 1.0),
    ):
        value: Any = getattr(config, field, None)
        free = getattr(type(config), field, None)
        if value == free:
            continue
        if init not in acting:
            raise ConfigError(
                f"{field} {value!r} cannot act: init is {init!r}",
                where=f"adapter.{field}",
                fix=f"leave it out; it acts on {' and '.join(acting)}",
            )
        if not is_number(value) or value < least or (field != "eva_rho" and value != int(value)):
            kind = "a number" if field == "eva_rho" else "a whole number"
            raise ConfigError(
                f"{field} {value!r} is not {kind} from {least:g}",
                where=f"adapter.{field}",
                fix=f"leave it out for {free!r}",
            )


def without_start(config: Any) -> Any:
    """Settings of an adapter that starts as it does without a word about it."""
    names = ("init", "init_iterations", "init_batches", "eva_rho")
    free = {field.name: field.default for field in dataclasses.fields(config) if field.name in names}
    return dataclasses.replace(config, **free)


def check_rank(rank: float, where: str) -> None:
    """Check that a rank is a whole number in range.

    Raises:
        ConfigError: It is not.
    """
    if not is_number(rank) or rank != int(rank) or not 1 <= rank <= MAX_RANK:
        raise ConfigError(
            f"rank {rank!r} is not a whole number from 1 to {MAX_RANK}",
            where=where,
            fix="8 to 64 serve most tasks",
        )


def check_alpha(alpha: float, where: str) -> None:
    """Check that an alpha is a positive number.

    Raises:
        ConfigError: It is not.
    """
    if not is_number(alpha) or alpha <= 0:
        raise ConfigError(
            f"alpha {alpha!r} is not a positive number", where=where, fix="twice the rank is usual"
        )


def check_dropout(dropout: float) -> None:
    """Check that a dropout is a share.

    Raises:
        ConfigError: It is not.
    """
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ConfigError(
            f"dropout {dropout!r} is not in [0, 1)", where="adapter.dropout", fix="0.0 turns it off"
        )


class LowRankSettings:
    """What frozen settings with a rank, an alpha and a pattern for each can do."""

    rank: int
    alpha: float
    rank_pattern: tuple[str, ...]
    alpha_pattern: tuple[str, ...]
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor on the update: alpha / rank, or alpha / sqrt(rank) with use_rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def at(self, path: str) -> Self:
        """The settings of one layer: rank and alpha as the first matching pattern says, the rest as is.

        Args:
            path: Dotted path of the layer in the model.
        """
        from graft.adapters.patterns import first_match

        rank, alpha = self.rank, self.alpha
        for item in first_match(self.rank_pattern, path):
            rank = int(pair(item, "adapter.rank_pattern")[1])
        for item in first_match(self.alpha_pattern, path):
            alpha = pair(item, "adapter.alpha_pattern")[1]
        if (rank, alpha) == (self.rank, self.alpha):
            return self
        own: Any = self
        changed: Self = dataclasses.replace(own, rank=rank, alpha=alpha)
        return changed


class SameEverywhere:
    """What settings that are the same for all layers can do."""

    def at(self, path: str) -> Self:
        """The settings of one layer: those of all.

        Args:
            path: Dotted path of the layer in the model.
        """
        return self


def pair(item: str, where: str) -> tuple[str, float]:
    """Pattern and number of a "regex=number" item.

    Raises:
        ConfigError: It is none.
    """
    pattern, equals, value = item.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not equals or not pattern or math.isnan(number):
        raise ConfigError(f"{item!r} is not regex=number", where=where, fix='for example "q_proj=16"')
    return pattern, number


def pairs(items: tuple[str, ...]) -> dict[str, float]:
    """The "regex=number" items of a pattern field as a mapping, in their order."""
    return dict(pair(item, "adapter") for item in items)


def beside_deltas(config: Any) -> list[str]:
    """The fields by which settings train something beside deltas of weights: biases, rows of an embedding."""
    fields = ("bias", "lora_bias", "trainable_token_indices")
    return [name for name in fields if getattr(config, name, None) not in (None, "none", False, ())]


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_block_numbers(value: object) -> bool:
    numbers = list(value) if isinstance(value, tuple | list) else []
    return bool(numbers) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
