"""Base models into memory: built empty, filled tensor by tensor, quantized as they stream.

The model classes are transformers' own; what fills them is here. Where the files are is locate.py's, what
they hold shards.py's, and which tensor goes where keys.py's business.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graft.config import closest
from graft.dialects import explained
from graft.errors import ModelError
from graft.models.architecture import read_config
from graft.models.attention import prefer_attention
from graft.models.contents import Contents
from graft.models.experts import split_experts
from graft.models.filler import Filler
from graft.models.fingerprint import (
    Fingerprint,
    chat_template_digest,
    fingerprint_of,
    quantization_key,
    tokenizer_digest,
)
from graft.models.foreign import foreign_digest, load_foreign
from graft.models.keys import (
    check_complete,
)
from graft.models.locate import resolve, rooted_name
from graft.models.packed import OWN_METHODS, agree, open_packed, original_weights, stored_method
from graft.models.save import guard_save_pretrained
from graft.models.shards import StoredTensor
from graft.models.stream import Progress, TensorStream, spare_core
from graft.models.tokenizer import load_tokenizer
from graft.models.wide_layers import widen
from graft.quant.config import QuantizationConfig

__all__ = ["BaseModel", "load", "load_tokenizer", "random_model", "resolve"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes in which a base model may compute."""


@dataclass
class BaseModel:
    """A base model, ready to run or to carry adapters."""

    model: Any
    """transformers' model of this architecture, in eval mode."""

    tokenizer: Any
    """transformers' tokenizer from the same directory."""

    name: str
    """What was asked for: the full path of a directory, a hub id or "builtin"."""

    path: Path
    """The directory that the files were read from."""

    fingerprint: Fingerprint
    quantization: QuantizationConfig | None
    dtype: torch.dtype
    """In which the model computes, and in which dense weights are kept."""

    revision: str | None = None


@explained
def load(
    name: str | os.PathLike[str],
    *,
    quantization: QuantizationConfig | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> BaseModel:
    """Load a causal language model for inference or as the frozen base of adapters.

    Args:
        name: A directory, a hub id, or "builtin".
        quantization: How linears are stored, or only its quant_type ("nf4"). Embeddings and output head stay
            dense.
        dtype: Of computation and of dense weights: "float32", "bfloat16" or "float16". By default float32
            where the files are float32, else bfloat16.
        revision: Branch, tag or commit of a hub id.
        device: Where the weights go; the CPU by default.
        progress: Called with (bytes read, bytes in all) after each tensor.

    Returns:
        The model in eval mode with its tokenizer and fingerprint. It is an ordinary transformers model;
        linears of a quantized one are `graft.quant.linear.QuantizedLinear`.

    Raises:
        ModelError: The model is not there, not a causal language model, needs its own code, or its files are
            damaged; the message names file and tensor.

    Cost: the memory of the finished model plus one tensor as stored; each byte is read once.
    """
    path = resolve(name, revision)
    read_config(path)  # which tells what is wrong with it before anything else does
    if stored_method(path) not in ("", *OWN_METHODS):
        return _load_foreign(name, path, _quantization(quantization), dtype, revision, device, progress)
    stored = open_packed(path)
    settings = agree(_quantization(quantization), stored, path)
    wanted = _dtype(dtype, stored)
    tokenizer = load_tokenizer(path)
    contents = Contents.of(path, wanted, stored)
    model, fills = contents.model, contents.fills
    to_quantize = None if contents.is_packed else settings
    filler = Filler(model, to_quantize, wanted, torch.device(device or "cpu"))
    with spare_core(), TensorStream(contents.sources(), filler.passing(fills), progress) as stream:
        filler.fill(fills, stream)
        weights = original_weights(path, stream.digest())
    check_complete(model, filler.expected, filler.filled, stored, path)
    filler.finish()
    fingerprint = Fingerprint(
        weights,
        tokenizer_digest(tokenizer),
        chat_template_digest(tokenizer),
        quantization_key(settings),
    )
    base = BaseModel(model, tokenizer, rooted_name(name), path, fingerprint, settings, wanted, revision)
    return _labelled(base)


def _load_foreign(
    name: str | os.PathLike[str],
    path: Path,
    asked: QuantizationConfig | str | None,
    dtype: torch.dtype | str | None,
    revision: str | None,
    device: torch.device | str | None,
    progress: Progress | None,
) -> BaseModel:
    method = stored_method(path)
    if asked is not None:
        raise ModelError(
            f"the weights are quantized by {method}; they cannot be quantized again",
            where=str(path / "config.json"),
            fix="leave quantization out; or give the dense model",
        )
    tokenizer = load_tokenizer(path)
    wanted = None if dtype is None else _dtype(dtype, [])
    model = load_foreign(path, method, wanted, torch.device(device or "cpu"))
    fingerprint = Fingerprint(
        foreign_digest(path, progress), tokenizer_digest(tokenizer), chat_template_digest(tokenizer), ""
    )
    base = BaseModel(model, tokenizer, rooted_name(name), path, fingerprint, None, model.dtype, revision)
    return _labelled(base)


def random_model(
    name: str | os.PathLike[str], seed: int, *, dtype: torch.dtype | str = "float32"
) -> BaseModel:
    """A model of the same configuration and tokenizer with transformers' own random weights.

    Args:
        name: As for `load`; the weights there are not read.
        seed: Of the initialization; the global random state is left as it was.
        dtype: Of computation and weights.

    Raises:
        ModelError: As for `load`.
    """
    from transformers import AutoModelForCausalLM

    path = resolve(name)
    config = read_config(path)
    tokenizer = load_tokenizer(path)
    wanted = _dtype(dtype, [])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    fingerprint = Fingerprint(
        fingerprint_of(model).weights, tokenizer_digest(tokenizer), chat_template_digest(tokenizer), ""
    )
    split_experts(model)
    return _labelled(BaseModel(model, tokenizer, os.fspath(name), path, fingerprint, None, wanted))


def _labelled(base: BaseModel) -> BaseModel:
    base.model.graft_fingerprint = base.fingerprint
    base.model.graft_name = base.name
    base.model.graft_revision = base.revision
    guard_save_pretrained(base.model)
    widen(base.model)
    prefer_attention(base.model, base.dtype)
    return base


def _quantization(value: QuantizationConfig | str | None) -> QuantizationConfig | str | None:
    if value is not None and not isinstance(value, QuantizationConfig | str):
        raise ModelError(
            f"a base model cannot be quantized as {reprlib.repr(value)}",
            where="quantization",
            fix='quantization="nf4", or a graft.QuantizationConfig',
        )
    return value


def _dtype(value: torch.dtype | str | None, stored: Iterable[StoredTensor]) -> torch.dtype:
    if value is None:
        sizes: dict[torch.dtype, int] = {}
        for tensor in stored:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return torch.float32 if max(sizes, key=lambda kind: sizes[kind]) == torch.float32 else torch.bfloat16
    text = str(value).removeprefix("torch.")
    if text not in DTYPES:
        near = closest(text, DTYPES)
        raise ModelError(
            f"a base model cannot compute in {text!r}",
            where="model.dtype",
            fix=f"did you mean {near!r}?" if near else f"one of: {', '.join(DTYPES)}",
        )
    return DTYPES[text]
