"""Adapters on single experts, written as PEFT's adapters on stacks of experts where it could not join them.

PEFT joins the experts of a file into stacks as it loads it, but only where a checkpoint of the model has
single experts too, all three linears of all layers or the last of them alone are targets, and rank and alpha
are those of the whole file. It reads other files wrongly, or leaves the experts out without a word: those are
written as stacks here. Layout: `peft_stacks`, which reads them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.attached import Adapter
from graft.adapters.peft_fields import plain
from graft.adapters.peft_stacks import KINDS, A, B, experts_of, leaves_of, rows_of
from graft.models.experts import Experts, Layout

_METHODS = ("lora", "lora_fa")
"""Those that PEFT has on stacks."""

VERSION = "0.19.0"
"""The first PEFT that has this layout."""


def join_experts(
    model: nn.Module, known: Adapter, tensors: Mapping[str, Tensor]
) -> tuple[Adapter, dict[str, Tensor], dict[str, Any]]:
    """What a file holds of an adapter: its experts as stacks where PEFT needs that and they have that form.

    Args:
        model: The model that carries it.
        known: The adapter.
        tensors: Its tensors by their keys.

    Returns:
        The adapter without the experts, the tensors, and what adapter_config.json says of the stacks; all as
        they are, and nothing, where the experts stay single.

    Cost: a copy of the experts' tensors.
    """
    stacks = {
        f"{path}.{kind}": (experts, kind)
        for path, experts in experts_of(model).items()
        for kind in KINDS
        if any(f"{path}.{number}.{leaf}" in known.targets for number, leaf in _linears(experts, kind))
    }
    if not stacks or known.makes_up or not _may_be_stacked(known.config) or _peft_joins(model, known, stacks):
        return known, dict(tensors), {}
    if any(_settings(known, name, *stack) is None for name, stack in stacks.items()):
        return known, dict(tensors), {}  # no stack has another rank or none for some of its experts
    left, said = dict(tensors), {"target_parameters": sorted(stacks), "peft_version": VERSION}
    ranks, alphas = {}, {}
    for name, (experts, kind) in stacks.items():
        path = name.rpartition(".")[0]
        both = all(f"{path}.{each}" in stacks for each in KINDS)
        home = f"{path}.base_layer" if kind == KINDS[0] and both else path
        lora_a, lora_b = _stacked(left, experts, path, kind)
        left |= {f"{home}.{A}": lora_a, f"{home}.{B}": lora_b}
        config: Any = _settings(known, name, experts, kind)
        rank = len(lora_a) // len(experts)
        grown = rank / config.rank
        ranks[name] = rank
        alphas[name] = plain(config.alpha * (math.sqrt(grown) if config.use_rslora else grown))
    inner = {f"{path}." for path in experts_of(model)}
    rest = tuple(path for path in known.targets if not path.startswith(tuple(inner)))
    return dataclasses.replace(known, targets=rest), left, {**said, "ranks": ranks, "alphas": alphas}


def joined_settings(settings: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json with what `join_experts` says of the stacks.

    Args:
        settings: The file without them.
        said: What is said; empty leaves the file as it is.
    """
    if not said:
        return dict(settings)
    patterns = {
        "rank_pattern": {path: rank for path, rank in said["ranks"].items() if rank != settings["r"]},
        "alpha_pattern": {p: alpha for p, alpha in said["alphas"].items() if alpha != settings["lora_alpha"]},
    }
    return {
        **settings,
        **{name: {**settings[name], **more} for name, more in patterns.items()},
        "target_parameters": said["target_parameters"],
        "peft_version": said["peft_version"],
    }


def _may_be_stacked(config: Any) -> bool:
    """Whether PEFT has all that an adapter trains on stacks too; biases it has not."""
    biases = getattr(config, "lora_bias", False) or getattr(config, "bias", "none") != "none"
    return config.method in _METHODS and not biases


def _linears(experts: Experts, kind: str) -> list[tuple[int, str]]:
    return [(number, leaf) for number in range(len(experts)) for leaf in leaves_of(experts.layout, kind)]


def _settings(known: Adapter, name: str, experts: Experts, kind: str) -> Any:
    """The settings that all linears of a stack have in common; None where they differ or one has none."""
    path = name.rpartition(".")[0]
    paths = [f"{path}.{number}.{leaf}" for number, leaf in _linears(experts, kind)]
    if not known.targets or not set(paths) <= set(known.targets):
        return None
    found = {(one.rank, one.alpha): one for one in map(known.config.at, paths)}
    return next(iter(found.values())) if len(found) == 1 else None


def _peft_joins(model: nn.Module, known: Adapter, stacks: Mapping[str, tuple[Experts, str]]) -> bool:
    """Whether PEFT makes the same of a file with single experts."""
    kinds = {kind for _, kind in stacks.values()}
    whole = {
        f"{path}.{kind}": path for path, experts in experts_of(model).items() for kind in kinds
    }.keys() == stacks.keys()
    config = known.config
    same = all(
        (one := _settings(known, name, *stack)) is not None
        and (one.rank, one.alpha) == (config.rank, config.alpha)
        for name, stack in stacks.items()
    )
    gated = KINDS[0] in kinds
    return (
        whole
        and same
        and _single_in_files(model)
        and (not gated or (len(kinds) == 2 and not config.use_rslora))
    )


def _single_in_files(model: nn.Module) -> bool:
    """Whether checkpoints of the model hold single experts, as far as PEFT knows."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(
        isinstance(item, WeightConverter) and item.target_patterns[0].endswith(KINDS[0])
        for item in get_model_conversion_mapping(model)
    )


def _stacked(tensors: dict[str, Tensor], experts: Experts, path: str, kind: str) -> tuple[Tensor, Tensor]:
    """lora_A (E rank, in) and lora_B (out, rank E) of a stack; its experts' tensors are taken out.

    Gate and up keep an A in common where they have the same; else the stack has the rows of both.
    """
    leaves = leaves_of(experts.layout, kind)
    pairs = [
        [
            tuple(tensors.pop(f"{path}.{number}.{leaf}.{part}").detach().cpu() for part in (A, B))
            for leaf in leaves
        ]
        for number in range(len(experts))
    ]
    shared = all(torch.equal(a, parts[0][0]) for parts in pairs for a, _ in parts[1:])
    down, up = [], []
    for parts in pairs:
        down.append(parts[0][0] if shared else torch.cat([a for a, _ in parts]))
        up.append(_joined_up([b for _, b in parts], experts.layout, shared))
    return torch.cat(down), torch.stack(up, 2).flatten(1)


def _joined_up(parts: list[Tensor], layout: Layout, shared: bool) -> Tensor:
    """(out, rank) of one expert in a stack: each part in its rows and, without a common A, in its columns."""
    height, rank = parts[0].shape
    joined = parts[0].new_zeros(len(parts) * height, rank if shared else len(parts) * rank)
    for number, part in enumerate(parts):
        rows = rows_of(number, len(parts), layout.interleaved, len(joined))
        columns = slice(None) if shared else slice(number * rank, (number + 1) * rank)
        joined[rows, columns] = part
    return joined
