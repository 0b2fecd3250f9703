"""Settings that others found good for a kind of task, each with its source; and what is told of unusual ones.

A preset fills in what a configuration leaves out. Whatever the file, a flag or --set says stands.

Sources: LoRA (Hu et al. 2021, arXiv:2106.09685, appendix D), QLoRA (Dettmers et al. 2023, arXiv:2305.14314,
appendix B), "LoRA Learns Less and Forgets Less" (Biderman et al. 2024, arXiv:2405.09673), "LoRA Without
Regret" (Schulman et al. 2025), the QLoRA recipe for DPO of Hugging Face's alignment-handbook.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.adapters.lora import LoraConfig
from graft.adapters.settings import pairs
from graft.config import Settings, did_you_mean
from graft.errors import ConfigError

if TYPE_CHECKING:
    from graft.training.config import RunConfig


@dataclass(frozen=True)
class Choice:
    """One value of a preset."""

    path: str
    value: Any
    reason: str
    full: Any = None
    """The value where the whole model trains; None where that has the same one."""


_ALL_LAYERS = Choice(
    "adapter.target_modules", "all-linear", "LoRA Without Regret: all layers, above all those of the MLPs"
)
_TENTH = "; a tenth for the whole model (LoRA Without Regret)"

PRESETS: dict[str, tuple[Choice, ...]] = {
    "classification": (
        Choice("task", "classification", "a head over the classes of the data"),
        Choice("adapter.rank", 8, "LoRA, RoBERTa on GLUE"),
        Choice("adapter.alpha", 16.0, "LoRA, RoBERTa-large on GLUE"),
        _ALL_LAYERS,
        Choice("training.learning_rate", 4e-4, f"LoRA, RoBERTa on GLUE{_TENTH}", 4e-5),
        Choice("training.lr_scheduler", "linear", "LoRA, RoBERTa on GLUE"),
        Choice("training.warmup_ratio", 0.06, "LoRA, RoBERTa on GLUE"),
        Choice("training.batch_size", 16, "LoRA, RoBERTa on GLUE"),
    ),
    "generation": (
        Choice("adapter.rank", 16, "LoRA, GPT-2 on E2E: ranks from 4 to 64 do alike; some room above 4"),
        Choice("adapter.alpha", 32.0, "LoRA, GPT-2 on E2E, and LoRA Without Regret"),
        Choice("adapter.dropout", 0.1, "LoRA, GPT-2 on E2E"),
        _ALL_LAYERS,
        Choice("training.learning_rate", 2e-4, f"LoRA, GPT-2 on E2E{_TENTH}", 2e-5),
        Choice("training.lr_scheduler", "linear", "LoRA, GPT-2 on E2E"),
        Choice("training.weight_decay", 0.01, "LoRA, GPT-2 on E2E"),
        Choice("training.batch_size", 8, "LoRA, GPT-2 on E2E"),
    ),
    "instruction": (
        Choice("adapter.rank", 64, "QLoRA"),
        Choice("adapter.alpha", 16.0, "QLoRA"),
        Choice("adapter.dropout", 0.1, "QLoRA, up to 13 B parameters"),
        _ALL_LAYERS,
        Choice("training.learning_rate", 2e-4, f"QLoRA, up to 13 B parameters{_TENTH}", 2e-5),
        Choice("training.lr_scheduler", "constant", "QLoRA"),
        Choice("training.warmup_ratio", 0.03, "QLoRA"),
        Choice("training.max_grad_norm", 0.3, "QLoRA"),
        Choice("training.batch_size", 16, "QLoRA"),
    ),
    "domain": (
        Choice("adapter.rank", 128, "much text needs room: LoRA Learns Less and Forgets Less takes 256"),
        Choice("adapter.alpha", 256.0, "twice the rank: LoRA Learns Less and Forgets Less"),
        _ALL_LAYERS,
        Choice("training.learning_rate", 1e-4, f"within 1e-5 to 5e-4 of the same paper{_TENTH}", 1e-5),
        Choice("training.lr_scheduler", "cosine", "usual in pretraining, which this goes on with"),
        Choice("training.min_lr_ratio", 0.1, "usual in pretraining"),
        Choice("training.warmup_ratio", 0.03, "QLoRA"),
    ),
    "preference": (
        Choice("training.loss", "dpo", "learns from a chosen and a rejected answer"),
        Choice("adapter.rank", 16, "alignment-handbook"),
        Choice("adapter.alpha", 16.0, "alignment-handbook"),
        Choice("adapter.dropout", 0.05, "alignment-handbook"),
        _ALL_LAYERS,
        Choice("training.learning_rate", 5e-6, "alignment-handbook"),
        Choice("training.lr_scheduler", "cosine", "alignment-handbook"),
        Choice("training.warmup_ratio", 0.1, "alignment-handbook"),
    ),
}
"""The presets by name."""

_LIKE_LORA = ("lora", "dora", "lora_fa", "qa_lora")
"""Methods for which LoRA's rank, alpha, dropout and targets are good; others keep their own defaults."""

_UNLESS = {
    "training.warmup_ratio": ("training.warmup_steps",),
    "training.min_lr_ratio": ("training.lr_scheduler",),
    "training.learning_rate": ("training.optimizer", "training.loss"),
}
"""Values that are good only beside the preset's others: not filled in where one of these is given."""


