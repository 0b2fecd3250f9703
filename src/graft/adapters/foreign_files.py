"""Files of other tools' adapters: found, opened, told apart by the names of their tensors, read as layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from graft.adapters import foreign_loralib, foreign_mlx, foreign_torchtune
from graft.adapters.foreign_layers import ForeignLayer
from graft.adapters.foreign_loralib import Enabled
from graft.adapters.peft_config import read_object
from graft.adapters.peft_fields import Field, number, whole
from graft.adapters.peft_tensors import WEIGHTS as PEFT_WEIGHTS
from graft.adapters.peft_tensors import check_finite
from graft.config import did_you_mean
from graft.errors import AdapterError, ModelError
from graft.models.layers import BaseLayer
from graft.models.shards import open_bin, open_safetensors

Dialect = Literal["mlx", "torchtune", "loralib"]
DIALECTS: tuple[Dialect, ...] = ("mlx", "torchtune", "loralib")

_ENDS: dict[str, Dialect] = {
    **dict.fromkeys((".lora_a", ".lora_b"), "mlx"),
    **dict.fromkeys((".lora_a.weight", ".lora_b.weight"), "torchtune"),
    **dict.fromkeys((".lora_A", ".lora_B"), "loralib"),
}


def is_foreign(directory: Path) -> bool:
    """Whether a directory holds an adapter of mlx-lm or torchtune, and none in PEFT's format."""
    names = (foreign_mlx.WEIGHTS, foreign_torchtune.WEIGHTS)
    return not (directory / PEFT_WEIGHTS).exists() and any((directory / name).is_file() for name in names)


def weights_in(place: Path) -> Path:
    """The file of the tensors: the place itself, or the one in a directory.

    Raises:
        AdapterError: The directory has none under a name that is known.
    """
    if not place.is_dir():
        return place
    for name in (foreign_mlx.WEIGHTS, foreign_torchtune.WEIGHTS):
        if (place / name).is_file():
            return place / name
    there = ", ".join(sorted(file.name for file in place.iterdir())[:8]) or "nothing"
    raise AdapterError(
        f"there is neither {foreign_mlx.WEIGHTS} nor {foreign_torchtune.WEIGHTS}, but {there}",
        where=str(place),
        fix="PEFT's directories are read by graft.load_adapter; of loralib give the file",
    )


def open_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file; a pickle is opened by the unpickler that runs no code.

    Raises:
        AdapterError: There is none, or it is damaged or holds anything but finite floating point tensors.
    """
    if not file.is_file():
        raise AdapterError(
            "there is no such file", where=str(file), fix="give a directory or a file of tensors"
        )
    try:
        opener = open_safetensors if file.suffix == ".safetensors" else open_bin
        tensors = {tensor.name: tensor.load() for tensor in opener(file)}
    except ModelError as error:
        raise AdapterError(
            error.what, where=error.where, fix="save the tensors alone, and copy them again"
        ) from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(
                f"{key!r} holds {tensor.dtype}, no floating point numbers",
                where=str(file),
                fix="copy it again",
            )
        check_finite(tensor, key, str(file))
    return tensors


def dialect_of(tensors: Mapping[str, Tensor], file: Path) -> Dialect:
    """Whose tensors these are, by the ends of their names.

    Raises:
        AdapterError: Of none of these tools, or of several.
    """
    found = {kind for key in tensors for end, kind in _ENDS.items() if key.endswith(end)}
    if len(found) == 1:
        return found.pop()
    some = ", ".join(repr(key) for key in list(tensors)[:3]) or "nothing"
    raise AdapterError(
        f"this is an adapter of none of {', '.join(DIALECTS)}: it holds {some}"
        if not found
        else f"it holds tensors of {' and '.join(sorted(found))}",
        where=str(file),
        fix="PEFT's directories are read by graft.load_adapter",
    )


def read_layers(
    dialect: Dialect,
    tensors: Mapping[str, Tensor],
    file: Path,
    model: nn.Module,
    views: Mapping[str, BaseLayer],
    alpha: float | None,
    enabled: Enabled,
) -> list[ForeignLayer]:
    """The layers of an adapter.

    Args:
        dialect: Whose tensors they are.
        tensors: By their names in the file.
        file: Where they are from; the tool's settings lie beside it.
        model: The base model.
        views: Its layers.
        alpha: Where no file says it.
        enabled: loralib's fused linears.

    Raises:
        AdapterError: As for `load_foreign_adapter`.
    """
    beside = file.parent / "adapter_config.json"
    if dialect == "mlx":
        _refuse_alpha(alpha, beside)
        settings = Field(read_object(beside), beside)
        return foreign_mlx.read(tensors, settings, num_blocks(model), str(file))
    if dialect == "torchtune":
        if beside.is_file():
            _refuse_alpha(alpha, beside)
            alpha = _torchtune_alpha(Field(read_object(beside), beside), tensors)
        return foreign_torchtune.read(tensors, _given(alpha, file), model_config(model), str(file))
    sides = {path: view.out_features for path, view in views.items()}
    layers = foreign_loralib.read(tensors, _given(alpha, file), sides, enabled, str(file))
    check_enabled(enabled, [layer.path for layer in layers])
    return layers


def _given(alpha: float | None, file: Path) -> float:
    if alpha is None or not math.isfinite(alpha) or alpha <= 0:
        raise AdapterError(
            "the file does not say by what the update is scaled"
            if alpha is None
            else f"alpha {alpha!r} is not a positive number",
            where=str(file),
            fix="give alpha=, the lora_alpha that the model was built with",
        )
    return alpha


def _refuse_alpha(alpha: float | None, beside: Path) -> None:
    if alpha is not None:
        raise AdapterError(
            f"alpha {alpha!r} cannot act: {beside.name} says how the update is scaled",
            where="alpha",
            fix="leave it out",
        )


def _torchtune_alpha(settings: Field, tensors: Mapping[str, Tensor]) -> float | None:
    alpha, rank = settings.read("lora_alpha", number, None), settings.read("r", whole, None)
    ranks = {len(tensor) for key, tensor in tensors.items() if key.endswith("lora_a.weight")}
    if rank is not None and ranks != {rank}:
        raise AdapterError(
            f"r = {rank}, and the tensors have rank {', '.join(map(str, sorted(ranks)))}",
            where=f"{settings.path}: r",
            fix="use the adapter_config.json that torchtune wrote beside the tensors",
        )
    return None if alpha is None else float(alpha)


def check_enabled(enabled: Enabled, paths: Sequence[str]) -> None:
    """Check that each fused linear that is named is among the layers.

    Raises:
        AdapterError: One is not.
    """
    for end in enabled:
        if not any(f".{path}".endswith(f".{end}") for path in paths):
            raise AdapterError(
                f"enabled names {end!r}, which none of the {len(paths)} layers ends with",
                where="enabled",
                fix=did_you_mean(end, {path.rpartition(".")[2] for path in paths}),
            )


def model_config(model: nn.Module) -> Any:
    """The configuration of a language model, also inside one of several kinds of input."""
    config = getattr(model, "config", None)
    ask = getattr(config, "get_text_config", None)
    return ask() if callable(ask) else config


def num_blocks(model: nn.Module) -> int:
    """Blocks of a model.

    Raises:
        AdapterError: It does not say.
    """
    found = getattr(model_config(model), "num_hidden_layers", None)
    if not isinstance(found, int):
        raise AdapterError(
            f"a {type(model).__name__} does not say how many blocks it has, and mlx-lm counts them",
            where="model",
            fix="give a model of graft.load",
        )
    return found
