"""Base models out of memory: dense directories that transformers loads, written tensor by tensor."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.config import closest
from graft.errors import ModelError
from graft.files import new_directory, write_json
from graft.models.expert_files import ExpertNames
from graft.models.experts import split_experts
from graft.models.fingerprint import Fingerprint, WeightsDigest, chat_template_digest, tokenizer_digest
from graft.models.shards import DTYPES
from graft.quant.linear import QuantizedLinear

MAX_SHARD_BYTES = 4 * 2**30
"""Size at which a new file is begun; a single larger tensor gets a file of its own."""

HEADER_BYTES = 64 * 2**10
"""Room for the names of some hundred tensors."""

_ALIGNED = 8  # the largest item of any dtype, in bytes
_MAX_WAITING_BYTES = 64 * 2**20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_model(
    model: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> Fingerprint:
    """Write a base model as a dense directory that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        model: A transformers model; quantized linears are decoded, one at a time.
        tokenizer: Written beside it with its chat template; None for none.
        directory: A new directory; it appears whole or not at all.
        dtype: Of the floating tensors in the files; by default the model's own.
        max_shard_bytes: Size at which a new file is begun.
        replace: Whether a directory of that name is replaced, once the new one is whole.

    Returns:
        The fingerprint that the directory has when it is loaded.

    Raises:
        ModelError: The model carries adapters or other layers that are not its architecture's.
        StorageError: The directory exists, or cannot be written.

    Cost: the memory of one tensor besides the model.
    """
    config = copy.deepcopy(model.config)
    if dtype is not None:
        config.dtype = dtype
    return save_tensors(
        checkpoint_tensors(model, dtype),
        directory,
        config,
        tokenizer,
        max_shard_bytes=max_shard_bytes,
        architecture=type(model).__name__,
        generation_config=getattr(model, "generation_config", None),
        replace=replace,
        needed_bytes=_stored_bytes(model, dtype),
    )


def _stored_bytes(model: Any, dtype: torch.dtype | None) -> int:
    """Bytes of a model's tensors in the files, tied ones once; the files' headers take a little more."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    own = {id(p) for layer in layers for p in (*layer.parameters(), *layer.buffers())}
    dense = {id(p): p for p in model.parameters() if id(p) not in own}.values()
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    item = (dtype or model.dtype).itemsize
    return numbers * item + sum(p.numel() * (item if dtype else p.element_size()) for p in dense)


def guard_save_pretrained(model: Any) -> None:
    """Let a model refuse `save_pretrained` while it has layers of ours, and only then.

    transformers would write them under names and in forms that nothing reads back, without a word.

    Args:
        model: A model whose layers were just replaced; only the object is changed, never its class.
    """
    ours = any(type(module).__module__.startswith("graft.") for module in model.modules())
    if ours and hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_save_pretrained
    elif vars(model).get("save_pretrained") is _refuse_save_pretrained:
        del model.save_pretrained


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "save_pretrained does not know the layers that graft put into this model: "
        "quantized, adapted, or single experts",
        where=f"save_pretrained({', '.join(map(repr, args))})",
        fix="graft.save_adapter(model, directory) writes an adapter, graft.merge(it, out=...) a whole model, "
        "graft.models.save.save_model(model, tokenizer, directory) a base; "
        'a Trainer needs save_strategy="no"',
    )


def save_tensors(  # noqa: PLR0913 - what a directory holds
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | os.PathLike[str],
    config: Any,
    tokenizer: Any,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    architecture: str = "",
    generation_config: Any = None,
    replace: bool = False,
    needed_bytes: int | None = None,
) -> Fingerprint:
    """Write a model directory from a stream of tensors.

    Args:
        tensors: Names as in a checkpoint, and values; each is written before the next one is asked for.
        directory: A new directory; it appears whole or not at all.
        config: transformers' config of the model.
        tokenizer: transformers' tokenizer, or None.
        max_shard_bytes: Size at which a new file is begun.
        architecture: Class name for config.json; by default the one that the config already has.
        generation_config: transformers' GenerationConfig, or None.
        replace: Whether a directory of that name is replaced, once the new one is whole.
        needed_bytes: What it will take, where that is known; an error names it.

    Returns:
        The fingerprint that the directory has when it is loaded.

    Raises:
        StorageError: The directory exists, or cannot be written.

    Cost: the memory of one tensor.
    """
    digest = WeightsDigest()
    with new_directory(directory, replace=replace, needed_bytes=needed_bytes) as partial:
        write_shards(tensors, partial, max_shard_bytes, digest)
        config = copy.deepcopy(config)
        if architecture:
            config.architectures = [architecture]
        config.save_pretrained(partial)
        if generation_config is not None:
            generation_config.to_json_file(partial / "generation_config.json")
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
    return Fingerprint(digest.hexdigest(), tokenizer_digest(tokenizer), chat_template_digest(tokenizer), "")


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer with its chat template into a directory that is not published yet.

    Raises:
        OSError: The disk refused.
    """
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        # tokenizers tells of a disk that refuses with a bare Exception that has the system's number in it.
        number = re.search(r"\(os error (\d+)\)$", str(error)) if type(error) is Exception else None
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def checkpoint_tensors(model: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model under their checkpoint names, quantized ones decoded, tied ones once.

    Args:
        model: A transformers model without adapters.
        dtype: Of the floating tensors; by default the model's own.

    Yields:
        (name, tensor), in the order of the model.

    Raises:
        ModelError: The model has layers that are not its architecture's.
    """
    expected = empty_twin(model)
    split_experts(expected)
    _check_names(model, expected)
    own = _own_tensors(model, expected, dtype or model.dtype)
    if dtype is not None:
        own = ((name, t.to(dtype) if t.is_floating_point() else t) for name, t in own)
    yield from as_stored(model, own)


