"""What can be wrong with a run that trains nothing: each defect with its modules and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.adapters.adapted import AdaptedLayer
from graft.adapters.attached import Adapter, active_adapters, adapter_modules, adapter_tensors, adapters_of
from graft.adapters.effect import adapted_layers, asked_tensors, cancels, factors
from graft.adapters.targets import block_number
from graft.models.experts import Experts
from graft.training.optim import Optimizer


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        model: The model that trains.
        parameters: What is trained, by name.
        optimizer: What moves it.
        learning_rate: The peak.
        fresh: Whether nothing was trained before, so that updates must start at zero.
        checkpointing: Whether blocks are recomputed in the backward pass.
        path: Where audit.json goes.
        say: Told the outcome.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    learning_rate: float
    fresh: bool
    checkpointing: bool
    path: Path
    say: Callable[[str], None]

    @property
    def adapter(self) -> Adapter | None:
        """The adapter whose tensors train; None where the model itself does."""
        known, trained = adapters_of(self.model), {id(p) for p in self.parameters.values()}
        for name in known:
            if trained & {id(p) for p in adapter_tensors(self.model, name).values()}:
                return known[name]
        return next(iter(known.values()), None)


@dataclass(frozen=True)
class Finding:
    """A defect: what is wrong, the tensors or modules, the likely cause."""

    what: str
    names: tuple[str, ...]
    cause: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"what": self.what, "names": list(self.names), "cause": self.cause}


def findings(*found: tuple[str, Sequence[str], str]) -> list[Finding]:
    """Those that name something."""
    return [Finding(what, tuple(names), cause) for what, names, cause in found if names]


def wiring_defects(subject: Subject) -> list[Finding]:
    """What is wrong before anything is computed: other tensors than those asked for, or not connected."""
    parameters, optimizer = subject.parameters, subject.optimizer.parameters
    in_model = {id(p) for p in subject.model.parameters()}
    homes: dict[Any, list[str]] = {}
    for name, p in parameters.items():
        homes.setdefault((p.data_ptr(), tuple(p.shape)) if p.numel() else name, []).append(name)
    shared = [name for names in homes.values() if len(names) > 1 for name in names]
    found = findings(
        (
            "tensors that train are not in the model",
            [name for name, p in parameters.items() if id(p) not in in_model],
            "their module was replaced or copied after they were collected",
        ),
        ("tensors that train share memory", shared, "an adapter or module stands in two places at once"),
        (
            "tensors that train are kept in a type whose steps round away",
            [name for name, p in parameters.items() if p.dtype not in (torch.float32, torch.float64)],
            "the model was cast after the adapter was attached; keep what trains in float32",
        ),
        (
            "tensors that train are outside the optimizer",
            [name for name, p in parameters.items() if optimizer.get(name) is not p],
            "they were made or replaced after the optimizer",
        ),
    )
    if not 0 < subject.learning_rate < math.inf:
        found.append(
            Finding(f"the learning rate is {subject.learning_rate}", ("training.learning_rate",), "raise it")
        )
    return found + requirement_defects(subject) + _asked_defects(subject) + _adapter_defects(subject)


def requirement_defects(subject: Subject) -> list[Finding]:
    """Tensors that should take gradients and do not, or the other way round."""
    trained = {id(p) for p in subject.parameters.values()}
    others = {name: p for name, p in subject.model.named_parameters() if id(p) not in trained}
    return findings(
        (
            "tensors that train have requires_grad off",
            [name for name, p in subject.parameters.items() if not p.requires_grad],
            "something froze them after the adapter was attached",
        ),
        (
            "the base is not frozen",
            [name for name, p in others.items() if p.requires_grad],
            "something set requires_grad on it after the adapter was attached",
        ),
    )


def _asked_defects(subject: Subject) -> list[Finding]:
    made = subject.adapter
    if made is None:
        asked = {name: tuple(p.shape) for name, p in subject.model.named_parameters()}
    else:
        asked = asked_tensors(subject.model, made)
    have = {name: tuple(p.shape) for name, p in subject.parameters.items()}
    return findings(
        (
            "tensors that the configuration asks for do not train",
            sorted(asked.keys() - have.keys()),
            "their adapter was taken away, or a pattern of the settings no longer fits",
        ),
        (
            "tensors train that the configuration does not ask for",
            sorted(have.keys() - asked.keys()),
            "they belong to another adapter, or were added by hand",
        ),
        (
            "tensors have another shape than the configuration asks for",
            sorted(name for name in asked.keys() & have.keys() if asked[name] != have[name]),
            "they were replaced after the adapter was attached",
        ),
    )


def _adapter_defects(subject: Subject) -> list[Finding]:
    made = subject.adapter
    if made is None:
        return []
    modules = adapter_modules(subject.model)
    holders = [path for path in made.places if path in modules]
    asleep = [path for path in holders if made.name not in modules[path].active]
    if made.name not in active_adapters(subject.model):
        asleep = asleep or [made.name]
    layers = adapted_layers(subject.model, made.name)
    pairs = {path: pair for path, layer in layers.items() if (pair := factors(layer)) is not None}
    acting = {path: [bool(part.any()) for part in pair] for path, pair in pairs.items()}
    silent = [path for path, layer in layers.items() if getattr(layer, "scaling", 1.0) == 0.0]
    starts_at_zero = subject.fresh and not made.makes_up
    eager = [
        path for path, both in acting.items() if all(both) and starts_at_zero and not cancels(*pairs[path])
    ]
    return findings(
        (f"adapter {made.name!r} does not act", asleep, "set_active or a context manager left it out"),
        (
            "both factors of updates are zero, so that neither ever gets a gradient",
            [path for path, both in acting.items() if not any(both)],
            "lora_A was zeroed or never filled; attach the adapter anew",
        ),
        (
            "updates do not start at zero",
            eager,
            "neither factor is zero, nor their product: the run would start from another model than the base",
        ),
        ("updates are scaled by zero", silent, "scaling was changed after the adapter was attached"),
        (
            "scaling is not what the configuration asks for",
            [path for path, layer in layers.items() if path not in silent and _rescaled(made, path, layer)],
            "it was changed after the adapter was attached",
        ),
        (
            "dropout is asked for and off",
            [path for path, layer in layers.items() if getattr(layer, "dropout", 0) and not layer.training],
            "the layers were left in eval mode",
        ),
    )


def _rescaled(made: Adapter, path: str, layer: Any) -> bool:
    asked = getattr(made.config.at(path), "scaling", None)
    has = getattr(layer, "scaling", None)
    return asked is not None and has is not None and not math.isclose(has, asked, rel_tol=1e-6)


class Waiting:
    """Tensors that may wait for their first gradient.

    Those of experts without a token so far, and of their routers; those of layers that rest for now.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._experts = [path for path, module in model.named_modules() if isinstance(module, Experts)]
        self._layers = {
            path: module.adapters
            for path, module in adapter_modules(model).items()
            if isinstance(module, AdaptedLayer)
        }

    def excused(self, names: Sequence[str], served: Sequence[str]) -> list[str]:
        """Those of `names` whose layer rests, or is one of experts of which others are `served`."""
        blocks = {f"{path.rpartition('.')[0]}.": f"{path}." for path in self._experts}
        alive = tuple(
            block for block, home in blocks.items() if any(name.startswith(home) for name in served)
        )
        alive += tuple(
            f"{path}."
            for path, layers in self._layers.items()
            if any(getattr(layer, "may_wait", False) for layer in layers.values())
        )
        return [name for name in names if alive and name.startswith(alive)]


