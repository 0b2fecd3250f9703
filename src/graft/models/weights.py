"""The weights of a base model on the disk, read one at a time: for looking at, not for running."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graft.errors import ModelError
from graft.models.contents import Contents
from graft.models.fingerprint import WeightsDigest
from graft.models.keys import Fill
from graft.models.layers import BaseLayer
from graft.models.locate import resolve, rooted_name
from graft.models.packed import OWN_METHODS, PackedTensor, original_weights, stored_method
from graft.quant.tensor import QuantizedTensor

Progress = Callable[[int, int], None]


class StoredBase:
    """A base model whose architecture is in memory and whose weights are not.

    Args:
        name: A directory, a hub id, or "builtin".
        revision: Branch, tag or commit of a hub id.

    Raises:
        ModelError: As for `graft.load`, or another library quantized the weights.

    Cost: config and headers are read. A weight costs what it takes in memory, each time it is asked for.
    """

    def __init__(self, name: str | os.PathLike[str], revision: str | None = None) -> None:
        self.name, self.path = rooted_name(name), resolve(name, revision)
        method = stored_method(self.path)
        if method not in ("", *OWN_METHODS):
            raise ModelError(
                f"the weights are quantized by {method}: only its library can read them",
                where=str(self.path / "config.json"),
                fix="give the dense model",
            )
        self._contents = Contents.of(self.path, torch.float32)
        self.model: Any = self._contents.model
        self.model.graft_name = self.name
        self._fills = {name: fill for fill in self._contents.fills for name in fill.targets or ()}
        self._converted = [fill for fill in self._contents.fills if fill.targets is None]
        self._latest: tuple[Fill, dict[str, Tensor]] | None = None

    def layer(self, path: str) -> BaseLayer | None:
        """The layer at a path, without memory; None where there is none that could carry an adapter."""
        try:
            return BaseLayer.of(self.model.get_submodule(path))
        except AttributeError:
            return None

    def weight(self, path: str) -> Tensor:
        """The weight of a layer as `BaseLayer.dense_weight` has it: (out_features, in_features), fp32.

        Args:
            path: Of a layer that `layer` finds.

        Raises:
            ModelError: The checkpoint has no such weight, or it cannot be read, or it is not finite.
        """
        layer = self.layer(path)
        assert layer is not None, path
        value: Any = self.tensor(f"{path}.weight")
        if isinstance(value, QuantizedTensor):
            return value.dequantize(torch.float32)
        return value.float() if layer.kind == "linear" else value.float().t()

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model by its name there, as stored.

        Raises:
            ModelError: The checkpoint has none that makes it, or it cannot be read, or it is not finite.
        """
        home = self._home(name)
        if home is None:
            raise ModelError(
                f"the weights have no tensor {name!r}",
                where=str(self.path),
                fix="use the config.json and the weights of one and the same model",
            )
        fill, target = home
        return self._made(fill)[target]

    def _home(self, name: str) -> tuple[Fill, str] | None:
        tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        sharing = [tied.get(name, name), *(one for one, other in tied.items() if other == name)]
        for target in (name, *sharing):
            if target in self._fills:
                return self._fills[target], target
        return next(((fill, name) for fill in self._converted if name in self._made(fill)), None)

    def _made(self, fill: Fill) -> dict[str, Tensor]:
        # A stack of experts is read once for all that are in it, as long as they are asked for in a row.
        if self._latest is None or self._latest[0] is not fill:
            self._latest = None
            self._latest = fill, self._contents.read(fill, lambda source: source.load())
        return self._latest[1]

    def digest(self, progress: Progress | None = None) -> str:
        """The digest of the weights that a `Fingerprint` has, so that an adapter's base can be told.

        Args:
            progress: Called with (bytes read, bytes in all) after each tensor.

        Raises:
            ModelError: A tensor cannot be read.

        Cost: reads every tensor once, about a second per gigabyte.
        """
        digest, done = WeightsDigest(), 0
        whole = sum(tensor.nbytes for tensor in self._contents.stored)
        for tensor in self._contents.stored:
            for part in tensor.parts if isinstance(tensor, PackedTensor) else (tensor,):
                digest.update(part.name, part.load())
            done += tensor.nbytes
            if progress is not None:
                progress(done, whole)
        return original_weights(self.path, digest.hexdigest())
