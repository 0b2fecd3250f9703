"""What the adapter files of other tools have in common: a pair of factors for each layer, and a scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graft.errors import AdapterError


@dataclass(frozen=True, eq=False)
class ForeignLayer:
    """The update s B A of one layer, in graft's shapes whatever the file has.

    Attributes:
        path: Of the layer in the model.
        down: A (rank, in); of an embedding (rank, vocabulary).
        up: B (out, rank).
        scaling: s.
        magnitude: Of DoRA, (out,).
    """

    path: str
    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.down)


def uniform(layers: Sequence[ForeignLayer]) -> tuple[int, float, list[ForeignLayer]]:
    """Layers with one rank and one scaling, for formats that have one of each for the whole adapter.

    Args:
        layers: With ranks and scalings of their own.

    Returns:
        The rank, the scaling and the layers: smaller ranks filled up with zeros, which changes no product;
        B multiplied where the scaling is another one, rounded once. Those that agree stay bit for bit.
    """
    rank, scaling = max(layer.rank for layer in layers), layers[0].scaling
    return rank, scaling, [_filled(rescaled(layer, scaling), rank) for layer in layers]


def rescaled(layer: ForeignLayer, scaling: float) -> ForeignLayer:
    """The same update with another scaling: B takes the difference, rounded once, if there is one."""
    if layer.scaling == scaling:
        return layer
    up = (layer.up.double() * (layer.scaling / scaling)).to(layer.up.dtype)
    return replace(layer, up=up, scaling=scaling)


def _filled(layer: ForeignLayer, rank: int) -> ForeignLayer:
    more = rank - layer.rank
    if not more:
        return layer
    down = torch.cat([layer.down, layer.down.new_zeros(more, layer.down.shape[1])])
    return replace(layer, down=down, up=torch.cat([layer.up, layer.up.new_zeros(len(layer.up), more)], 1))


def paired(
    tensors: Mapping[str, Tensor], leaves: tuple[str, str, str], where: str
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Tensors of a file by the path of their layer there.

    Args:
        tensors: By their names in the file.
        leaves: The ends of the names of the first factor, the second, and the magnitude ("" for none).
        where: The file, for errors.

    Returns:
        First factor, second factor and magnitude as stored.

    Raises:
        AdapterError: A name ends in none of these, or a factor has no other one.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        for place, leaf in enumerate(leaves):
            if leaf and name.endswith(f".{leaf}"):
                found.setdefault(name.removesuffix(f".{leaf}"), {})[place] = tensor
                break
        else:
            raise AdapterError(
                f"{name!r} is not a tensor of such an adapter: names end in .{leaves[0]} or .{leaves[1]}",
                where=f"{where}, tensor {name!r}",
                fix="biases and modules trained in full are not read: save the adapter alone",
            )
    for path, parts in found.items():
        if not {0, 1} <= parts.keys():
            raise AdapterError(
                f"{path} lacks {leaves[0] if 0 not in parts else leaves[1]}",
                where=where,
                fix="copy the file again",
            )
        if any(parts[place].dim() != 2 for place in (0, 1)):
            raise AdapterError(
                f"the factors of {path} have {parts[0].dim()} and {parts[1].dim()} dimensions, not 2",
                where=where,
                fix="stacks of experts and convolutions are not read",
            )
    return {path: (parts[0], parts[1], parts.get(2)) for path, parts in found.items()}
