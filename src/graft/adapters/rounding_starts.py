"""Starts that make up for the rounding of a base: made from its dense weights, or found beside its codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.factorize import SHARP, principal_factors
from graft.adapters.peft_config import read_settings
from graft.adapters.peft_tensors import open_weights, read_tensors
from graft.adapters.side_file import base_fingerprint, read_side_file
from graft.errors import AdapterError, ConfigError
from graft.models.layers import BaseLayer
from graft.models.locate import resolve
from graft.models.originals import original_weights_of
from graft.quant.layout import FLOATS
from graft.quant.linear import QuantizedLinear
from graft.quant.tensor import quantize

LOFTQ_DIRECTORY = "loftq_init"
"""Holds the first adapter of a base that was made in rounds, in its directory."""


ROUNDS = "loftq_rounds"
"""Among the facts of that adapter: how many rounds it was made in."""


@dataclass(frozen=True)
class Start:
    """First factors of one layer."""

    lora_A: Tensor  # noqa: N815 - the tensor's name
    lora_B: Tensor  # noqa: N815 - the tensor's name
    subtract: bool
    """Whether the update is measured from them."""


def loftq_starts(model: nn.Module, config: Any, targets: Mapping[str, BaseLayer]) -> dict[str, Start]:
    """Starts that make up for rounding, by path; dense layers have none.

    Args:
        model: Its base was quantized as it was loaded, or by `graft quantize --set adapter.init=loftq`.
        config: LoRA's settings.
        targets: Layers by path.

    Raises:
        ConfigError: The base is dense or of another library, or the settings are not those it was made with.
        AdapterError: The files hold other weights than were quantized.
        ModelError: The weights before rounding are not to be had.
    """
    packed = {path: base.module for path, base in targets.items() if base.quantized}
    layers = {path: module for path, module in packed.items() if isinstance(module, QuantizedLinear)}
    if not layers or len(layers) < len(packed):
        what = next((path for path in packed if path not in layers), "")
        raise ConfigError(
            f"init 'loftq' makes up for rounding, and {what or 'the base'} is "
            + ("quantized by another library" if what else "dense"),
            where="adapter.init",
            fix="load the dense model with quantization=, such as nf4",
        )
    name = getattr(model, "graft_name", None)
    if name is not None:
        directory = resolve(name, getattr(model, "graft_revision", None)) / LOFTQ_DIRECTORY
        if directory.is_dir():
            return _found(model, config, layers, directory)
    if (config.init_iterations or 1) > 1:
        raise ConfigError(
            f"init_iterations {config.init_iterations}: after the first round the base is another one",
            where="adapter.init_iterations",
            fix="leave it out, or make that base with graft quantize --set adapter.init=loftq",
        )
    return dict(_made(model, config, layers))


def _made(
    model: nn.Module, config: Any, layers: Mapping[str, QuantizedLinear]
) -> Iterator[tuple[str, Start]]:
    for path, weight in original_weights_of(model, layers):
        layer, one = layers[path], config.at(path)
        if weight.dtype not in FLOATS.values():  # as it was loaded
            weight = weight.float()
        if not _is_of(layer, weight):
            raise AdapterError(
                f"{path} has other weights in its files than were quantized",
                where=path,
                fix="load the model again",
            )
        lost = weight.to(layer.codes.device, torch.float32) - layer.dense_weight(torch.float32)
        if bool(lost.any()):  # what was rounded without loss starts as any other layer
            pair = principal_factors(lost, one.rank, one.scaling, iterations=SHARP)
            yield path, Start(*pair, subtract=False)


def _is_of(layer: QuantizedLinear, weight: Tensor) -> bool:
    """Whether a layer holds the plain rounding of a weight, made on the CPU or where the layer is now."""
    held = {name: part.cpu() for name, part in layer.quantized_weight.parts().items()}
    for device in dict.fromkeys(("cpu", str(layer.codes.device))):
        parts = quantize(weight.to(device), layer.config).parts()
        if all(torch.equal(part.cpu(), held[name]) for name, part in parts.items()):
            return True
    return False


def _found(
    model: nn.Module, config: Any, layers: Mapping[str, QuantizedLinear], directory: Path
) -> dict[str, Start]:
    side = read_side_file(directory)
    if side is None or side.base.weights != base_fingerprint(model).weights:
        raise AdapterError(
            "the adapter there does not belong to this base",
            where=str(directory),
            fix="make the base again with graft quantize --set adapter.init=loftq",
        )
    rounds = side.facts.get(ROUNDS)
    if config.init_iterations not in (None, rounds):
        raise ConfigError(
            f"the base was made in {rounds} rounds, asked for are {config.init_iterations}",
            where="adapter.init_iterations",
            fix="leave it out, or make the base again with graft quantize --set adapter.init=loftq",
        )
    made, _ = read_settings(directory / "adapter_config.json")
    stored = open_weights(directory)
    values = read_tensors(stored, side, directory)
    starts = {}
    for path in layers:
        keys = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        then, now = made.config.at(path), config.at(path)
        if keys[0] not in values or (then.rank, then.scaling) != (now.rank, now.scaling):
            told = f"rank {then.rank} and scaling {then.scaling:g}" if keys[0] in values else "no adapter"
            raise ConfigError(
                f"the base was made with {told} for {path}, asked for are rank {now.rank} and scaling "
                f"{now.scaling:g}",
                where="adapter",
                fix="give the settings that graft quantize --set adapter.init=loftq was given",
            )
        starts[path] = Start(values[keys[0]], values[keys[1]], subtract=False)
    return starts
