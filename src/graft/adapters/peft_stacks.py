"""Adapters that PEFT trained on stacks of experts (target_parameters), read as adapters of single experts.

For a stack of E experts PEFT keeps lora_A (E rank, in), the experts' rows one after the other, and lora_B
(out, rank E), in whose columns the expert runs fastest. Where both stacks of a layer are targets, the first
lies in `experts.base_layer`. Layout: PEFT 0.19 and newer; before, in and out were swapped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.patterns import first_match
from graft.adapters.peft_config import PeftSettings
from graft.adapters.targets import Selection
from graft.errors import AdapterError
from graft.models.experts import Experts, Layout
from graft.models.shards import StoredTensor

KINDS = ("gate_up_proj", "down_proj")
"""The stacks of a layer."""
A, B = "lora_A.weight", "lora_B.weight"


def split_stacks(
    model: nn.Module,
    settings: PeftSettings,
    stored: dict[str, StoredTensor],
    version: Any,
    file: Path,
    *,
    ours: bool = False,
) -> tuple[PeftSettings, dict[str, StoredTensor]]:
    """Turn the tensors of stacks into those of single experts; gate and up share lora_A to begin with.

    In files of our own they may have an A each, one after the other (`peft_join`), and get these back.

    Args:
        model: Where the adapter goes; its experts are split.
        settings: What adapter_config.json says.
        stored: The tensors of the file by their keys.
        version: Of the PEFT that wrote it, as adapter_config.json has it.
        file: Of the tensors.
        ours: Whether graft wrote it.

    Returns:
        Settings and tensors that say the same without target_parameters; as they are where there are none.

    Raises:
        AdapterError: target_parameters names something else than stacks of this model's experts, a tensor is
            missing or of another shape, or the file is from before PEFT 0.19.
    """
    if not settings.target_parameters:
        return settings, stored
    _check_version(version, file)
    rest = dict(stored)
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for path, experts in experts_of(model).items():
        kinds = [kind for kind in KINDS if _is_named(f"{path}.{kind}", settings.target_parameters)]
        for kind in kinds:
            home = f"{path}.base_layer" if kind == KINDS[0] and len(kinds) == 2 else path
            if f"{home}.{A}" not in rest:
                continue  # only some layers are targets; what is left over is refused by its name
            down, up = (_taken(rest, f"{home}.{leaf}", file) for leaf in (A, B))
            rank = _rank(experts, kind, down, up)
            apart = ours and _are_apart(experts, kind, rank, up)
            rest |= {item.name: item for item in _single(experts, path, kind, rank, down, up, apart)}
            found[path, kind] = _of_one(settings.config, f"{path}.{kind}", rank, apart)
    _check_all_named(settings.target_parameters, {kind for _, kind in found}, file)
    return _restated(settings, model, found), rest


def current_names(model: nn.Module, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Give tensors of mixtures the paths of this transformers where they have those of an older one.

    Args:
        model: Where the adapter goes.
        stored: The tensors of the file by their keys.

    Returns:
        The same tensors; those of other models keep their keys.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not experts_of(model):
        return stored
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    return {rename_source_key(key, renamings, [])[0]: tensor for key, tensor in stored.items()}


def leaves_of(layout: Layout, kind: str) -> tuple[str, ...]:
    """Names of the linears of one expert that lie in a stack.

    Args:
        layout: Of the experts.
        kind: One of `KINDS`.
    """
    return layout.leaves[:2] if kind == KINDS[0] else layout.leaves[2:]


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """The split experts of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Experts)}


def _check_version(version: Any, file: Path) -> None:
    found = re.match(r"(\d+)\.(\d+)", str(version))
    if found is None or (int(found[1]), int(found[2])) < (0, 19):
        raise AdapterError(
            f"target_parameters of PEFT {version}: before 0.19, in and out of a stack were swapped",
            where=f"{file.parent / 'adapter_config.json'}: peft_version",
            fix="load it with its PEFT and save it with a newer one, or merge it into its base there",
        )


