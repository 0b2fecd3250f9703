"""Base models into memory: built empty, filled tensor by tensor, quantized as they stream.

The model classes are transformers' own; what fills them is here. Where the files are is locate.py's, what
they hold shards.py's, and which tensor goes where keys.py's business.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.config import closest
from graft.dialects import explained
from graft.errors import ModelError, QuantError
from graft.models.architecture import build_empty, read_config
from graft.models.attention import prefer_attention
from graft.models.expert_files import split_fills
from graft.models.experts import split_experts, unknown_stacks
from graft.models.fingerprint import (
    Fingerprint,
    chat_template_digest,
    fingerprint_of,
    quantization_key,
    tokenizer_digest,
)
from graft.models.foreign import foreign_digest, load_foreign
from graft.models.keys import (
    Fill,
    check_complete,
    check_finite,
    check_packed,
    check_sources,
    named_fills,
    plan_fills,
)
from graft.models.locate import resolve, rooted_name
from graft.models.packed import OWN_METHODS, PackedTensor, agree, open_packed, original_weights, stored_method
from graft.models.save import guard_save_pretrained
from graft.models.shards import StoredTensor
from graft.models.stream import Progress, TensorStream, spare_core
from graft.models.tokenizer import load_tokenizer
from graft.models.wide_layers import widen
from graft.quant.config import QuantizationConfig
from graft.quant.linear import QuantizedLinear
from graft.quant.tensor import QuantizedTensor

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
    config = read_config(path)
    if stored_method(path) not in ("", *OWN_METHODS):
        return _load_foreign(name, path, _quantization(quantization), dtype, revision, device, progress)
    stored = open_packed(path)
    settings = agree(_quantization(quantization), stored, path)
    wanted = _dtype(dtype, stored)
    tokenizer = load_tokenizer(path)
    model = build_empty(config, wanted, path)
    to_quantize = None if any(isinstance(tensor, PackedTensor) for tensor in stored) else settings
    own = stored_method(path) == "graft"
    fills = [] if own else plan_fills(model, stored)
    layouts = split_experts(model)
    fills = named_fills(model, stored) if own else split_fills(fills, layouts, stored)
    filler = _Filler(model, to_quantize, wanted, torch.device(device or "cpu"))
    check_sources(fills, filler.expected)
    names = [fill.targets for fill in fills]
    if None not in names:  # else only what was converted tells them
        known = [name for targets in names if targets is not None for name in targets]
        check_complete(model, filler.expected, known, stored, path)
    ordered = list(_in_order(fills))
    with spare_core(), TensorStream(ordered, filler.passing(fills), progress) as stream:
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


def _in_order(fills: list[Fill]) -> Iterator[StoredTensor]:
    for fill in fills:
        for source in fill.in_order():
            yield from source.parts if isinstance(source, PackedTensor) else (source,)


class _Filler:
    """Puts tensors into an empty model, quantizing those of linears."""

    def __init__(
        self, model: Any, quantization: QuantizationConfig | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = model
        self.quantization = quantization
        self.dtype = dtype
        self.device = device
        self.filled: set[str] = set()
        self.expected: dict[str, Tensor] = dict(model.state_dict())
        self._quantized = set() if quantization is None else set(select_linears(model, quantization))

    def passing(self, fills: list[Fill]) -> frozenset[str]:
        """Names of stored tensors of which nothing is kept but what is made of them."""
        return frozenset(source.name for fill in fills if self._passes(fill) for source in fill.sources)

    def _passes(self, fill: Fill) -> bool:
        targets, source = fill.targets, fill.sources[0]
        if targets is None or isinstance(source, PackedTensor):
            return False
        changes = source.dtype.is_floating_point and source.dtype not in {
            self.expected[name].dtype for name in targets
        }
        return changes or all(map(self._is_quantized, targets))

    def _is_quantized(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self._quantized

    def fill(self, fills: list[Fill], stream: TensorStream) -> None:
        def read(source: StoredTensor) -> Any:
            if isinstance(source, PackedTensor):
                return source.assemble(read)
            tensor = stream.read(source)
            if not quantized:  # else its scales tell
                check_finite(tensor, source)
            return tensor

        for fill in fills:
            targets = fill.targets
            quantized = targets is not None and all(map(self._is_quantized, targets))
            for name, tensor in fill.realize(read, self.model).items():
                self._place(name, tensor, fill)

    def _place(self, name: str, tensor: Any, fill: Fill) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        self.filled.add(name)
        if isinstance(tensor, QuantizedTensor):
            self.model.set_submodule(path, self._packed(module, tensor.to(self.device), fill))
            return
        if self._is_quantized(name):
            self.model.set_submodule(path, self._quantize(name, module, tensor, fill))
            return
        old = getattr(module, leaf)
        if old.shape != tensor.shape:
            raise ModelError(
                f"the shape of {name!r} is {list(tensor.shape)}, config.json makes it {list(old.shape)}",
                where=fill.sources[0].where,
                fix="use the config.json and the weights of one and the same model",
            )
        dtype = self.expected[name].dtype if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(self.device, dtype)
        if dtype == torch.float16 != tensor.dtype:
            check_finite(value, fill.sources[0], "too large for float16")
        setattr(module, leaf, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)

    def _quantize(self, name: str, module: nn.Module, weight: Tensor, fill: Fill) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        assert self.quantization is not None
        if isinstance(module, Conv1D):
            weight = weight.t().contiguous()
        if weight.dtype not in DTYPES.values():
            weight = weight.to(torch.float32)
        try:
            made = QuantizedLinear.from_weight(
                weight.to(self.device), None, self.quantization, self.dtype, where=name
            )
        except QuantError as error:
            check_finite(weight, fill.sources[0])
            raise ModelError(error.what, where=fill.sources[0].where, fix=error.fix) from error
        return self._in_place_of(module, made)

    def _packed(self, module: nn.Module, weight: QuantizedTensor, fill: Fill) -> nn.Module:
        check_packed(module, weight.shape, fill)
        return self._in_place_of(module, QuantizedLinear.from_quantized(weight, None, self.dtype))

    @staticmethod
    def _in_place_of(module: nn.Module, made: QuantizedLinear) -> nn.Module:
        if module.bias is not None:
            assert isinstance(module.bias, nn.Parameter)
            made.bias = module.bias  # still empty where its own tensor comes later
        made.train(module.training)
        return made

    def finish(self) -> None:
        """Tie what is tied, as the checkpoint has it, and move what was computed instead of read."""
        missing = set(self.expected) - self.filled
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if self.model.config.tie_word_embeddings and head.weight is not embedding.weight:
            self.model.config.tie_word_embeddings = False  # the files hold two matrices that differ
        self.model.to(self.device)


def select_linears(model: Any, quantization: QuantizationConfig) -> list[str]:
    """Paths of the layers that a quantization applies to: all linears but the output head and skipped ones.

    Raises:
        ModelError: A name in skip_modules, or the quantization as a whole, has nothing to act on.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    for skip in quantization.skip_modules:
        if not any(_ends_with(path, skip) for path in linears):
            near = closest(skip, {part for path in linears for part in path.split(".")})
            raise ModelError(
                f"skip_modules {skip!r} matches no linear of {type(model).__name__}",
                where="quantization.skip_modules",
                fix=f"did you mean {near!r}?" if near else "leave it out",
            )
    fused = unknown_stacks(model)
    if fused or not linears:
        raise ModelError(
            f"{type(model).__name__} keeps its experts in a layout that graft cannot take apart: {fused[0]!r}"
            if fused
            else f"{type(model).__name__} has no linears",
            where="quantization",
            fix="load it without quantization",
        )
    return [path for path in linears if not any(_ends_with(path, skip) for skip in quantization.skip_modules)]


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")
