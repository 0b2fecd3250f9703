"""Merged models onto the disk, tensor by tensor: dense directories, or quantized ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.adapters.candidates import Form, Weights
from graft.files import new_directory, read_json, write_json
from graft.models.fingerprint import (
    Fingerprint,
    WeightsDigest,
    chat_template_digest,
    quantization_key,
    tokenizer_digest,
)
from graft.models.quantize import QuantizedPlan, copy_companions
from graft.models.save import MAX_SHARD_BYTES, as_stored, save_tensors, save_tokenizer, write_shards
from graft.models.stream import Progress, TensorStream
from graft.quant.tensor import QuantizedTensor


def write_merged(
    weights: Weights,
    form: Form,
    directory: Path,
    tokenizer: Any,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Fingerprint:
    """Fold the adapter into each tensor as it is read, and write it before the next one is asked for.

    Args:
        weights: The base and the adapter.
        form: How to write it.
        directory: A new directory; it appears whole or not at all.
        tokenizer: Written beside it with its chat template; None for none.
        dtype: What config.json says the weights are.
        max_shard_bytes: Size at which a new file is begun.
        progress: Called with (bytes read, bytes in all) after each tensor.

    Returns:
        The fingerprint that the directory has when it is loaded.

    Raises:
        ModelError: A tensor of the base cannot be read, or is too large for float16.
        StorageError: The directory exists, or cannot be written.

    Cost: memory for two tensors as stored and a few of fp32 while one is folded; each byte is read once.
    """
    contents = weights.contents
    with TensorStream(contents.sources(), _passing(weights), progress) as stream:
        tensors = (pair for fill in contents.fills for pair in weights.written(form, fill, stream.read))
        if form.plan is not None:
            return _write_quantized(weights, form.plan, tensors, directory, tokenizer, dtype, max_shard_bytes)
        config = copy.deepcopy(contents.model.config)
        config.dtype = dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if weights.folder.pair is not None:
            config.tie_word_embeddings = False
        return save_tensors(
            as_stored(contents.model, tensors),
            directory,
            config,
            tokenizer,
            max_shard_bytes=max_shard_bytes,
            architecture=type(contents.model).__name__,
            generation_config=getattr(contents.model, "generation_config", None),
            needed_bytes=num_bytes(weights, form),
        )


def num_bytes(weights: Weights, form: Form) -> int:
    """About what the tensors of a form take in the files."""
    total = 0
    for fill in weights.contents.fills:
        for name in fill.targets or ():
            for owner in weights.folder.owners(name, weights.known):
                tensor = weights.contents.expected[owner]
                plan = form.plan
                if plan is not None and owner.removesuffix(".weight") in plan.targets:
                    total += plan.settings.num_bytes(tensor.numel())
                else:
                    dtype = tensor.dtype if weights.dtype is not None else fill.sources[0].dtype
                    total += tensor.numel() * dtype.itemsize
    return total


def _passing(weights: Weights) -> frozenset[str]:
    """Names of stored tensors that are used up before the next one is asked for."""
    if weights.contents.is_packed or weights.contents.has_experts:
        return frozenset()
    fills = [fill for fill in weights.contents.fills if fill.converter is None and fill.pieces is None]
    return frozenset(fill.sources[0].name for fill in fills)


def _write_quantized(
    weights: Weights,
    plan: QuantizedPlan,
    tensors: Iterator[tuple[str, Any]],
    directory: Path,
    tokenizer: Any,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> Fingerprint:
    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, value in tensors:
            if isinstance(value, QuantizedTensor):
                yield from plan.parts(name, value)
            else:
                yield name, value

    source = weights.contents.path
    digest = WeightsDigest()
    with new_directory(directory) as partial:
        write_shards(parts(), partial, max_shard_bytes, digest, plan.header_bytes())
        for _ in copy_companions(source, partial):
            pass
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
        raw = {**read_json(source / "config.json"), "quantization_config": plan.described(dtype)}
        if weights.dtype is not None:
            raw.pop("torch_dtype", None)
            raw["dtype"] = str(dtype).removeprefix("torch.")
        if weights.folder.pair is not None:
            raw["tie_word_embeddings"] = False
        write_json(partial / "config.json", raw)
    return Fingerprint(
        digest.hexdigest(),
        tokenizer_digest(tokenizer),
        chat_template_digest(tokenizer),
        quantization_key(plan.settings),
    )
