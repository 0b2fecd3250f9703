"""Operations of a training step, and how many the machine does a second in a product of the model's shape."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, unwrapped
from graft.adapters.targets import block_number
from graft.data.loader import Batch
from graft.models.classifier import HEAD, is_classifier
from graft.models.experts import Experts
from graft.models.layers import BaseLayer
from graft.models.lean import GATED

MEASURE_SECONDS = 0.03
"""How long products are tried."""

MOST_OPERATIONS = 2e9
"""Of one product on a CPU; a longer one has fewer rows."""

FEWEST_ROWS, MOST_ROWS = 64, 1024
"""Rows of the product that is measured."""


@dataclass(frozen=True)
class StepCost:
    """Operations (an addition and a multiplication are two) of the forward and backward pass.

    With n a matrix's numbers, a token costs 2 n forward, 2 n for the gradient of its input where something
    below it trains, 2 n for its own where it trains, and 2 n where the block is recomputed; the head only for
    labelled tokens; causal attention 7 s q a layer, s the tokens of a document, q the width of all heads. A
    classifier's head is the one over its classes, and the last token of each text its labelled one. A pass
    of the base, which preferences are measured from, is one more forward: 2 n without adapters, 2 s q.

    Attributes:
        per_token: Of matrices, adapters included.
        per_labelled_token: Of the head.
        per_pair: Of attention, per token and token of its document.
    """

    per_token: float
    per_labelled_token: float
    per_pair: float

    def of(self, batches: Sequence[Batch]) -> float:
        """Operations that the real tokens of a step need; padding and what it costs do not count.

        Documents of a batch count with their mean length, which is at most what they cost.
        """
        total = 0.0
        for batch in batches:
            documents = max(1, sum(len(row) for row in batch.sample_ids))
            pairs = batch.num_tokens * batch.num_tokens / documents
            total += self.per_token * batch.num_tokens + self.per_pair * pairs
            total += self.per_labelled_token * batch.num_labelled_tokens
        return total


def step_cost(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    recomputed: bool,
    base_passes: int = 0,
    *,
    tiled: bool = False,
) -> StepCost:
    """What a step of a model costs.

    Args:
        model: The model, adapters attached.
        parameters: What is trained, by name.
        recomputed: Whether blocks are computed again in the backward pass.
        base_passes: Forward passes over the same tokens with no adapter and no gradient.
        tiled: Whether MLPs work in tiles, which are computed again in any case.
    """
    trained = {id(p) for p in parameters.values()}
    lowest = _lowest_trained(model, trained)
    passes = 2 * recomputed
    per_token = 0.0
    inside = set()
    for path, layer, share in _matrices(model):
        inside |= {id(p) for p in layer.module.parameters()}
        learns = any(id(p) in trained for p in layer.module.parameters())
        above = (block_number(path) or 0) >= lowest
        again = 2 * (recomputed or (tiled and not GATED.isdisjoint(path.split("."))))
        per_token += share * layer.in_features * layer.out_features * (2 + 2 * above + 2 * learns + again)
    head, head_module = _head(model), _head_module(model)
    of_head = (
        {id(p) for p in head_module.parameters()}
        if head_module and not isinstance(head_module, AdaptedLayer)
        else set()
    )
    looked_up = _embedding_ids(model) | {
        id(p) for n, p in parameters.items() if n.endswith("lora_embedding_A")
    }
    others = inside | of_head | looked_up
    per_token += 6.0 * sum(p.numel() for p in parameters.values() if id(p) not in others and p.dim() > 1)
    per_token += 2.0 * base_passes * _base_numbers(model)
    labelled = 0.0
    if head is not None:
        learns = bool(of_head & trained)
        labelled = (4.0 + 2 * learns + 2 * base_passes) * head.in_features * head.out_features
    config: Any = model.config
    num_layers, width = _attention(config.get_text_config())
    return StepCost(per_token, labelled, (7.0 + passes + 2 * base_passes) * width * num_layers)


def _base_numbers(model: nn.Module) -> float:
    """Of the matrices of the blocks that a token goes through with no adapter."""
    found = _matrices(model, base=True)
    return sum(share * layer.in_features * layer.out_features for _, layer, share in found)


def _matrices(model: nn.Module, base: bool = False) -> Iterator[tuple[str, BaseLayer, float]]:
    """The linears of the blocks, with the share of tokens that go through each.

    Args:
        model: The model.
        base: Whether adapters are off, so that a module computes and not the copy that trains.
    """
    head = _head(model)
    experts = [path for path, module in model.named_modules() if isinstance(module, Experts)]
    for path, module in model.named_modules():
        layer = BaseLayer.of(module)
        if (
            layer is None
            or layer.kind in ("embedding", "conv2d")
            or (head is not None and module is head.module)
        ):
            continue
        if ".copies." in path or (path.endswith(".original") and not base):
            continue  # the copy of a module counts as what trains
        share = 1.0
        if any(path.startswith(f"{home}.") for home in experts):
            share = _active_share(model)
        yield path, layer, share


def _active_share(model: nn.Module) -> float:
    found: Any = model.config
    config = found.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((count for name in names if (count := getattr(config, name, None))), 1)
    return min(1.0, float(getattr(config, "num_experts_per_tok", None) or total) / total)


def _head(model: nn.Module) -> BaseLayer | None:
    module = _head_module(model)
    return None if module is None else BaseLayer.of(unwrapped(module))


def _head_module(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    module = getattr(model, HEAD) if is_classifier(model) else find() if find else None
    return module if isinstance(module, nn.Module) else None


def _embedding_ids(model: nn.Module) -> set[int]:
    return {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)}


def _lowest_trained(model: nn.Module, trained: set[int]) -> float:
    """Number of the first block with something that trains; -1 for an embedding below all of them."""
    lowest = float("inf")
    for path, module in model.named_modules():
        if any(id(p) in trained for p in module.parameters(False)):
            number = block_number(f"{path}.")
            embeds = isinstance(module, nn.Embedding) or "lora_embedding_A" in dict(module.named_parameters())
            if number is not None or embeds:
                lowest = min(lowest, -1 if number is None else number)
    return lowest


def _attention(config: Any) -> tuple[int, int]:
    """Layers, and the width of all heads; zeros for a model without attention heads."""
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return int(getattr(config, "num_hidden_layers", 0)), int(heads * size)


@dataclass(frozen=True)
class ProductRate:
    """What the machine does in products of the model's own shape.

    Attributes:
        flops_per_second: The best of those tried.
        shape: (rows, in, out) of the product.
        dtype: What it was computed in.
        seconds: How long trying took.
    """

    flops_per_second: float
    shape: tuple[int, int, int]
    dtype: torch.dtype
    seconds: float

    def __str__(self) -> str:
        rows, inner, outer = self.shape
        kind = str(self.dtype).removeprefix("torch.")
        return f"{_flops(self.flops_per_second)} in products ({rows}, {inner}) x ({inner}, {outer}) in {kind}"


def product_rate(model: nn.Module, dtype: torch.dtype, device: torch.device, num_tokens: int) -> ProductRate:
    """Measure a product of the shape that most operations of a model have.

    Args:
        model: The model.
        dtype: What its products are computed in.
        device: Where.
        num_tokens: Of a batch: the rows of its products.

    Cost: `MEASURE_SECONDS` and the two operands; no random number is drawn from torch's own streams.
    """
    started = time.perf_counter()
    weight: dict[tuple[int, int], float] = {}
    for _, layer, share in _matrices(model):
        shape = (layer.in_features, layer.out_features)
        weight[shape] = weight.get(shape, 0.0) + share * shape[0] * shape[1]
    inner, outer = max(weight, key=lambda shape: weight[shape], default=(1024, 1024))
    rows = max(FEWEST_ROWS, min(MOST_ROWS, num_tokens))
    if device.type == "cpu":
        rows = max(FEWEST_ROWS, min(rows, int(MOST_OPERATIONS / (2 * inner * outer))))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=generator).to(device, dtype)
    w = torch.randn(outer, inner, generator=generator).to(device, dtype)
    seconds = _best(x, w)
    return ProductRate(
        2.0 * rows * inner * outer / seconds, (rows, inner, outer), dtype, time.perf_counter() - started
    )


def _best(x: Tensor, w: Tensor) -> float:
    """The shortest time of a product; on a device of several in a row, which hides the start of each."""
    repeats = 1 if x.device.type == "cpu" else 10
    best, began = float("inf"), time.perf_counter()
    with torch.no_grad():
        torch.mm(x, w.t())  # compiled or tuned at the first call
        while time.perf_counter() - began < MEASURE_SECONDS or best == float("inf"):
            _wait(x.device)
            started = time.perf_counter()
            for _ in range(repeats):
                torch.mm(x, w.t())
            _wait(x.device)
            best = min(best, (time.perf_counter() - started) / repeats)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"
