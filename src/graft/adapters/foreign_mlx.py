"""mlx-lm's adapter directories: adapters.safetensors and adapter_config.json.

A layer has lora_a (in, rank) and lora_b (rank, out), both transposed against PEFT, and adds
scale * (x lora_a) lora_b with a raw `scale`, not alpha / rank; DoRA has m (out,) beside them. An embedding
has lora_a (vocabulary, rank) and lora_b (rank, dim). The config has one rank and one scale for all, names the
layers by their paths within a block, and counts `num_layers` blocks from the last one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graft.adapters.foreign_layers import ForeignLayer, paired, uniform
from graft.adapters.peft_fields import Field, number, shown, whole
from graft.errors import AdapterError

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
LEAVES = ("lora_a", "lora_b", "m")

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def read(tensors: Mapping[str, Tensor], settings: Field, num_blocks: int, where: str) -> list[ForeignLayer]:
    """The layers of an adapter.

    Args:
        tensors: Of adapters.safetensors, by their names.
        settings: adapter_config.json.
        num_blocks: Of the model.
        where: The file of the tensors, for errors.

    Raises:
        AdapterError: The config is of full fine-tuning or has no scale, or tensors and config disagree.
    """
    kind = settings.raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"fine_tune_type = {shown(kind)} is no adapter",
            where=f"{settings.path}: fine_tune_type",
            fix="load its weights as a model",
        )
    parameters = settings.raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(
            f"lora_parameters = {shown(parameters)} is not an object",
            where=f"{settings.path}: lora_parameters",
            fix="use the adapter_config.json that mlx-lm wrote beside the tensors",
        )
    inner = Field(parameters, settings.path)
    rank, scaling = inner.read("rank", whole, None), inner.read("scale", number, None)
    if rank is None or scaling is None:
        raise AdapterError(
            "lora_parameters has no rank or no scale, and neither follows from the tensors",
            where=f"{settings.path}: lora_parameters",
            fix="use the adapter_config.json that mlx-lm wrote beside the tensors",
        )
    first = _first_block(settings, num_blocks)
    layers = []
    for path, (down, up, magnitude) in paired(tensors, LEAVES, where).items():
        _check(path, (down, up, magnitude), kind, rank, where)
        block = _BLOCK.fullmatch(path)
        if block and int(block[1]) < first:
            raise AdapterError(
                f"{path} lies before the last {num_blocks - first} of {num_blocks} blocks, which num_layers "
                "says are adapted",
                where=f"{settings.path}: num_layers",
                fix="use the base that it was trained on",
            )
        layers.append(ForeignLayer(path, down.t().contiguous(), up.t().contiguous(), scaling, magnitude))
    return layers


def _first_block(settings: Field, num_blocks: int) -> int:
    """The first block that carries an adapter; no number, 0 and below mean all, as mlx-lm slices them."""
    count = settings.read("num_layers", whole, 0)
    return num_blocks - count if 0 < count < num_blocks else 0


def _check(path: str, parts: tuple[Tensor, Tensor, Tensor | None], kind: str, rank: int, where: str) -> None:
    down, up, magnitude = parts
    if (magnitude is not None) != (kind == "dora"):
        raise AdapterError(
            f"{path} has {'a' if magnitude is not None else 'no'} magnitude m, and fine_tune_type is {kind}",
            where=where,
            fix="use the adapter_config.json that mlx-lm wrote beside the tensors",
        )
    if down.shape[1] != rank or up.shape[0] != rank:
        raise AdapterError(
            f"{path} has lora_a {list(down.shape)} and lora_b {list(up.shape)}; rank {rank} makes them "
            "(in, rank) and (rank, out)",
            where=where,
            fix="use the adapter_config.json that mlx-lm wrote beside the tensors",
        )


def write(
    layers: Sequence[ForeignLayer], num_blocks: int, dropout: float, base: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of an adapter.

    Args:
        layers: Of one kind, LoRA or DoRA.
        num_blocks: Of the model.
        dropout: Of the adapter's inputs in training.
        base: The base's name.

    Returns:
        What adapters.safetensors and adapter_config.json hold. A layer that the config names and that has no
        adapter keeps mlx-lm's first values, which change nothing.

    Raises:
        AdapterError: A layer has a path that mlx-lm's models do not have.
    """
    rank, scaling, alike = uniform(layers)
    tensors: dict[str, Tensor] = {}
    keys: list[str] = []
    first = num_blocks
    for layer in alike:
        block = _BLOCK.fullmatch(layer.path)
        if block is None and layer.path not in ("lm_head", "model.embed_tokens"):
            raise AdapterError(
                f"{layer.path!r} has another name in mlx-lm, or none",
                where=layer.path,
                fix="models whose blocks are model.layers.N can be written; merge the adapter for others",
            )
        if ".experts." in layer.path:
            raise AdapterError(
                "mlx-lm keeps the adapters of experts in stacks, which are not written",
                where=layer.path,
                fix="leave the experts out of target_modules, or merge the adapter",
            )
        if block:
            first = min(first, int(block[1]))
        keys.append(block[2] if block else layer.path)
        tensors[f"{layer.path}.lora_a"] = layer.down.t().contiguous()
        tensors[f"{layer.path}.lora_b"] = layer.up.t().contiguous()
        if layer.magnitude is not None:
            tensors[f"{layer.path}.m"] = layer.magnitude
    parameters = {"rank": rank, "scale": scaling, "dropout": dropout, "keys": sorted(set(keys))}
    # mlx-lm takes 0 for all blocks; where none is meant, naming the last one adds nothing.
    settings = {
        "fine_tune_type": "lora" if layers[0].magnitude is None else "dora",
        "lora_parameters": parameters,
        "model": base,
        "num_layers": max(1, num_blocks - first),
    }
    return tensors, settings
