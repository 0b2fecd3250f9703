"""LoRA's settings and those of its kin in PEFT's adapter_config.json: LORA and ADALORA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graft.adapters.peft_dialect import Dialect, written_patterns
from graft.adapters.peft_fields import (
    Field,
    chosen_ranks,
    flag,
    number,
    one_of,
    pattern,
    plain,
    shown,
    tokens,
    whole,
)
from graft.errors import AdapterError

_LORA_REFUSED: dict[str, Any] = {
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "megatron_config": None,
    "loftq_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "ensure_weight_tying": False,
    "enable_lora": None,  # of PEFT 0.2: some parts of a fused linear only, in a layout of their own
}

_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""


_PLAIN_ONLY: dict[str, Any] = {"bias": "none", "lora_bias": False, "trainable_token_indices": None}
"""Options of LoRA that its kin do not have."""


def _read_plain_lora(file: Field) -> dict[str, Any]:
    """Of LoRA itself, which has more than its kin."""
    return {
        **_read_lora(file),
        "bias": file.read("bias", one_of("none", "all", "lora_only"), "none"),
        "lora_bias": file.read("lora_bias", flag, False),
        "trainable_token_indices": file.read("trainable_token_indices", tokens, ()),
    }


def _read_qa_lora(file: Field) -> dict[str, Any]:
    """A file that is plain LoRA to everyone else; PEFT's own form (use_qalora) goes over GPTQ only."""
    return {**_read_lora(file), "group_size": file.read("qalora_group_size", whole, None)}


def _read_lora(file: Field) -> dict[str, Any]:
    init = file.raw.get("init_lora_weights", True)
    if init is not None and init not in _INITS:
        raise AdapterError(
            f"init_lora_weights = {shown(init)} is not supported: it changes the base weights",
            where=f"{file.path}: init_lora_weights",
            fix="save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )
    return {
        "rank": file.read("r", whole, 8),
        "alpha": file.read("lora_alpha", number, 8.0),
        "dropout": file.read("lora_dropout", number, 0.0),
        "init": "gaussian" if init == "gaussian" else "kaiming",
        "use_rslora": file.read("use_rslora", flag, False),
        "rank_pattern": file.read("rank_pattern", pattern(whole), ()),
        "alpha_pattern": file.read("alpha_pattern", pattern(number), ()),
    }


def _write_lora(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    return {
        "r": config.rank,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        **written_patterns(config, layers),
        "use_rslora": config.use_rslora,
        # How it started no longer matters, and other tools would make the start again as they load it.
        "init_lora_weights": config.init if config.init == "gaussian" else True,
        **({"qalora_group_size": config.group_size} if config.method == "qa_lora" else {}),
        "bias": getattr(config, "bias", "none"),
        "use_dora": config.method == "dora",
        "lora_bias": getattr(config, "lora_bias", False),
        "trainable_token_indices": list(getattr(config, "trainable_token_indices", ())) or None,
    }


def lora_dialect(method: str, claims: Callable[[Mapping[str, Any]], bool], **refused: Any) -> Dialect:
    """The dialect of a method that is a LORA to PEFT.

    Args:
        method: Key of METHODS.
        claims: Whether a file is of this method.
        **refused: More options that are refused, with the value that leaves the function as it is.
    """
    unlike = {**_LORA_REFUSED, **({} if method == "lora" else _PLAIN_ONLY), **refused}
    return Dialect(
        method=method,
        peft_type="LORA",
        read={"lora": _read_plain_lora, "qa_lora": _read_qa_lora}.get(method, _read_lora),
        write=_write_lora,
        leaf="lora_",
        honoured=frozenset({
            "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
            "init_lora_weights", "use_dora", "target_parameters", "bias", "lora_bias",
            "trainable_token_indices",
        }) - unlike.keys(),
        refused=unlike,
        idle=frozenset({
            "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
            "merge_weights",
        }),
        names={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        claims=claims,
    )  # fmt: skip


def _read_adalora(file: Field) -> dict[str, Any]:
    """Their schedule (tinit, tfinal, deltaT, total_step) belongs to the run that is over."""
    return {
        "rank": (rank := file.read("init_r", whole, 12)),
        "target_rank": min(rank, file.read("target_r", whole, 8)),
        "alpha": file.read("lora_alpha", number, 8.0),
        "dropout": file.read("lora_dropout", number, 0.0),
        "beta1": file.read("beta1", number, 0.85),
        "beta2": file.read("beta2", number, 0.85),
        "orthogonal_weight": file.read("orth_reg_weight", number, 0.5),
        "rank_pattern": file.read("rank_pattern", chosen_ranks, ()),
    }


def _write_adalora(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    """PEFT reads no file without a number of steps that leaves some between the first and the last ones."""
    initial, final = config.initial_steps or 0, config.final_steps or 0
    fewer = {path: one.rank for path, one in layers.items() if one.rank != config.rank}
    return {
        "init_r": config.rank,
        "target_r": config.target_rank,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        "tinit": initial,
        "tfinal": final,
        "deltaT": config.allocation_interval,
        "total_step": config.total_steps or initial + final + 1,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonal_weight,
        "rank_pattern": {
            f"{path}.lora_E": [number < rank for number in range(config.rank)] for path, rank in fewer.items()
        }
        or None,
        "bias": "none",
        "init_lora_weights": True,
    }


ADALORA = Dialect(
    method="adalora",
    peft_type="ADALORA",
    read=_read_adalora,
    write=_write_adalora,
    leaf="lora_",
    honoured=frozenset({
        "init_r", "target_r", "lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight",
        "rank_pattern",
    }),
    refused={
        **_LORA_REFUSED, **_PLAIN_ONLY, "use_dora": False, "target_parameters": None,
    },
    idle=frozenset({
        "r", "tinit", "tfinal", "deltaT", "total_step", "use_rslora", "alpha_pattern", "init_lora_weights",
        "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
    }),
    names={
        "rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
        "orthogonal_weight": "orth_reg_weight",
    },
)  # fmt: skip
