"""What a composition of adapters is: its operation, weights and ranks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from graft.adapters.settings import check_rank, is_number, pair
from graft.config import did_you_mean
from graft.dialects import explained
from graft.errors import ConfigError

Operation = Literal[
    "cat",
    "svd",
    "add",
    "subtract",
    "negate",
    "scale",
    "resize",
    "ties",
    "dare",
    "dare_ties",
    "magnitude_prune",
]

OPERATIONS: tuple[str, ...] = get_args(Operation)

THINNED = ("ties", "dare", "dare_ties", "magnitude_prune")
"""Operations on deltas that are thinned out first; what they make has no low rank of its own."""

SEEDED = ("dare", "dare_ties")
ELECTING = ("ties", "dare_ties")
SINGLE = ("negate", "scale", "resize")
"""Operations on one adapter."""

_UNWEIGHTED = ("add", "subtract", "negate", "resize")
_EXACT = ("cat", "negate", "scale")
"""Operations that keep every rank; nothing is cut off."""

_PEFT = {"linear": "cat", "dare_linear": "dare", "ties_svd": "ties", "dare_linear_svd": "dare",
         "dare_ties_svd": "dare_ties", "magnitude_prune_svd": "magnitude_prune"}  # fmt: skip
"""PEFT's combination_type to ours; its names without _svd work on lora_A and lora_B apart."""


@explained
@dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """How adapters become one: the operation on their deltas, and the rank of what is written."""

    operation: Operation
    """cat (weighted sum, ranks add up), svd (the same, truncated), add, subtract (the first less the others),
    negate, scale, resize, ties, dare, dare_ties or magnitude_prune."""
    weights: tuple[float, ...] = ()
    """One factor for each adapter; all one where empty."""
    rank: int | None = None
    """Largest rank of a layer of the result; what is beyond is cut off by SVD."""
    energy: float | None = None
    """In place of rank: the share of each layer's squared Frobenius norm that is kept, by the smallest rank
    that does; 1 keeps all."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some layers, each "regex=rank"; matched with the end of the path, first one counts."""
    density: float | None = None
    """Share of the numbers of each delta that ties, dare, dare_ties and magnitude_prune keep."""
    majority: Literal["total", "frequency"] | None = None
    """What elects a sign in ties and dare_ties: the sum of the values (null too), or how many have it."""
    seed: int | None = None
    """Of the draws of dare and dare_ties; null is 0."""

    def __post_init__(self) -> None:
        _check_operation(self.operation)
        _check_weights(self)
        _check_ranks(self)
        _check_thinning(self)

    @property
    def truncates(self) -> bool:
        """Whether ranks are cut."""
        return self.rank is not None or self.energy is not None

    def check_count(self, count: int) -> None:
        """Check that the operation is one for so many adapters.

        Raises:
            ConfigError: It is not, or the weights are not as many.
        """
        if self.operation in SINGLE and count != 1:
            raise ConfigError(
                f"{self.operation} takes one adapter, {count} were given",
                where="adapters",
                fix="cat, svd and ties take several",
            )
        if count < (2 if self.operation == "subtract" else 1):
            raise ConfigError(
                f"{self.operation} has nothing to work on: {count} adapters were given",
                where="adapters",
                fix="give adapter directories" + ("; negate takes one" if count else ""),
            )
        if self.weights and len(self.weights) != count:
            raise ConfigError(
                f"{len(self.weights)} weights for {count} adapters",
                where="compose.weights",
                fix="give one for each adapter, in their order",
            )

    def factors(self, count: int) -> tuple[float, ...]:
        """The factor on each of so many adapters."""
        if self.operation == "subtract":
            return (1.0, *(-1.0 for _ in range(count - 1)))
        if self.operation == "negate":
            return (-1.0,)
        return self.weights or (1.0,) * count


def _check_operation(operation: object) -> None:
    if operation in OPERATIONS:
        return
    name = str(operation)
    fix = f"PEFT's {name} is {_PEFT[name]} here, on true deltas" if name in _PEFT else ""
    raise ConfigError(
        f"{operation!r} is not an operation on adapters",
        where="compose.operation",
        fix=fix or did_you_mean(name, OPERATIONS),
    )


def _check_weights(config: ComposeConfig) -> None:
    where = "compose.weights"
    for weight in config.weights:
        if not is_number(weight):
            raise ConfigError(f"weight {weight!r} is not a finite number", where=where, fix="such as 0.5")
        if weight == 0:
            raise ConfigError("weight 0 takes no part", where=where, fix="leave that adapter out")
    if config.weights and config.operation in _UNWEIGHTED:
        raise ConfigError(
            f"{config.operation} takes no weights",
            where=where,
            fix="cat and svd are weighted sums; scale has one",
        )
    if config.operation == "scale" and not config.weights:
        raise ConfigError("scale needs a weight", where=where, fix="such as --weights 0.5")


def _check_ranks(config: ComposeConfig) -> None:
    if config.rank is not None:
        check_rank(config.rank, "compose.rank")
    if config.energy is not None and not (is_number(config.energy) and 0 < config.energy <= 1):
        raise ConfigError(
            f"energy {config.energy!r} is not a share above 0, at most 1",
            where="compose.energy",
            fix="0.95 keeps 95% of the squared norm",
        )
    for item in config.rank_pattern:
        check_rank(pair(item, "compose.rank_pattern")[1], "compose.rank_pattern")
    if config.rank is not None and config.energy is not None:
        raise ConfigError(
            "rank and energy both say what rank to cut to", where="compose.energy", fix="give one of the two"
        )
    if config.rank_pattern and not config.truncates:
        raise ConfigError(
            "rank_pattern cannot act without a rank or an energy for the other layers",
            where="compose.rank_pattern",
            fix="give rank too",
        )
    if config.truncates and config.operation in _EXACT:
        raise ConfigError(
            f"{config.operation} keeps every rank; none can be asked for",
            where="compose.rank" if config.rank is not None else "compose.energy",
            fix="svd is a weighted sum that is cut to a rank",
        )
    if not config.truncates and config.operation in ("svd", "resize", *THINNED):
        raise ConfigError(
            f"{config.operation} needs the rank of what it makes",
            where="compose.rank",
            fix="give rank (--rank 16) or energy (--energy 0.95)",
        )


def _check_thinning(config: ComposeConfig) -> None:
    operation = config.operation
    if operation in THINNED:
        if not is_number(config.density) or not 0 < (config.density or 0) <= 1:
            raise ConfigError(
                f"density {config.density!r} is not a share above 0, at most 1",
                where="compose.density",
                fix=f"{operation} needs the share of numbers to keep, such as 0.3",
            )
    elif config.density is not None:
        raise ConfigError(
            f"density cannot act on {operation}",
            where="compose.density",
            fix=f"it is for {', '.join(THINNED)}",
        )
    if config.majority is not None and operation not in ELECTING:
        raise ConfigError(
            f"majority cannot act on {operation}",
            where="compose.majority",
            fix=f"it is for {', '.join(ELECTING)}",
        )
    if config.majority not in (None, "total", "frequency"):
        raise ConfigError(
            f"majority {config.majority!r} is not known", where="compose.majority", fix="total or frequency"
        )
    if config.seed is not None and operation not in SEEDED:
        raise ConfigError(
            f"seed cannot act on {operation}: it draws nothing",
            where="compose.seed",
            fix=f"it is for {', '.join(SEEDED)}",
        )
    if config.seed is not None and (isinstance(config.seed, bool) or not isinstance(config.seed, int)):
        raise ConfigError(
            f"seed {config.seed!r} is not a whole number", where="compose.seed", fix="such as 0"
        )
