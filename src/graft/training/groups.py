"""How each trained tensor is treated: its group, learning rate and decay, and how its state is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from graft.adapters.adapted import SavedModule
from graft.errors import ConfigError
from graft.training.config import TrainingConfig

GROUPS = ("lora_A", "lora_B", "magnitude", "embedding", "head", "saved", "rest")
"""Of tensors that are treated alike unless asked otherwise, and clipped together."""

_LEAF_GROUPS = (
    ("magnitude", re.compile(r"(^|\.)(lora_magnitude_vector|magnitude)(\.|$)")),
    ("embedding", re.compile(r"(^|\.)lora_embedding_[AB](\.|$)")),
    ("embedding", re.compile(r"(^|\.)trainable_tokens_delta$")),
    ("lora_A", re.compile(r"(^|\.)lora_A(\.|$)")),
    ("lora_B", re.compile(r"(^|\.)lora_B(\.|$)")),
)
_ROWS = re.compile(r"(^|\.)trainable_tokens_delta$")
"""Rows of an embedding are one."""
_EMBEDDING_B = re.compile(r"(^|\.)lora_embedding_B(\.|$)")
_CLASSIFIERS = re.compile(r"(^|\.)(score|classifier|classification_head|qa_outputs)(\.|$)")
"""Heads that transformers' classification models have; those of their language models it knows by itself."""


@dataclass(frozen=True)
class Treatment:
    """What an update rule knows of a tensor besides its gradient."""

    rate: float = 1.0
    """Its learning rate over that of the run."""
    decays: bool = True
    """Whether weight decay acts on it."""
    float32_state: bool = False
    """Whether its moments stay in float32 whatever the optimizer."""
    weight_decay: float | None = None
    """A decay of its own; None for the run's."""
    group: str = "rest"
    """Which of `GROUPS` it is clipped with."""


@dataclass(frozen=True)
class _Own:
    """A setting of a group, and what is missing where nothing of it trains."""

    name: str
    groups: tuple[str, ...]
    wanted: str


_RATES = (
    _Own("lora_A_learning_rate", ("lora_A",), "lora_A"),
    _Own("lora_B_learning_rate", ("lora_B",), "lora_B"),
    _Own("magnitude_learning_rate", ("magnitude",), "magnitude vector (DoRA)"),
    _Own("head_learning_rate", ("head",), "output or classification head"),
    _Own(
        "embedding_learning_rate",
        ("embedding", "head", "saved"),
        "embedding, output head or module of adapter.modules_to_save",
    ),
)
"""The first one that is given and has the group decides."""

_DECAYS = (
    _Own("head_weight_decay", ("head",), "matrix of an output or classification head"),
    _Own("embedding_weight_decay", ("embedding",), "embedding"),
)


def treatments(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], config: TrainingConfig, peak: float
) -> dict[str, Treatment]:
    """The treatment of every trained tensor.

    Weight decay acts on matrices, but not on input embeddings: a row whose token is not in the data has no
    gradient that would hold against it, and shrinks away. It does not act on vectors (biases, gains of
    norms), which shift and scale what is computed. Moments of embeddings stay in float32, as with the callers
    of bitsandbytes: rows that have a gradient now and then would lie under the scale of others.

    Args:
        model: That holds the tensors.
        parameters: What is trained, by name.
        config: `lora_plus_ratio` (LoRA+, arXiv:2402.12354), the learning rates and decays of groups.
        peak: The run's peak learning rate, resolved.

    Returns:
        Treatments by name.

    Raises:
        ConfigError: A rate or decay is asked for where nothing trains that it is for.
    """
    inputs = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)}
    groups = tensor_groups(model, parameters, inputs)
    reached: set[str] = set()
    found: dict[str, Treatment] = {}
    for name, parameter in parameters.items():
        group, is_input = groups[name], id(parameter) in inputs or bool(_ROWS.search(name))
        own = _asked(_RATES, group, config)
        rate = getattr(config, own) / peak if own else 1.0
        if not own and (group == "lora_B" or _EMBEDDING_B.search(name)):
            own, rate = "lora_plus_ratio", config.lora_plus_ratio
        decays = parameter.ndim >= 2
        decay = _asked(_DECAYS, group, config) if decays else ""
        decays = decays and (bool(decay) or not is_input)
        reached |= {own, decay}
        found[name] = Treatment(rate, decays, is_input, getattr(config, decay) if decay else None, group)
    _check_reached(config, reached)
    return found


def tensor_groups(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: set[int]
) -> dict[str, str]:
    """Which of `GROUPS` each tensor belongs to.

    A matrix that is input embedding and output head at once (tied) is an embedding.

    Args:
        model: That holds the tensors.
        parameters: What is trained, by name.
        inputs: Of embeddings, by id.
    """
    heads, saved = _heads(model), _saved(model)

    def group(name: str, parameter: nn.Parameter) -> str:
        if id(parameter) in inputs:
            return "embedding"
        if id(parameter) in heads:
            return "head"
        if id(parameter) in saved:
            return "saved"
        return next((word for word, leaf in _LEAF_GROUPS if leaf.search(name)), "rest")

    return {name: group(name, parameter) for name, parameter in parameters.items()}


def _asked(settings: tuple[_Own, ...], group: str, config: TrainingConfig) -> str:
    return next((o.name for o in settings if group in o.groups and getattr(config, o.name) is not None), "")


def _saved(model: nn.Module) -> set[int]:
    saved = (module for module in model.modules() if isinstance(module, SavedModule))
    return {id(parameter) for module in saved for parameter in module.copies.parameters()}


def _heads(model: nn.Module) -> set[int]:
    """Tensors of the output head and of classification heads, and of the copies that train in their place."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    found: set[int] = set()
    if isinstance(head, SavedModule | nn.Linear):
        found = {id(p) for p in head.parameters(recurse=isinstance(head, SavedModule))}
    classifiers = (m for path, m in model.named_modules() if _CLASSIFIERS.search(path) and not _adapter(path))
    return found | {id(p) for module in classifiers for p in module.parameters(False)}


def _adapter(path: str) -> bool:
    return ".adapters." in f".{path}."


def _check_reached(config: TrainingConfig, reached: set[str]) -> None:
    if config.lora_plus_ratio != 1 and "lora_plus_ratio" not in reached:
        _refuse("lora_plus_ratio", config.lora_plus_ratio, "lora_B")
    for own in (*_RATES, *_DECAYS):
        value = getattr(config, own.name)
        if value is not None and own.name not in reached:
            _refuse(own.name, value, own.wanted)


def _refuse(name: str, value: float, wanted: str) -> None:
    raise ConfigError(
        f"training.{name} = {value!r}, but no {wanted} is trained",
        where=f"training.{name}",
        fix="leave it out, or train one",
    )
