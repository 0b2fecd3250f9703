"""Memory of a training step, predicted from shapes alone, term by term.

What is added up is what graft itself holds: the base as it is stored, what trains with gradient and moments,
what the backward pass needs of every token (`graft.models.lean` says what that is), a chunk of logits, and
the largest passing tensors. Formulas are for decoders of Llama's kind; other families come out roughly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from graft.adapters.attached import adapter_modules
from graft.evaluate.loss import CHUNK_LOGITS
from graft.kernels.cpu.elementwise import is_compiled
from graft.kernels.wide import PART_ELEMENTS, is_wide
from graft.models.families import family_of, layer_index
from graft.models.layers import BaseLayer
from graft.models.lean import GATED
from graft.models.recipes import AHEAD_BYTES

LIBRARIES_BYTES = 500 << 20
"""What Python, torch and transformers hold on a CPU without the model, where no process can be asked.

It differs by a fifth with their versions and with what is installed beside them; a GPU holds none of it.
"""

STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "lion": 4.0, "sgd": 0.0}
"""Bytes of an optimizer's state for each number that trains; sgd's with momentum is a float32."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a model with what trains on it is, as far as memory goes."""

    base_bytes: int
    """Stored weights, each once, frozen parts of adapters among them, without what trains beside them."""
    adapter_numbers: int
    """Numbers that train beside the base."""
    base_numbers_trained: int
    """Numbers of the base that train themselves."""
    num_blocks: int
    hidden: int
    vocabulary: int
    block_numbers: int
    """Numbers of a token that one block keeps for the backward pass, in the dtype of activations."""
    block_small_bytes: int
    """Bytes of a token in what one block keeps that is small: sums of heads, x A' of adapters."""
    mlp_numbers: int
    """Of these, what is inside of the MLP."""
    mlp_small_bytes: int
    """The same of what is small."""
    widest: int
    """Most numbers of a token in one tensor of a block."""
    widest_outside: int
    """The same without the MLP's inside."""
    scratch_bytes: int
    """Memory in which weights are decoded or made wide."""
    activation_bytes: int
    """Of a number in activations."""
    logit_bytes: int
    """Of a logit while the loss of its token is taken."""


@dataclass(frozen=True)
class Step:
    """What of a run decides about the memory of its steps."""

    rows: int
    tokens: int
    """Of a row."""
    labelled: float = 1.0
    """Share of the tokens that are learned."""
    optimizer: str = "adamw"
    momentum: bool = False
    optimizer_memory: int | None = None
    """Bytes that the optimizer's state may take; what is more lies elsewhere."""
    accumulation: int = 1
    recomputed_every: int = 0
    """0: nothing is recomputed; n: every n-th block."""
    packed: bool = False
    """Whether rows hold several documents, told apart by a mask."""
    offloaded: bool = False
    """Whether large activations wait elsewhere."""
    mlp_tile: int | None = None
    """Tokens that an MLP works on at a time."""


@dataclass(frozen=True)
class Prediction:
    """Terms in bytes; `peak_bytes` is the larger of two moments: the ends of the two passes."""

    libraries: int
    base: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    passing: int
    scratch: int
    peak_bytes: int

    def to_dict(self) -> dict[str, int]:
        """Plain values for run.json."""
        return asdict(self)

    def describe(self) -> str:
        """One line: the sum and its terms in MiB, largest first."""
        terms = {name: value for name, value in asdict(self).items() if name != "peak_bytes" and value}
        ordered = sorted(terms.items(), key=lambda term: -term[1])
        told = ", ".join(f"{name} {value / 2**20:,.1f}" for name, value in ordered)
        return f"about {self.peak_bytes / 2**20:,.0f} MiB at most: {told}"


def shapes_of(model: Any, trained: Mapping[str, nn.Parameter]) -> Shapes:
    """Read the shapes of a model; its tensors may be on the meta device.

    Args:
        model: A transformers model of a known family, quantized or not, with adapters or without.
        trained: What trains, by name.

    Raises:
        ModelError: The family is not known.
    """
    stored = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    trained_ids = {id(p) for p in trained.values()}
    beside = {id(p) for p in _adapter_tensors(model)} & trained_ids
    base = [tensor for key, tensor in stored.items() if key not in beside]
    config = model.config.get_text_config()
    blocks = model.get_submodule(family_of(model).layers)
    any_tensor = model.get_input_embeddings().weight
    dtype = any_tensor.dtype
    layers = [layer for module in model.modules() if (layer := BaseLayer.of(module)) is not None]
    quantized = [layer for layer in layers if layer.quantized]
    largest = max((layer.in_features * layer.out_features for layer in quantized), default=0)
    wide = is_wide(dtype, any_tensor.device.type)
    kernel = any_tensor.device.type in ("cpu", "meta") and is_compiled(torch.empty(0, dtype=dtype))
    scratch = 4 * PART_ELEMENTS if wide else largest * dtype.itemsize
    return Shapes(
        base_bytes=sum(tensor.numel() * tensor.element_size() for tensor in base),
        adapter_numbers=sum(p.numel() for p in trained.values() if id(p) in beside),
        base_numbers_trained=sum(t.numel() for t in base if id(t) in trained_ids),
        num_blocks=len(blocks),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        **_block(model, config, dtype, wide=wide),
        scratch_bytes=scratch,
        activation_bytes=dtype.itemsize,
        # Logits, their gradient and, where it is padded, that once more; a float32 copy without a kernel.
        logit_bytes=3 * dtype.itemsize + (0 if kernel else 4),
    )


