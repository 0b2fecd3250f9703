"""How adapter tensors start: from a generator of their own, so that nothing else changes them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from graft.adapters.conv_layer import LoraConv
from graft.adapters.factorize import (
    Factors,
    leading_columns_factors,
    orthogonal_factors,
    principal_factors,
)
from graft.adapters.lora_layer import LoraEmbedding, LoraLinear
from graft.adapters.settings import DATA
from graft.errors import ConfigError
from graft.models.layers import BaseLayer


def generator_for(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the layer's path only.

    Neither the order of attaching nor torch's global generator has a part in it, and the values are the same
    on every device.
    """
    digest = hashlib.sha256(f"{seed}\0{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fill_lora(
    layer: LoraLinear | LoraEmbedding | LoraConv, base: BaseLayer, config: Any, generator: torch.Generator
) -> None:
    """Give lora_A and lora_B their first values; the update is zero.

    Linear: A is Kaiming-uniform with a = sqrt(5), that is uniform within 1/sqrt(in_features), or normal with
    deviation 1/rank; B is zero. Embedding: A is zero, B is standard normal, since a column of A belongs
    to one token and a token not seen must stay unchanged. The other starts are in `factorize`; those that
    are taken from the weight are subtracted from the update.

    Args:
        layer: The layer to fill.
        base: The layer below.
        config: Its settings, with `init`.
        generator: Where random values come from.

    Raises:
        ConfigError: The start is made from more than the base layer.

    Source: LoRA, arXiv:2106.09685, sec. 4.1; loralib and PEFT for the uniform form.
    """
    init = config.init
    if init in (*DATA, "loftq"):
        what = "batches of data" if init in DATA else "the weight before it was rounded"
        raise ConfigError(
            f"init {init!r} needs {what}, which a layer alone does not have",
            where="adapter.init",
            fix="graft.attach makes it",
        )
    with torch.no_grad():
        if isinstance(layer, LoraEmbedding):
            layer.lora_embedding_A.zero_()
            layer.lora_embedding_B.normal_(generator=generator)
        elif init == "gaussian":
            layer.lora_B.zero_()
            layer.lora_A.normal_(std=1 / len(layer.lora_A), generator=generator)
        elif init == "kaiming":
            bound = 1 / math.sqrt(layer.lora_A[0].numel())
            layer.lora_B.zero_()
            layer.lora_A.uniform_(-bound, bound, generator=generator)
        elif init == "orthogonal" and isinstance(layer, LoraLinear):
            pair = orthogonal_factors(len(layer.lora_A), base.in_features, base.out_features, generator)
            layer.begin_at(*pair, subtract=False)
        else:
            assert isinstance(layer, LoraLinear), "a convolution with another start is refused"
            layer.begin_at(*_of_weight(layer, base, config, generator), subtract=True)


def _of_weight(layer: LoraLinear, base: BaseLayer, config: Any, generator: torch.Generator) -> Factors:
    weight = base.dense_weight()
    if weight.is_meta:  # only shapes are asked for
        return torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B)
    if config.init == "olora":
        return leading_columns_factors(weight, config.rank)
    return principal_factors(
        weight, config.rank, config.scaling, iterations=config.init_iterations, generator=generator
    )
