"""Which stored tensors make which tensors of a model: old names, other prefixes, fused experts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.config import closest
from graft.errors import ModelError
from graft.models.shards import StoredTensor

Read = Callable[[StoredTensor], Tensor]

# Buffers that old checkpoints stored and that models now compute.
_COMPUTED = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"attn\.masked_bias$",
    r"attention\.masked_bias$",
)


@dataclass
class Fill:
    """Stored tensors that together make one tensor of the model, or a few."""

    target: str
    sources: list[StoredTensor] = field(default_factory=list)
    converter: Any = None
    """A transformers WeightConverter, where the tensors are more than renamed."""
    patterns: list[str] = field(default_factory=list)

    def realize(self, read: Read, model: Any) -> dict[str, Tensor]:
        """Read the sources and give the model's tensors by name.

        Args:
            read: Called once per source.
            model: Whose config the conversion may need.

        Cost: holds all sources at once; that is one tensor, except for fused experts.
        """
        if self.converter is None:
            return {self.target: read(self.sources[0])}
        converter = copy.deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.target, source.name, pattern, partial(read, source))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def plan_fills(model: Any, stored: Iterable[StoredTensor]) -> list[Fill]:
    """Find for each stored tensor where it goes, in the order in which the files hold them.

    Args:
        model: A transformers model, its parameters may be on the meta device.
        stored: What the checkpoint holds.

    Returns:
        The fills; checkpoint buffers that the model computes itself are left out.

    Raises:
        ModelError: A stored tensor that the model has no place for, two for one place, or a wrong shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    renamings = [item for item in transforms if not isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    fills: dict[str, Fill] = {}
    for tensor in stored:
        target, pattern = _rename(tensor.name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected:
            _check_ignorable(model, tensor, target, expected)
            continue
        fill = fills.setdefault(target, Fill(target, converter=by_pattern.get(pattern)))
        fill.sources.append(tensor)
        if pattern is None:
            _check_simple(fill, expected[target])
        else:
            fill.patterns.append(pattern)
    return list(fills.values())


def _rename(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, expected: dict[str, Tensor]
) -> tuple[str, str | None]:
    from transformers.core_model_loading import rename_source_key

    target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
    if target not in expected and name in expected:
        return name, None  # an old name's pattern hit a name that is right as it stands
    return target, pattern


def _check_simple(fill: Fill, wanted: Tensor) -> None:
    tensor = fill.sources[-1]
    if len(fill.sources) > 1:
        raise ModelError(
            f"{fill.sources[0].name!r} and {tensor.name!r} are both for {fill.target!r}",
            where=str(tensor.file),
            fix="download the model again; its shards come from different versions",
        )
    if tensor.shape != tuple(wanted.shape):
        raise ModelError(
            f"the shape is {list(tensor.shape)}, config.json makes it {list(wanted.shape)}",
            where=tensor.where,
            fix="use the config.json and the weights of one and the same model",
        )


def _check_ignorable(model: Any, tensor: StoredTensor, target: str, expected: dict[str, Tensor]) -> None:
    patterns = [*_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    if any(re.search(pattern, target) for pattern in patterns):
        return
    near = closest(target, expected)
    raise ModelError(
        f"{type(model).__name__} has no place for the tensor {tensor.name!r}"
        + (f"; the closest is {near!r}" if near else ""),
        where=str(tensor.file),
        fix="use the config.json and the weights of one and the same model",
    )


def check_complete(
    model: Any, expected: Iterable[str], filled: Iterable[str], stored: list[StoredTensor], directory: Path
) -> None:
    """Check that every tensor of the model is filled, or tied to one that is.

    Args:
        model: The transformers model; it knows which tensors are tied.
        expected: The names of its tensors when it was empty.
        filled: The names that the checkpoint fills.
        stored: What the checkpoint holds.
        directory: Of the checkpoint.

    Raises:
        ModelError: One is missing; the closest stored name is told.
    """
    missing = set(expected) - set(filled)
    for target, source in model.all_tied_weights_keys.items():
        if target not in missing or source not in missing:
            missing -= {target, source}
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    lost = sorted(name for name in missing if not any(re.search(pattern, name) for pattern in patterns))
    if not lost:
        return
    near = closest(lost[0], [tensor.name for tensor in stored])
    more = f" (and {len(lost) - 1:,} more)" if len(lost) > 1 else ""
    raise ModelError(
        f"the weights have no tensor {lost[0]!r}{more}",
        where=str(directory),
        fix=(f"the closest one there is {near!r}; " if near else "")
        + "use the config.json and the weights of one and the same model",
    )


def check_finite(tensor: Tensor, source: StoredTensor) -> None:
    """Check that a stored tensor holds neither NaN nor infinity.

    Raises:
        ModelError: It does; file and tensor are named.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    flat = tensor.float() if tensor.dtype.itemsize < 2 else tensor
    low, high = torch.aminmax(flat)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(flat)).sum())
        raise ModelError(
            f"{bad:,} of {tensor.numel():,} values are NaN or infinite",
            where=source.where,
            fix="download the file again; a model with such weights answers nothing",
        )