def all_may_wait(model: nn.Module, name: str) -> bool:
    """Whether no layer of an adapter need have an effect so far: its tokens may come later."""
    known, layers = adapters_of(model)[name], adapted_layers(model, name).values()
    whole = known.saved_modules or known.bias_modules
    return not whole and all(getattr(layer, "may_wait", False) for layer in layers)


def gradient_cause(subject: Subject, starved: Sequence[str], *, missing: bool) -> str:
    """Why tensors got no gradient, or only zeros.

    Args:
        subject: The run.
        starved: Their names.
        missing: Whether they have no gradient at all.
    """
    if len(starved) == len(subject.parameters):
        if subject.checkpointing and missing:
            return (
                "gradient checkpointing without gradients to its inputs (use_reentrant), or a loss that is "
                "detached from the model"
            )
        return "the loss does not depend on them: it or a module behind them is detached from the graph"
    fed = [
        number for name in subject.parameters if name not in set(starved) and (number := _block(name)) >= 0
    ]
    hungry = [number for name in starved if (number := _block(name)) >= 0]
    if fed and hungry and max(hungry) < min(fed):
        return (
            f"the graph is cut between block {max(hungry)} and block {min(fed)}: a module there is detached"
        )
    if all(name.endswith(("lora_A.weight", "lora_embedding_A")) for name in starved):
        return "their lora_B stays zero, or what goes through them is detached"
    if missing:
        return "their modules are detached from the graph or not used; take them out of the targets"
    return "what goes into their modules, or the gradient that comes back, is zero"


def movement_cause(subject: Subject, still: Sequence[str]) -> str:
    """Why tensors with a gradient did not move."""
    stepped = {key.rpartition("|")[0] for key in subject.optimizer.state()}
    if not any(name in stepped for name in still):
        return "the optimizer does not have them"
    return "the step is lost: learning rate zero, values put back, or a step below what their type resolves"


def _block(name: str) -> int:
    number = block_number(name)
    return -1 if number is None else number