def _adapter_tensors(model: nn.Module) -> list[nn.Parameter]:
    return [
        p
        for module in adapter_modules(model).values()
        for name, p in module.named_parameters()
        if not name.startswith(("base_layer.", "original."))
    ]


def _block(model: Any, config: Any, dtype: torch.dtype, *, wide: bool) -> dict[str, int]:
    """What a block keeps of a token, and its widest tensors, by field of `Shapes`."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    ranks = {
        path: len(layer.lora_A) * (2 if getattr(layer, "start_A", None) is not None else 1)
        for path, module in adapter_modules(model).items()
        if layer_index(path) == 0
        for layer in getattr(module, "adapters", {}).values()
        if hasattr(layer, "lora_A")
    }
    outside = max(config.hidden_size, heads * size)
    down = sum(ranks.values())
    inside = sum(rank for path, rank in ranks.items() if path.rpartition(".")[2] in GATED)
    product_bytes = 4 if wide else dtype.itemsize
    return {
        # Two residuals; q, k, v, attention's output; gate and up, or the two sides of the activation.
        "block_numbers": 2 * (config.hidden_size + heads * size + keys * size + inner),
        "block_small_bytes": 4 * heads + product_bytes * down,
        "mlp_numbers": 2 * inner,
        "mlp_small_bytes": product_bytes * inside,
        "widest": max(inner, outside),
        "widest_outside": outside,
    }


def predict(
    shapes: Shapes, step: Step, *, device_type: str = "cpu", held_bytes: int | None = None
) -> Prediction:
    """The memory of a training step.

    Args:
        shapes: Of the model.
        step: Of the run.
        device_type: On a GPU the libraries' own memory is not counted, as torch does not.
        held_bytes: What a process holds in which the model and its adapters are loaded; tells what its
            libraries are. None: `LIBRARIES_BYTES`.

    Returns:
        The terms and the peak.
    """
    tokens = step.rows * step.tokens
    trained = shapes.adapter_numbers + shapes.base_numbers_trained
    activations = tokens * _kept_of_a_token(shapes, step)
    if step.offloaded:
        activations += AHEAD_BYTES
    activations += step.rows * step.tokens**2 if step.packed else 0
    chunk = min(tokens * step.labelled, CHUNK_LOGITS // shapes.vocabulary)
    logits = int(chunk * shapes.vocabulary * shapes.logit_bytes)
    widest = tokens * shapes.widest
    if step.mlp_tile is not None:
        widest = max(min(tokens, step.mlp_tile) * shapes.widest, tokens * shapes.widest_outside)
    passing = widest * (8 + 2 * shapes.activation_bytes)
    state = 4.0 if step.momentum and step.optimizer == "sgd" else STATE_BYTES[step.optimizer]
    loaded = shapes.base_bytes + 4 * shapes.adapter_numbers
    libraries = LIBRARIES_BYTES if held_bytes is None else max(held_bytes - loaded, 0)
    terms = {
        "libraries": libraries if device_type == "cpu" else 0,
        "base": shapes.base_bytes,
        "adapter": 4 * shapes.adapter_numbers,
        "optimizer": min(int(state * trained), step.optimizer_memory or 2**63),
        "gradients": 4 * trained,
        "activations": activations,
        "logits": logits,
        "passing": passing,
        "scratch": shapes.scratch_bytes,
    }
    lasting = sum(terms[name] for name in ("libraries", "base", "adapter", "optimizer", "scratch"))
    early = terms["gradients"] if step.accumulation > 1 else 0
    forward = terms["activations"] + max(logits, passing) + early
    # The norm, the clipped gradients and the update go through everything that trains once more.
    backward = 2 * terms["gradients"]
    return Prediction(**terms, peak_bytes=lasting + max(forward, backward))


def _kept_of_a_token(shapes: Shapes, step: Step) -> int:
    """Bytes in memory for the backward pass, over all blocks."""
    numbers, small = shapes.block_numbers, shapes.block_small_bytes
    if step.mlp_tile is not None:
        numbers, small = numbers - shapes.mlp_numbers, small - shapes.mlp_small_bytes
    whole = shapes.activation_bytes * numbers + small
    recomputed = shapes.num_blocks // step.recomputed_every if step.recomputed_every else 0
    if step.offloaded:  # one block's, and of the others what is too small to leave
        return whole + (shapes.num_blocks - recomputed) * small
    kept = (shapes.num_blocks - recomputed) * whole
    return kept + recomputed * shapes.activation_bytes * shapes.hidden + (whole if recomputed else 0)
