"""How adapter tensors start: from a generator of their own, so that nothing else changes them."""

from __future__ import annotations

import hashlib
import math

import torch

from graft.adapters.lora_layer import LoraEmbedding, LoraLinear


def generator_for(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the layer's path only.

    Neither the order of attaching nor torch's global generator has a part in it, and the values are the same
    on every device.
    """
    digest = hashlib.sha256(f"{seed}\0{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fill_lora(layer: LoraLinear | LoraEmbedding, init: str, generator: torch.Generator) -> None:
    """Give lora_A and lora_B their first values; their product is zero.

    Linear: A is Kaiming-uniform with a = sqrt(5), that is uniform within 1/sqrt(in_features), or normal with
    deviation 1/rank; B is zero. Embedding: A is zero, B is standard normal, since a column of A belongs
    to one token and a token not seen must stay unchanged.

    Args:
        layer: The layer to fill.
        init: "kaiming" or "gaussian".
        generator: Where the values come from.

    Source: LoRA, arXiv:2106.09685, sec. 4.1; loralib and PEFT for the uniform form.
    """
    with torch.no_grad():
        if isinstance(layer, LoraEmbedding):
            layer.lora_embedding_A.zero_()
            layer.lora_embedding_B.normal_(generator=generator)
            return
        layer.lora_B.zero_()
        rank, in_features = layer.lora_A.shape
        if init == "gaussian":
            layer.lora_A.normal_(std=1 / rank, generator=generator)
        else:
            bound = 1 / math.sqrt(in_features)
            layer.lora_A.uniform_(-bound, bound, generator=generator)
