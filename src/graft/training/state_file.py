"""The tensors of a checkpoint in a safetensors file, written and read one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from graft import files
from graft.models.shards import DTYPES
from graft.training.flat_state import Pending

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_state(tensors: Mapping[str, Tensor | Pending], path: str | os.PathLike[str]) -> None:
    """Write tensors, each made when its turn comes.

    Types with larger items come first, as their alignment wants; else the order stands.

    Args:
        tensors: By name.
        path: Where; not atomic by itself, see `files.new_directory`.

    Raises:
        StorageError: The disk refused.

    Cost: memory for the largest of the tensors that are not there yet.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header, end = {}, 0
    for name in order:
        begin, end = end, end + math.prod(tensors[name].shape) * tensors[name].dtype.itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.refusing(path, end), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensors[name]
            tensor = value.load() if isinstance(value, Pending) else value.detach().cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


class StoredState(Mapping[str, Tensor]):
    """Some tensors of a file, by name, each read when it is asked for.

    Args:
        path: The file; it may lose its name afterwards.
        prefix: Of the names that are meant; left out of the keys.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self._file, self._prefix = safe_open(path, framework="pt"), prefix
        self._names = dict.fromkeys(name for name in self._file.keys() if name.startswith(prefix))  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if self._prefix + name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._names)

    def __len__(self) -> int:
        return len(self._names)
