"""What one method's part of PEFT's adapter_config.json is: how it is read, how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.adapters.peft_fields import Field, plain


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One method's part of an adapter_config.json."""

    method: str
    """Key of METHODS."""
    peft_type: str
    read: Callable[[Field], dict[str, Any]]
    """Our settings but for the placement, from theirs."""
    write: Callable[[Any, Mapping[str, Any], list[str]], dict[str, Any]]
    """Theirs from our settings, those of each target by its path, and the target_modules to be written."""
    leaf: str
    """What the last part of every key of a tensor starts with."""
    honoured: frozenset[str]
    """Their options that act."""
    refused: Mapping[str, Any]
    """Their options that would change the function, with the value that leaves it as it is."""
    idle: frozenset[str] = frozenset()
    """Their options that say how the file came about, or that follow from the model."""
    in_training: frozenset[str] = frozenset()
    """Their options that act in training alone, and that graft does not have: such an adapter can be used."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Theirs by ours, for errors."""
    lacks: frozenset[str] = frozenset()
    """Options of placement that their settings do not have."""
    claims: Callable[[Mapping[str, Any]], bool] = lambda raw: True
    """Whether a file of this peft_type is of this method."""

    @property
    def known(self) -> frozenset[str]:
        """All options that it says something about."""
        return self.honoured | self.idle | self.in_training | self.refused.keys()


def written_patterns(config: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's patterns, by full paths, from the settings of each target by its path."""
    return {
        "rank_pattern": {path: one.rank for path, one in layers.items() if one.rank != config.rank},
        "alpha_pattern": {
            path: plain(one.alpha) for path, one in layers.items() if one.alpha != config.alpha
        },
    }
