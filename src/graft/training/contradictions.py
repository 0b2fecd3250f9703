"""Fields of a run that contradict each other: the loss, the task, the recovery phase, the quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from graft.adapters.base import method_of, ships_quantized
from graft.errors import ConfigError

if TYPE_CHECKING:
    from graft.training.config import RunConfig, TrainingConfig


def check_objective(config: TrainingConfig) -> None:
    """Refuse constants of a loss that is not the one chosen.

    Raises:
        ConfigError: A field has nothing to act on, or is out of range.
    """
    preferring = config.loss != "cross_entropy"
    if config.dpo_beta != type(config).dpo_beta and not preferring:
        _refuse("dpo_beta", config.dpo_beta, "left out with the cross_entropy loss; it acts on dpo and ipo")
    if not 0 <= config.dpo_label_smoothing < 0.5:
        _refuse("dpo_label_smoothing", config.dpo_label_smoothing, "from 0 to below 0.5")
    if config.dpo_label_smoothing and config.loss != "dpo":
        _refuse("dpo_label_smoothing", config.dpo_label_smoothing, f"left out with {config.loss}; dpo has it")
    if config.recovery_learning_rate is not None and not config.recovery_steps:
        _refuse("recovery_learning_rate", config.recovery_learning_rate, "left out without recovery_steps")


def check_run(config: RunConfig) -> None:
    """Refuse sections that contradict the loss, the task, the recovery phase or the adapter.

    Raises:
        ConfigError: They do.
    """
    training, data = config.training, config.data
    if training.loss != "cross_entropy":
        if config.task == "classification":
            _refuse("loss", training.loss, "cross_entropy for --task classification")
        if config.adapter is None:
            _refuse("loss", training.loss, "used with an adapter: the base under it is the reference")
        if data.loss_on == "all":
            _refuse_data("loss_on", data.loss_on, f"left out with {training.loss}: only answers are compared")
        if data.format != "auto":
            _refuse_data("format", data.format, f"auto with {training.loss}: the rows are preferences")
    if config.task == "classification":
        for name, free in (("format", "auto"), ("loss_on", "auto"), ("chat_template", None)):
            if getattr(data, name) != free:
                told = "left out with --task classification, whose rows are a text and a label"
                _refuse_data(name, getattr(data, name), told)
    if training.recovery_steps and config.quantization is None:
        wanted = "left out: no quantization is asked for, so training is on the dense base already"
        _refuse("recovery_steps", training.recovery_steps, wanted)
    _check_adapter(config)


def _check_adapter(config: RunConfig) -> None:
    adapter = config.adapter
    if adapter is not None and config.quantization is not None and ships_quantized(method_of(adapter)):
        raise ConfigError(
            f"method {adapter.method} rounds the weights of a dense base itself; quantization = "
            f"{config.quantization.quant_type!r} would round them before",
            where="quantization.quant_type",
            fix="leave quantization out; the format is adapter.quant_type",
        )


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise ConfigError(f"training.{name} = {value!r}", where=f"training.{name}", fix=f"it must be {wanted}")


def _refuse_data(name: str, value: object, wanted: str) -> NoReturn:
    raise ConfigError(f"data.{name} = {value!r}", where=f"data.{name}", fix=f"it must be {wanted}")
