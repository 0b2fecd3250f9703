"""How an adapter is merged that was trained to be stored quantized: exactly its layers, in its format."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from graft.adapters.candidates import Weights
from graft.errors import AdapterError
from graft.models.filler import select_linears
from graft.models.quantize import QuantizedPlan
from graft.quant.config import QuantizationConfig


def shipped_plan(
    weights: Weights, asked: QuantizationConfig | str | None, name: str, where: str
) -> QuantizedPlan:
    """The quantization of a merged model that computes as the live one did.

    Args:
        weights: Of the base, with the adapter, whose settings say the format.
        asked: What the caller wants; None for that format.
        name: Of the base, for errors.
        where: The adapter, for errors.

    Raises:
        AdapterError: The base is quantized, another format was asked for, or a layer cannot be stored in it.
    """
    settings = weights.folder.shipped
    assert settings is not None
    if weights.origin != "dense":
        raise AdapterError(
            f"{name} is quantized; the adapter was trained over dense weights",
            where=where,
            fix="give the dense base (--base)",
        )
    kind = asked if isinstance(asked, str) or asked is None else replace(asked, skip_modules=())
    if kind not in (None, settings.quant_type, settings):
        raise AdapterError(
            f"the adapter was trained to be stored as {settings.quant_type} (blocks of "
            f"{settings.blocksize}, double_quant {settings.double_quant}), not as {asked!r}",
            where=where,
            fix="leave the quantization out",
        )
    targets = frozenset(weights.folder.bases)
    linears = select_linears(weights.contents.model, settings)
    if odd := sorted(targets.difference(linears)):
        raise AdapterError(
            f"{odd[0]} is no linear that can be stored quantized",
            where=where,
            fix="train the adapter without it (adapter.exclude_modules)",
        )
    dense = [path for path in linears if path not in targets]
    settings = replace(settings, skip_modules=_endings(dense, targets))
    return replace(QuantizedPlan.of(weights.contents, settings), targets=targets)


def _endings(dense: Sequence[str], targets: Collection[str]) -> tuple[str, ...]:
    """The fewest names and paths whose endings are those of all dense linears and of no target."""
    taken = {path.rpartition(".")[2] for path in targets}
    short = {path: path.rpartition(".")[2] for path in dense}
    return tuple(sorted({path if leaf in taken else leaf for path, leaf in short.items()}))
