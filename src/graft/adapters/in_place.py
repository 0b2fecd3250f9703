"""Adapters merged into the weights of a model in memory, and taken out again, to the last bit.

What was added cannot be subtracted: (W + d) - d is not W. So the base's own parameters are not written to;
merged ones stand in their places until `unmerge` puts them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.adapted import AdaptedLayer, Merged, SavedModule
from graft.adapters.attached import (
    activate,
    active_weights,
    adapter,
    adapter_modules,
    attachments,
    stays_tied,
)
from graft.adapters.fold import folded, refuse_unfoldable
from graft.adapters.targets import tied_pair
from graft.dialects import explained
from graft.errors import AdapterError


@explained
def merge_in_place(model: nn.Module, name: str = "default") -> None:
    """Put an adapter into the weights of a dense model in memory: it then costs nothing to run.

    The adapter stays attached, and `unmerge` restores the base exactly. Until then what needs the base is
    refused: other adapters coming or going, `disabled`, `save_adapter`. An adapter that acts with a weight
    (`set_active`) is merged with it. Sums are made in fp32 and rounded once to the dtype of the weight.
    Gradients do not reach the adapter.

    Args:
        model: A model that carries the adapter.
        name: Which adapter.

    Raises:
        AdapterError: No such adapter, one is merged already, a layer under it is quantized or has no place
            for its bias, a weight would be too large for its dtype, or another adapter is measured against a
            weight that would change. The model is then as it was.

    Cost: the memory of the weights that change, a second time.
    """
    known = adapter(model, name)
    record = attachments(model)
    if record.merged is not None:
        again = record.merged.name == name
        raise AdapterError(
            f"the adapter {name!r} is already merged" if again else f"{record.merged.name!r} is merged",
            where="name",
            fix="graft.unmerge(model) takes it out",
        )
    modules = adapter_modules(model)
    refuse_unfoldable(modules, name)
    pair = tied_pair(model)
    touched = pair is not None and not {*known.targets, *known.saved_modules}.isdisjoint(pair)
    together = touched and stays_tied(model, name)
    active = active_weights(model)
    factor = active.get(name, 1.0)
    made = [entry for path, module in modules.items() for entry in _merged(path, module, name, factor)]
    merged = Merged(name, [], active, touched and not together)
    shared: dict[int, nn.Parameter] = {}
    for owner, leaf, value in made:
        own: Any = getattr(owner, leaf)
        merged.kept.append((owner, leaf, own))
        new = shared.get(id(own)) if together else None
        new = nn.Parameter(value, requires_grad=own.requires_grad) if new is None else new
        setattr(owner, leaf, new)
        shared[id(own)] = new
    if merged.tied:
        _config(model).tie_word_embeddings = False
    left = {other: weight for other, weight in active.items() if other != name}
    activate(model, list(left), list(left.values()))
    record.merged = merged


@explained
def unmerge(model: nn.Module) -> None:
    """Take a merged adapter out of the weights again: every bit is what it was, and the adapter acts again.

    Args:
        model: A model after `merge_in_place`.

    Raises:
        AdapterError: No adapter is merged, or the model was cast to another dtype in between.
    """
    record = attachments(model)
    merged = record.merged
    if merged is None:
        raise AdapterError(
            "no adapter is merged", where="model", fix="graft.merge_in_place(model) merges one"
        )
    for owner, leaf, own in merged.kept:
        now: Any = getattr(owner, leaf)
        if now.dtype != own.dtype:
            raise AdapterError(
                f"{leaf} of a {type(owner).__name__} was {own.dtype} when the adapter was merged, and is "
                f"{now.dtype} now",
                where="model",
                fix=f"model.to({own.dtype}) first",
            )
    for owner, leaf, own in merged.kept:
        now = getattr(owner, leaf)
        if own.device != now.device:
            own.data = own.data.to(now.device)
        setattr(owner, leaf, own)
    if merged.tied:
        _config(model).tie_word_embeddings = True
    record.merged = None
    activate(model, list(merged.active), list(merged.active.values()))


def _merged(
    path: str, module: AdaptedLayer | SavedModule, name: str, factor: float
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Modules, names of parameters in them, and the values that these get."""
    if isinstance(module, SavedModule):
        for full, trained in module.tensors(name).items() if name in module.copies else ():
            inner, _, leaf = full.rpartition(".")
            owner = module.original.get_submodule(inner)
            yield owner, leaf, _rounded(trained.detach(), getattr(owner, leaf), path)
    elif name in module.adapters:
        base: Any = module.base
        weight, bias = folded(base, module.adapters[name], factor)
        yield base.module, "weight", _rounded(base.laid_out(weight), base.module.weight, path)
        if bias is not None:
            yield base.module, "bias", _rounded(bias, base.module.bias, path)


def _rounded(value: Tensor, own: Tensor, path: str) -> Tensor:
    rounded = value.to(own.device, own.dtype, copy=True).contiguous()
    if own.dtype == torch.float16 and not bool(rounded.isfinite().all()):
        raise AdapterError(
            "merged weights are too large for float16", where=path, fix="load the base as bfloat16 or float32"
        )
    return rounded


def _config(model: Any) -> Any:
    return model.config
