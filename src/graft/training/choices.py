"""What a run derives from its configuration: tensors that train, precision, learning rate, batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.adapters import attached
from graft.adapters.attached import Adapter, active_adapters, active_weights, adapters_of
from graft.config import to_dict
from graft.data.loader import Loader
from graft.data.prepare import Dataset
from graft.data.samples import Kind
from graft.errors import TrainingError
from graft.evaluate.preferences import PreferenceLoss
from graft.kernels.wide import is_wide
from graft.models.load import BaseModel
from graft.training.config import RunConfig, TrainingConfig
from graft.training.objectives import Classes, Objective, Preferences

DEFAULT_RATES = {"adapter": 2e-4, "full": 2e-5, "preferences": 5e-6}
"""Full fine-tuning wants about a tenth of an adapter's learning rate (LoRA Without Regret, 2025); preferences
want little (5e-6 in the alignment-handbook's QLoRA recipe for DPO)."""

METHOD_RATES = {
    "vera": (4e-3, "usual for VeRA, ten times LoRA's (arXiv:2310.11454)"),
    "ia3": (3e-3, "usual for (IA)^3 (arXiv:2205.05638)"),
    "adalora": (2e-3, "usual for AdaLoRA, whose E starts at zero between two small factors"),
}
"""Learning rates of methods whose numbers have to move far; at LoRA's they hardly learn."""

MAY_MOVE = ("output", "model.name", "data.train", "data.mix", "data.eval", "data.chat_template")
"""Fields that say where something lies; what lies there is compared by digest."""

WITHOUT_EFFECT = (
    "training.log_steps",
    "training.keep_checkpoints",
    "training.keep_best_checkpoints",
    "training.save_steps",
    "training.audit",
    "training.optimizer_memory",
    "training.optimizer_host_memory",
    "training.optimizer_spill",
    "training.activation_offload",
    "training.trackers",
    "data.workers",
    "data.cache",
)
"""Fields that change no weight and no line of the log."""


def binding_settings(config: RunConfig) -> dict[str, Any]:
    """The fields that a run must keep when it goes on, as "section.name", with their values."""
    flat = flat_settings(config)
    return {name: value for name, value in flat.items() if name not in MAY_MOVE + WITHOUT_EFFECT}


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """All fields of a configuration as "section.name", with their values."""
    flat: dict[str, Any] = {}
    for section, fields in to_dict(config).items():
        if isinstance(fields, dict):
            flat |= {f"{section}.{name}": value for name, value in fields.items()}
        else:
            flat[section] = fields
    return flat


def trained_tensors(model: nn.Module, adapter: Adapter | None) -> dict[str, nn.Parameter]:
    """What is trained, by name, in a fixed order; all of it in float32."""
    if adapter is not None:
        found = attached.trained_tensors(model, adapter.name)
        return {name: found[name] for name in sorted(found)}
    model.float()
    model.requires_grad_(True)
    return dict(model.named_parameters())


def adapter_to_train(model: nn.Module) -> Adapter | None:
    """The adapter of a model that trains: the one that acts; None where it carries none.

    Raises:
        TrainingError: None of its adapters acts, several do, or the one that does was loaded for use only or
            acts with a weight.
    """
    known, active = adapters_of(model), active_adapters(model)
    if not known:
        return None
    if len(active) != 1:
        raise TrainingError(
            f"of the adapters {', '.join(known)}, {', '.join(active) or 'none'} act: one must, to be trained",
            where="base.model",
            fix=f'graft.set_active(base.model, "{next(iter(known))}")',
        )
    weight = active_weights(model)[active[0]]
    if weight != 1:
        raise TrainingError(
            f"adapter {active[0]!r} acts with weight {weight:g}, which its files could not hold",
            where="base.model",
            fix=f'graft.set_active(base.model, "{active[0]}")',
        )
    if not known[active[0]].trainable:
        raise TrainingError(
            f"adapter {active[0]!r} was loaded for use, not for training",
            where="base.model",
            fix="graft.load_adapter(..., trainable=True)",
        )
    return known[active[0]]


def precision(
    base: BaseModel, config: RunConfig, adapter: Adapter | None
) -> tuple[torch.dtype | None, dict[str, str]]:
    """Tensors that train are float32; the rest computes in the base's dtype."""
    asked = config.model.dtype
    device_type = next(base.model.parameters()).device.type
    slow = f"this processor has no products of {base.dtype}"
    if adapter is not None:
        wide = f"; products in float32: {slow}" if is_wide(base.dtype, device_type) else ""
        return None, {"precision": f"adapter in float32, base and activations in {base.dtype}{wide}"}
    compute = getattr(torch, asked) if asked else base.dtype
    if compute == torch.float32:
        return None, {"precision": "weights and activations in float32"}
    if not asked and is_wide(compute, device_type):
        return None, {"precision": f"weights and activations in float32: {slow}; set model.dtype to insist"}
    return compute, {"precision": f"weights in float32, matrix products in {compute}"}


def scales_loss(base: BaseModel, autocast: torch.dtype | None, adapter: Adapter | None) -> bool:
    """Whether products are in float16, whose small range loses gradients that are not made larger."""
    return torch.float16 in (autocast, base.dtype if adapter is not None else None)


def learning_rate(config: TrainingConfig, adapter: Adapter | None) -> tuple[float, str]:
    """The peak learning rate, and why it is this one."""
    if config.learning_rate is not None:
        return config.learning_rate, f"{config.learning_rate:g}, as asked"
    if config.loss != "cross_entropy":
        return DEFAULT_RATES["preferences"], f"{DEFAULT_RATES['preferences']:g}: usual for preferences"
    if adapter is not None and adapter.config.method in METHOD_RATES:
        rate, reason = METHOD_RATES[adapter.config.method]
        return rate, f"{rate:g}: {reason}"
    rate = DEFAULT_RATES["full" if adapter is None else "adapter"]
    return rate, f"{rate:g}: " + (
        "full fine-tuning wants about a tenth of an adapter's" if adapter is None else "usual for adapters"
    )


def make_loader(data: Dataset, config: RunConfig, base: BaseModel, *, train: bool) -> Loader:
    """Batches of the training data, or of the evaluation data, which keep their order."""
    return loader_of(data, config, base.tokenizer, train=train)


def loader_of(data: Dataset, config: RunConfig, tokenizer: Any, *, train: bool) -> Loader:
    """The same with the tokenizer alone, before there is a model."""
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    loader = Loader(
        data.samples,
        batch_size=config.training.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        seed=config.training.seed,
        shuffle=train and config.data.shuffle,
        pad_id=pad_id,
        kind=sample_kind(config),
    )
    loader.workers = config.data.workers
    return loader


def sample_kind(config: RunConfig) -> Kind:
    """What the samples of a run are."""
    if config.task == "classification":
        return "class"
    return "text" if config.training.loss == "cross_entropy" else "pair"


def objective(config: RunConfig, data: Dataset) -> Objective | None:
    """What is learned in place of labelled tokens; None for these."""
    if config.task == "classification":
        return Classes(len(data.labels))
    training = config.training
    if training.loss == "cross_entropy":
        return None
    loss = PreferenceLoss(
        kind=training.loss, beta=training.dpo_beta, label_smoothing=training.dpo_label_smoothing
    )
    return Preferences(loss)
