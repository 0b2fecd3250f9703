"""What other tools call the fields of a configuration; their names are accepted and answered with ours."""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from graft.errors import ConfigError

C = TypeVar("C", bound=Callable[..., Any])

ALIASES: dict[str, str] = {
    "model_name_or_path": "model.name",
    "model_name": "model.name",
    "base_model": "model.name",
    "torch_dtype": "model.dtype",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "layers_to_transform": "adapter.layers",
    "bnb_4bit_quant_type": "quantization.quant_type",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "use_bnb_nested_quant": "quantization.double_quant",
    "train_file": "data.train",
    "dataset": "data.train",
    "validation_file": "data.eval",
    "eval_file": "data.eval",
    "eval_dataset": "data.eval",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sample_packing": "data.packing",
    "lr": "training.learning_rate",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "num_train_epochs": "training.num_epochs",
    "epochs": "training.num_epochs",
    "iters": "training.max_steps",
    "grad_accum": "training.gradient_accumulation_steps",
    "lr_schedule": "training.lr_scheduler",
    "lr_scheduler_type": "training.lr_scheduler",
    "optim": "training.optimizer",
    "loraplus_lr_ratio": "training.lora_plus_ratio",
    "loraplus_lr_embedding": "training.embedding_learning_rate",
    "embedding_lr": "training.embedding_learning_rate",
    "load_best_model_at_end": "training.load_best_at_end",
    "save_total_limit": "training.keep_checkpoints",
    "save_top_k": "training.keep_best_checkpoints",
    "early_stopping_threshold": "training.early_stopping_min_delta",
    "num_warmup_steps": "training.warmup_steps",
    "lr_warmup_steps": "training.warmup_steps",
    "warmup_proportion": "training.warmup_ratio",
    "activation_offloading": "training.activation_offload",
    "lr_num_cycles": "training.num_cycles",
    "min_lr_rate": "training.min_lr_ratio",
    "cosine_min_lr_ratio": "training.min_lr_ratio",
    "logging_steps": "training.log_steps",
    "steps_per_eval": "training.eval_steps",
    "output_dir": "output",
}
"""Names that other tools use for a field, by the path that graft uses."""

SWITCHES: dict[str, dict[Any, tuple[str, Any]]] = {
    "load_in_4bit": {True: ("quantization.quant_type", "nf4"), False: ("quantization", None)},
    "load_in_8bit": {True: ("quantization.quant_type", "int8")},
    "train_on_inputs": {True: ("data.loss_on", "all"), False: ("data.loss_on", "completion")},
    "mask_prompt": {True: ("data.loss_on", "completion"), False: ("data.loss_on", "all")},
    "completion_only_loss": {True: ("data.loss_on", "completion"), False: ("data.loss_on", "all")},
    "assistant_only_loss": {True: ("data.loss_on", "completion"), False: ("data.loss_on", "all")},
}
"""Switches of other tools whose value decides both our field and its value."""

FOREIGN_SECTIONS: dict[str, str] = {"lr_scheduler_kwargs": "training"}
"""Sections of other tools, by the section that graft has their fields in."""

VALUES: dict[str, dict[str, str]] = {
    "training.optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw8bit": "adamw_8bit",
        "lion_32bit": "lion",
    },
    "training.lr_scheduler": {
        "warmup_stable_decay": "wsd",
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
    },
}
"""Values that other tools use for a field, by the value that graft uses."""

REFUSED_VALUES: dict[str, dict[str, tuple[str, str]]] = {
    "training.optimizer": {
        name: (
            "paging takes a budget: training.optimizer_memory",
            f"{ours}, with optimizer_memory: 1GB{more}",
        )
        for name, ours, more in (
            ("paged_adamw", "adamw", ""),
            ("paged_adamw_32bit", "adamw", ""),
            ("paged_adamw_8bit", "adamw_8bit", ""),
            ("paged_lion", "lion", ""),
            ("paged_lion_32bit", "lion", ""),
            ("paged_lion_8bit", "lion", ", with a moment in float32"),
        )
    },
}
"""Values of other tools that graft has nothing for: the reason, and what to take."""


def own_path(path: str) -> str:
    """The path of a field in graft's words; any other as it is.

    Args:
        path: The field alone, or inside a section: "lora_alpha", "adapter.lora_alpha",
            "training.lr_scheduler_kwargs.min_lr_rate".
    """
    *sections, leaf = path.split(".")
    foreign = bool(sections) and sections[-1] in FOREIGN_SECTIONS
    section = FOREIGN_SECTIONS[sections[-1]] if foreign else (sections or [""])[0]
    ours = ALIASES.get(leaf, "")
    if ours and section in ("", ours.split(".")[0]):
        return ours
    return f"{section}.{leaf}" if foreign else path


def own_value(path: str, value: Any) -> Any:
    """A value of another tool in graft's words; any other as it is.

    Args:
        path: The field, "training.optimizer".
        value: What was given.

    Returns:
        The value to use.

    Raises:
        ConfigError: A value that graft has nothing for.
    """
    if not isinstance(value, str):
        return value
    if value in REFUSED_VALUES.get(path, {}):
        what, fix = REFUSED_VALUES[path][value]
        raise ConfigError(f"{path} = {value!r}: {what}", where=path, fix=fix)
    return VALUES.get(path, {}).get(value, value)


def explained(target: C) -> C:
    """Let a function or a dataclass answer a call that does not fit it with a ConfigError.

    Errors from inside the call pass as they are.

    Args:
        target: The function, or the class whose `__init__` is meant.
    """
    if isinstance(target, type):
        made: Any = target
        made.__init__ = explained(made.__init__)
        return target
    signature = inspect.signature(target)
    name = target.__qualname__.removesuffix(".__init__")

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise _misfit(name, list(signature.parameters), kwargs, str(error)) from None
        return target(*args, **kwargs)

    return call  # type: ignore[return-value]


def _misfit(name: str, parameters: list[str], given: Mapping[str, Any], told: str) -> ConfigError:
    known = [parameter for parameter in parameters if parameter != "self"]
    unknown = next((word for word in given if word not in known), None)
    if unknown is None:
        return ConfigError(f"{name}: {told}", where=name, fix=f"it takes, by name: {', '.join(known)}")
    return ConfigError(
        f"{name} takes no {unknown}={reprlib.repr(given[unknown])}",
        where=name,
        fix=_in_our_words(unknown, given[unknown], known),
    )


def _in_our_words(word: str, value: Any, known: list[str]) -> str:
    path = ALIASES.get(word, "")
    if isinstance(value, bool) and value in SWITCHES.get(word, {}):
        path, value = SWITCHES[word][value]
    section, _, leaf = path.rpartition(".")
    if leaf in known:
        return f"{word} is {leaf} here: {leaf}={reprlib.repr(value)}"
    if section in known:
        return f"{word} is {leaf} of {section} here" + (
            f": {section}={value!r}" if leaf == "quant_type" else ""
        )
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
