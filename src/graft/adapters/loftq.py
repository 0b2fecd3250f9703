"""LoftQ in several rounds: a base quantized together with an adapter that makes up for its rounding.

After the first round the codes are no longer those of the dense weights, so that what comes out is a base of
its own: a directory, with the first adapter in it.

Source: LoftQ, arXiv:2310.08659, alg. 1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from graft.adapters.attach import install
from graft.adapters.factorize import rounding_factors
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import save_adapter
from graft.adapters.rounding_starts import LOFTQ_DIRECTORY, ROUNDS, Start
from graft.adapters.selected import selection_of
from graft.adapters.starts import Starts, check_targets
from graft.adapters.targets import select_targets
from graft.dialects import explained
from graft.errors import ConfigError
from graft.files import new_directory
from graft.models.architecture import build_empty, read_config
from graft.models.experts import split_experts
from graft.models.load import load
from graft.models.locate import resolve, rooted_name
from graft.models.quantize import QuantizedDirectory, check_place, quantize
from graft.quant.config import QuantizationConfig
from graft.quant.tensor import QuantizedTensor
from graft.quant.tensor import quantize as quantize_tensor


@explained
def loftq(
    name: str | os.PathLike[str],
    quantization: QuantizationConfig | str,
    config: LoraConfig,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[QuantizedDirectory, dict[str, list[float]]]:
    """Quantize a model directory together with an adapter that makes up for what the rounding loses.

    `graft.load(out)` is the base; the adapter in `out/loftq_init` belongs to it and to no other. It is where
    `graft.attach` starts from with the same settings, and `graft.load_adapter(..., trainable=True)` too.

    Args:
        name: A directory, a hub id, or "builtin"; dense.
        quantization: How linears are stored, or only the quant_type.
        config: The adapter, with init "loftq"; init_iterations says how many rounds.
        out: The directory to make; it appears whole or not at all.
        revision: Branch, tag or commit of a hub id.
        overwrite: Whether a model directory of that name is replaced, once the new one is whole.
        progress: Called with (bytes read, bytes in all) after each tensor.

    Returns:
        Sizes and digests; by layer the error ||W - Q - scaling * B A|| / ||W|| after each round, of which
        the best is what is written.

    Raises:
        ConfigError: The adapter's settings do not fit.
        TargetError: They select nothing, or an embedding.
        ModelError: The model cannot be read, or is quantized already.
        StorageError: `out` exists, or cannot be written.

    Cost: a randomized SVD of each weight in each round; then the quantized model in memory.
    """
    if config.init != "loftq":
        raise ConfigError(f"init is {config.init!r}", where="adapter.init", fix='LoraConfig(init="loftq")')
    out, path = Path(out), resolve(name, revision)
    check_place(out, path, overwrite)
    twin = build_empty(read_config(path), torch.float32, path)
    split_experts(twin)
    targets = select_targets(twin, selection_of(config))
    check_targets(config, targets)
    layers: dict[str, Start] = {}
    errors: dict[str, list[float]] = {}

    def rounding(path: str, weight: Tensor, settings: QuantizationConfig) -> QuantizedTensor:
        if path not in targets:
            return quantize_tensor(weight, settings, where=path)
        one = config.at(path)
        stored, pair, errors[path] = rounding_factors(
            weight,
            lambda rest: quantize_tensor(rest, settings, where=path),
            one.rank,
            one.scaling,
            config.init_iterations or 1,
        )
        layers[path] = Start(*pair, subtract=False)
        return dataclasses.replace(stored, dtype=weight.dtype)

    with new_directory(out, replace=out.exists()) as partial:
        partial.rmdir()  # quantize makes it anew
        report = quantize(
            name, quantization, partial, revision=revision, progress=progress, rounding=rounding
        )
        base = load(partial)
        base.model.graft_name = rooted_name(out)
        starts = Starts(config, layers, tuple(targets))
        install(base.model, config, selection_of(config), "default", seed=0, starts=starts)
        save_adapter(base.model, partial / LOFTQ_DIRECTORY, facts={ROUNDS: config.init_iterations or 1})
    return dataclasses.replace(report, directory=out), errors