def _is_named(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _check_all_named(names: tuple[str, ...], found: set[str], file: Path) -> None:
    for name in names:
        if name.rpartition(".")[2] not in found:
            raise AdapterError(
                f"target_parameters names {name!r}, which is no stack of experts of this model",
                where=f"{file.parent / 'adapter_config.json'}: target_parameters",
                fix="stacks that can be read are gate_up_proj and down_proj of a mixture's experts",
            )


def _taken(stored: dict[str, StoredTensor], key: str, file: Path) -> StoredTensor:
    if key not in stored:
        raise AdapterError(
            f"there is no tensor {key!r}, and target_parameters calls for it",
            where=str(file),
            fix="copy the adapter again",
        )
    return stored.pop(key)


def _rank(experts: Experts, kind: str, lora_a: StoredTensor, lora_b: StoredTensor) -> int:
    layout = experts.layout
    leaves = leaves_of(layout, kind)
    linear: Any = getattr(experts[0], leaves[0])
    out_features = len(leaves) * linear.out_features
    rank = lora_a.shape[0] // layout.num_experts
    wanted_a, wanted_b = (
        (layout.num_experts * rank, linear.in_features),
        (out_features, rank * layout.num_experts),
    )
    for tensor, wanted in ((lora_a, wanted_a), (lora_b, wanted_b)):
        if tensor.shape != wanted or not rank:
            raise AdapterError(
                f"the shape is {list(tensor.shape)}; {layout.num_experts} experts make it {list(wanted)}",
                where=tensor.where,
                fix="load the base that it was made for",
            )
    return rank


def _are_apart(experts: Experts, kind: str, rank: int, lora_b: StoredTensor) -> bool:
    """Whether gate and up use the two halves of a stack's rank, each its own."""
    if kind != KINDS[0] or rank % 2:
        return False
    up = lora_b.load().unflatten(1, (2, -1))
    gate, other = (rows_of(part, 2, experts.layout.interleaved, len(up)) for part in range(2))
    return not bool(up[gate, 1].any()) and not bool(up[other, 0].any())


def _single(
    experts: Experts,
    path: str,
    kind: str,
    rank: int,
    lora_a: StoredTensor,
    lora_b: StoredTensor,
    apart: bool,
) -> Iterator[StoredTensor]:
    layout = experts.layout
    leaves = leaves_of(layout, kind)
    a, b = cache(lora_a.load), cache(lora_b.load)
    own = rank // 2 if apart else rank
    for number in range(layout.num_experts):
        for part, leaf in enumerate(leaves):
            first = part * own if apart else 0
            rows = rows_of(part, len(leaves), layout.interleaved, lora_b.shape[0])
            start = number * rank + first
            columns = slice(first * layout.num_experts + number, None, layout.num_experts)
            yield StoredTensor(
                f"{path}.{number}.{leaf}.{A}",
                lora_a.file,
                lora_a.dtype,
                (own, lora_a.shape[1]),
                partial(_piece, a, slice(start, start + own), slice(None)),
            )
            yield StoredTensor(
                f"{path}.{number}.{leaf}.{B}",
                lora_b.file,
                lora_b.dtype,
                (lora_b.shape[0] // len(leaves), own),
                partial(_piece, b, rows, columns, own),
            )


def rows_of(part: int, num_parts: int, interleaved: bool, num_rows: int) -> slice:
    """Where the rows of one of the linears lie in the rows of a stack."""
    if interleaved:
        return slice(part, None, num_parts)
    size = num_rows // num_parts
    return slice(part * size, (part + 1) * size)


def _piece(load: Any, rows: slice, columns: slice, width: int | None = None) -> Tensor:
    piece: Tensor = load()[rows, columns][:, :width].contiguous()
    return piece


def _of_one(config: Any, path: str, rank: int, apart: bool) -> tuple[int, float]:
    """Rank and alpha of the linears of a stack; half the rank where each has its own, in the same scaling."""
    alpha = float(next(first_match(config.alpha_pattern, path), f"={config.alpha!r}").rpartition("=")[2])
    if not apart:
        return rank, alpha
    return rank // 2, round(alpha / (math.sqrt(2) if config.use_rslora else 2), 9)


def _restated(
    settings: PeftSettings, model: nn.Module, found: Mapping[tuple[str, str], tuple[int, float]]
) -> PeftSettings:
    """The same settings in names of linears: the file's keys are the targets, patterns name experts."""
    config = settings.config
    layout = next(iter(experts_of(model).values())).layout
    places: dict[str, tuple[int, float]] = {}
    for kind in KINDS:
        chosen = {path: pair for (path, other), pair in found.items() if other == kind}
        if len(set(chosen.values())) == 1:  # one pattern for all layers, as there may be many
            chosen = {"experts": next(iter(chosen.values()))}
        for path, pair in chosen.items():
            for leaf in leaves_of(layout, kind):
                places[rf"{re.escape(path)}\.\d+\.{re.escape(leaf)}"] = pair
    selection = Selection((), modules_to_save=settings.selection.modules_to_save)
    config = dataclasses.replace(
        config,
        exclude_modules=(),
        layers=None,
        rank_pattern=(*(f"{place}={rank}" for place, (rank, _) in places.items()), *config.rank_pattern),
        alpha_pattern=(
            *(f"{place}={alpha!r}" for place, (_, alpha) in places.items()),
            *config.alpha_pattern,
        ),
    )
    return dataclasses.replace(settings, config=config, selection=selection, target_parameters=())