def as_stored(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model under the names, and in the stacks, that checkpoints of its architecture have.

    Args:
        model: Its experts are split; its parameters may be on the meta device.
        tensors: Names in the model, and values.

    Yields:
        (name, tensor).

    Cost: the memory of two stacks of experts, where checkpoints hold stacks.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = ExpertNames(empty_twin(model))
    for name, tensor in tensors:
        if name in names:
            yield from names.stored(name, tensor)
        else:
            yield from revert_weight_conversion(model, {name: tensor}).items()


def empty_twin(model: Any) -> Any:
    """The same architecture without weights: it tells which layout each weight has in a checkpoint."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _own_tensors(model: Any, twin: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = set()
    persistent = set(twin.state_dict())
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QuantizedLinear):
            weight = module.dense_weight(dtype)
            yield f"{prefix}weight", weight.t() if isinstance(twin.get_submodule(path), Conv1D) else weight
            if module.bias is not None:
                yield f"{prefix}bias", module.bias.detach()
            continue
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in seen and prefix + leaf in persistent:
                seen.add(id(tensor))
                yield prefix + leaf, tensor.detach()


def _check_names(model: Any, twin: Any) -> None:
    modules = {path for path, _ in twin.named_modules()}
    foreign = [path for path, _ in model.named_modules() if path not in modules]
    if foreign:
        near = closest(foreign[0], modules)
        raise ModelError(
            f"{type(model).__name__} has layers that are not its own, such as {foreign[0]!r}"
            + (f" in {near!r}" if near else ""),
            where=foreign[0],
            fix="detach the adapters, or fold them in with graft merge",
        )


def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    max_shard_bytes: int,
    digest: WeightsDigest,
    header_bytes: int = HEADER_BYTES,
) -> None:
    """Write a stream of tensors as one safetensors file, or several with their index.

    Args:
        tensors: Names as in a checkpoint, and values; each is written before the next one is asked for.
        directory: Where to; not atomic by itself, see `new_directory`.
        max_shard_bytes: Size at which a new file is begun.
        digest: Gets each tensor.
        header_bytes: Kept free at the head of each file, filled with blanks as the format allows; about 200
            for each tensor. A file whose header is full is followed by another.
    """
    shards: list[_Shard] = []
    for name, tensor in tensors:
        if not shards or not shards[-1].takes(name, tensor, max_shard_bytes):
            if shards:
                shards[-1].close()
            shards.append(_Shard(directory / f"part-{len(shards)}", header_bytes))
        shards[-1].write(name, tensor)
        digest.update(name, tensor)
    assert shards, "a model without tensors"
    shards[-1].close()
    if len(shards) == 1:
        shards[0].path.rename(directory / "model.safetensors")
        return
    homes: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(directory / file)
        homes.update(dict.fromkeys(shard.entries, file))
    total = sum(shard.nbytes for shard in shards)
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": homes}
    )


class _Shard:
    """One safetensors file that is written as its tensors come; its header is filled in at the end.

    Every tensor must begin at a multiple of its item size, without holes. So tensors of odd sizes wait until
    the file is closed; they are small texts and scales, as a rule.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self.nbytes = 0
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._header_room = header_bytes
        self._header_bytes = 200  # of the metadata, generously
        with open(path, "wb") as file:
            file.truncate(8 + header_bytes)

    def takes(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """Whether one more tensor fits, in size and in the header."""
        room = self._header_bytes + _entry_bytes(name, tensor) <= self._header_room
        size = self.nbytes + self._waiting_bytes + _size(tensor)
        return room and size <= max_bytes and self._waiting_bytes <= _MAX_WAITING_BYTES

    def write(self, name: str, tensor: Tensor) -> None:
        self._header_bytes += _entry_bytes(name, tensor)
        if _size(tensor) % _ALIGNED:
            self._waiting[name] = tensor.detach().cpu().clone()
            self._waiting_bytes += _size(tensor)
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        assert self.nbytes % tensor.dtype.itemsize == 0, name
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            with open(self.path, "ab") as file:
                file.write(flat.view(torch.uint8).numpy().data)
        end = self.nbytes + _size(tensor)
        self.entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.nbytes, end],
        }
        self.nbytes = end

    def close(self) -> None:
        for name, tensor in sorted(self._waiting.items(), key=lambda item: -item[1].dtype.itemsize):
            self._append(name, tensor)
        self._waiting.clear()
        header = json.dumps(
            {"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")
        ).encode()
        assert len(header) <= self._header_room, len(header)
        with open(self.path, "r+b") as file:
            file.write(self._header_room.to_bytes(8, "little") + header.ljust(self._header_room))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _entry_bytes(name: str, tensor: Tensor) -> int:
    return len(json.dumps(name)) + 130 + 21 * tensor.dim()
