"""Trainable tokens as a method: a few rows of the input embedding train, the rest stays. Imports no torch.

The rows stand in the place of the base's, and where the output head shares the embedding's weight, they stand
there too. Source: PEFT's TrainableTokens, whose files these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from graft.adapters.settings import SameEverywhere, check_placement
from graft.dialects import explained
from graft.errors import ConfigError, TargetError

if TYPE_CHECKING:
    import torch

    from graft.adapters.trainable_tokens_layer import TokenRows
    from graft.models.layers import BaseLayer

INPUT_EMBEDDING = "input-embedding"
"""As target_modules: the layer that looks up the input tokens."""

MAX_TOKENS = 1 << 20


@explained
@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(SameEverywhere):
    """Which rows of the input embedding train."""

    SHORTHAND = "method"

    method: Literal["trainable_tokens"] = "trainable_tokens"
    """The adapter method."""
    token_indices: tuple[int, ...] = ()
    """Numbers of the tokens whose rows train, as the tokenizer gives them."""
    target_modules: str | tuple[str, ...] = INPUT_EMBEDDING
    """The embedding: "input-embedding", or the name or path ending of another one."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that the embedding lies in; null for the usual one, which is in none."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: heads, norms."""

    def __post_init__(self) -> None:
        check_tokens(self.token_indices, "adapter.token_indices")
        check_placement(self)


def check_tokens(indices: Any, where: str) -> None:
    """Check that numbers of tokens are some, and different ones.

    Args:
        indices: What was given.
        where: The field, for errors.

    Raises:
        ConfigError: They are not.
    """
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**31:
            raise ConfigError(
                f"{index!r} is not the number of a token",
                where=where,
                fix='tokenizer.convert_tokens_to_ids("<word>") tells it',
            )
    if len(set(indices)) < len(indices):
        twice = next(index for place, index in enumerate(indices) if index in indices[:place])
        raise ConfigError(f"token {twice} is named twice", where=where, fix="name each token once")
    if len(indices) > MAX_TOKENS:
        raise ConfigError(
            f"{len(indices):,} tokens",
            where=where,
            fix="train so many rows in full: adapter.modules_to_save",
        )


def token_rows(config: Any) -> tuple[int, ...]:
    """The tokens whose rows of the input embedding train, alone or beside LoRA; none with other settings.

    Args:
        config: Settings of any method.
    """
    found: tuple[int, ...] = getattr(config, "token_indices", ()) or getattr(
        config, "trainable_token_indices", ()
    )
    return found


class Rows(Protocol):
    """What of its settings decides about the rows."""

    @property
    def token_indices(self) -> tuple[int, ...]:
        """Numbers of the tokens."""


def row_shape(base: BaseLayer, indices: tuple[int, ...], where: str) -> tuple[int, int]:
    """Shape of the rows of an embedding: (tokens, dimension).

    Args:
        base: The embedding.
        indices: Numbers of the tokens.
        where: The field that has them, for errors.

    Raises:
        TargetError: No tokens, or one that the embedding does not have.
    """
    if not indices:
        raise TargetError("no token is named", where=where, fix="list numbers of tokens")
    if max(indices) >= base.in_features:
        raise TargetError(
            f"token {max(indices)} is not in the embedding, which has {base.in_features:,} rows",
            where=where,
            fix=f"model.resize_token_embeddings({max(indices) + 1}) before, or name other tokens",
        )
    return len(indices), base.out_features


class TrainableTokensMethod:
    """Trainable tokens behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "trainable_tokens"
    config_class = TrainableTokensConfig
    kinds = ("embedding",)

    def tensor_shapes(self, base: BaseLayer, config: Rows) -> dict[str, tuple[int, ...]]:
        """Name (as in PEFT files) and shape of the rows."""
        return {"trainable_tokens_delta": row_shape(base, config.token_indices, "adapter.token_indices")}

    def build_layer(self, base: BaseLayer, config: Rows, generator: torch.Generator | None) -> TokenRows:
        """Make the layer module; it starts at the base's rows and draws nothing."""
        from graft.adapters.trainable_tokens_layer import TokenRows

        return TokenRows(base, config.token_indices, "trainable_tokens_delta")
