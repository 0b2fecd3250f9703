"""Stored tensors into an empty model: placed under their names, linears quantized on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.config import closest
from graft.errors import ModelError, QuantError
from graft.models.experts import unknown_stacks
from graft.models.keys import Fill, check_finite, check_packed
from graft.models.packed import PackedTensor
from graft.models.shards import StoredTensor
from graft.models.stream import TensorStream
from graft.quant.config import QuantizationConfig
from graft.quant.layout import FLOATS
from graft.quant.linear import QuantizedLinear
from graft.quant.tensor import QuantizedTensor


class Filler:
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
        """Read what fills ask for and place it.

        Raises:
            ModelError: A value is not finite, has another shape, or cannot be quantized.
        """

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
                self.put(name, tensor, fill)

    def put(self, name: str, tensor: Any, fill: Fill) -> None:
        """Place a tensor, or a weight that is quantized already, under its name in the model.

        Args:
            name: In the model.
            tensor: Its value.
            fill: Where it comes from, for errors.

        Raises:
            ModelError: It has another shape, is too large for float16, or cannot be quantized.
        """
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
        if weight.dtype not in FLOATS.values():
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