def fill_in(settings: Settings) -> Settings:
    """Put the values of the preset that settings name where they say nothing themselves.

    Args:
        settings: What file and flags say; it is changed.

    Returns:
        The same settings.
    """
    name = settings.values.get("preset")
    if not isinstance(name, str) or name not in PRESETS:
        return settings  # none, or one that `check_filled_in` refuses
    whole = "adapter" in settings.values and settings.values["adapter"] is None
    given = {path for path, value in settings.values.items() if path not in ("adapter", "training")}
    method = settings.values.get("adapter.method", settings.values.get("adapter"))
    if isinstance(method, str) and method not in _LIKE_LORA:
        given |= {f"adapter.{name}" for name in ("rank", "alpha", "dropout", "target_modules")}
    for choice in PRESETS[name]:
        blocked = any(other in given for other in _UNLESS.get(choice.path, ()))
        if choice.path in given or blocked or (whole and choice.path.startswith("adapter.")):
            continue
        value = choice.full if whole and choice.full is not None else choice.value
        settings.values[choice.path] = value
        settings.origins[choice.path] = f"preset {name}"
    return settings


def preset_reasons(config: RunConfig) -> dict[str, str]:
    """Each value of a run's preset with its reason, or what was given in its place.

    Args:
        config: The whole configuration.
    """
    told = {}
    for choice in PRESETS.get(config.preset or "", ()):
        found = _value(config, choice.path)
        wanted = _wanted(config, choice)
        if found is None and choice.path.startswith("adapter."):
            continue
        same = found == wanted
        reason = choice.reason if same else f"the preset has {wanted}, other settings decide here"
        told[f"preset {config.preset}, {choice.path}"] = f"{found}: {reason}"
    return told


def check_filled_in(config: RunConfig) -> None:
    """Refuse a preset of which nothing is in the configuration: it was named where none is filled in.

    Raises:
        ConfigError: It is unknown, or has no effect.
    """
    if config.preset is None:
        return
    if config.preset not in PRESETS:
        fix = did_you_mean(config.preset, PRESETS)
        raise ConfigError(f"unknown preset {config.preset!r}", where="preset", fix=fix)
    if not any(_value(config, choice.path) == _wanted(config, choice) for choice in _telling(config)):
        raise ConfigError(
            f"preset = {config.preset!r} fills nothing in: every value of it is given otherwise",
            where="preset",
            fix="leave it out; in Python graft.config.from_dict(graft.RunConfig, {...}, '') fills it in",
        )


def _telling(config: RunConfig) -> Iterator[Choice]:
    """Choices whose value is not the one that stands there without a preset."""
    for choice in PRESETS[config.preset or ""]:
        section, _, name = choice.path.rpartition(".")
        kinds: dict[str, Any] = {"adapter": LoraConfig, "training": type(config.training), "": type(config)}
        if getattr(kinds[section], name) != choice.value:
            yield choice


def _wanted(config: RunConfig, choice: Choice) -> Any:
    return choice.full if config.adapter is None and choice.full is not None else choice.value


def _value(config: RunConfig, path: str) -> Any:
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# What is unusual.

HIGHEST_RANK = 128
"""Beyond it a rank is told of."""

SCALINGS = (0.25, 8.0)
"""Usual factors on B A: QLoRA has 16/64, the LoRA paper up to 32/4."""

RATES = {"adapter": (1e-5, 2e-3), "vectors": (1e-4, 3e-2), "full": (1e-6, 5e-4), "preferences": (1e-7, 1e-4)}
"""Usual peak learning rates of AdamW. Vectors are those of VeRA and (IA)^3. Adapters: 2e-4 (QLoRA)
to 1e-3; the whole model a tenth of that; preferences 5e-7 for the whole model to 5e-5 for adapters."""

LION_SHARE = 1 / 3
"""Lion's learning rate over AdamW's: 3 to 10 times smaller (arXiv:2302.06675, section 5)."""


def unusual(config: RunConfig, rate: float) -> dict[str, str]:
    """Settings far from what is usual, with the reason why that matters; the run goes on with them.

    Args:
        config: The whole configuration.
        rate: The peak learning rate.
    """
    told = {}
    adapter: Any = config.adapter
    if adapter is not None and adapter.method in _LIKE_LORA:
        ranks = [adapter.rank, *(int(rank) for rank in pairs(adapter.rank_pattern).values())]
        if max(ranks) > HIGHEST_RANK:
            told["unusual adapter.rank"] = (
                f"{max(ranks)} is above {HIGHEST_RANK}: memory and time grow with it, few rows are learned "
                "by heart, and alpha / rank damps the update; it pays with much data (see use_rslora)"
            )
        low, high = SCALINGS
        if not low <= adapter.scaling <= high:
            drowned = "the adapter hardly acts" if adapter.scaling < low else "its steps are too long"
            told["unusual adapter.alpha"] = (
                f"the update is scaled by {adapter.scaling:g}, usual is {low:g} to {high:g}: at a usual "
                f"learning rate {drowned}"
            )
    if (bounds := _usual_rates(config)) is not None and not bounds[0] <= rate <= bounds[1]:
        risk = "the run may end before it has learned" if rate < bounds[0] else "the run may diverge"
        told["unusual training.learning_rate"] = (
            f"{rate:g} is outside {bounds[0]:g} to {bounds[1]:g}, which is usual here: {risk}; small models "
            "stand higher rates"
        )
    return told


def _usual_rates(config: RunConfig) -> tuple[float, float] | None:
    if config.training.optimizer == "sgd":
        return None
    kind = "full" if config.adapter is None else "adapter"
    if config.adapter is not None and config.adapter.method in ("vera", "ia3"):
        kind = "vectors"
    low, high = RATES["preferences" if config.training.loss != "cross_entropy" else kind]
    return (low * 0.1, high * LION_SHARE) if config.training.optimizer == "lion" else (low, high)
