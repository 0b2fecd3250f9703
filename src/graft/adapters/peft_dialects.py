"""What each method's settings are called in PEFT's adapter_config.json, and which of its options are refused.

Format: PEFT 0.21. An option that would change what the model computes and that graft does not have is
refused by its name. A method that PEFT does not have is written under graft's own peft_type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from graft.adapters.base import METHODS, AdapterMethod
from graft.adapters.peft_dialect import Dialect, written_patterns
from graft.adapters.peft_fields import Field, flag, names, number, pattern, plain, shown, tokens, whole
from graft.adapters.peft_lora import ADALORA, lora_dialect
from graft.config import did_you_mean, from_dict, to_dict
from graft.errors import AdapterError

OWN_TYPE = "GRAFT"
"""peft_type of the methods that PEFT does not have; no other tool reads it."""

PLACEMENT = ("target_modules", "exclude_modules", "layers", "modules_to_save")
"""Fields of every method's settings, which `peft_config` reads and writes."""


def _read_vera(file: Field) -> dict[str, Any]:
    return {
        "rank": file.read("r", whole, 256),
        "dropout": file.read("vera_dropout", number, 0.0),
        "d_initial": file.read("d_initial", number, 0.1),
        "projection_seed": file.read("projection_prng_key", whole, 0),
    }


def _write_vera(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    return {
        "r": config.rank,
        "projection_prng_key": config.projection_seed,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
        "bias": "none",
        "init_weights": True,
    }


_VERA = Dialect(
    method="vera",
    peft_type="VERA",
    read=_read_vera,
    write=_write_vera,
    leaf="vera_lambda_",
    honoured=frozenset({"r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection"}),
    refused={"bias": "none"},
    idle=frozenset({"fan_in_fan_out", "init_weights"}),
    names={"rank": "r", "dropout": "vera_dropout", "projection_seed": "projection_prng_key"},
    lacks=frozenset({"exclude_modules"}),
)


def _read_ia3(file: Field) -> dict[str, Any]:
    return {"feedforward_modules": file.read("feedforward_modules", names, ())}


def _write_ia3(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    """PEFT compares endings as text, and wants each name among the targets: else both are full paths."""
    inner = [path for path, one in layers.items() if one.feedforward]
    short = sorted({path.rpartition(".")[2] for path in inner})
    written: dict[str, Any] = {"feedforward_modules": short, "init_ia3_weights": True}
    unlike = any(path.endswith(tuple(short)) for path in layers if path not in inner)
    if unlike or not set(short) <= set(targets):
        written |= {"target_modules": sorted(layers), "feedforward_modules": sorted(inner)}
    return written


_IA3 = Dialect(
    method="ia3",
    peft_type="IA3",
    read=_read_ia3,
    write=_write_ia3,
    leaf="ia3_l",
    honoured=frozenset({"feedforward_modules"}),
    refused={},
    idle=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    lacks=frozenset({"layers_to_transform", "layers_pattern"}),
)


def _read_loha(file: Field) -> dict[str, Any]:
    return {
        "rank": file.read("r", whole, 8),
        "alpha": file.read("alpha", number, 8.0),
        "rank_pattern": file.read("rank_pattern", pattern(whole), ()),
        "alpha_pattern": file.read("alpha_pattern", pattern(number), ()),
    }


def _write_loha(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    ours = {"r": config.rank, "alpha": plain(config.alpha), "init_weights": True}
    return {**ours, **written_patterns(config, layers)}


_LOHA = Dialect(
    method="loha",
    peft_type="LOHA",
    read=_read_loha,
    write=_write_loha,
    leaf="hada_",
    honoured=frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"}),
    refused={},
    idle=frozenset({"init_weights", "use_effective_conv2d"}),
    in_training=frozenset({"rank_dropout", "module_dropout"}),
    names={"rank": "r"},
    lacks=frozenset({"fan_in_fan_out"}),
)


def _read_lokr(file: Field) -> dict[str, Any]:
    return {
        **_read_loha(file),
        "decompose_both": file.read("decompose_both", flag, False),
        "decompose_factor": file.read("decompose_factor", whole, -1),
    }


def _write_lokr(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    return {
        **_write_loha(config, layers, targets),
        "decompose_both": config.decompose_both,
        "decompose_factor": config.decompose_factor,
    }


_LOKR = Dialect(
    method="lokr",
    peft_type="LOKR",
    read=_read_lokr,
    write=_write_lokr,
    leaf="lokr_",
    honoured=_LOHA.honoured | {"decompose_both", "decompose_factor"},
    refused={},
    idle=_LOHA.idle | {"rank_dropout_scale"},
    in_training=_LOHA.in_training,
    names={"rank": "r"},
    lacks=frozenset({"fan_in_fan_out"}),
)


def _read_oft(file: Field) -> dict[str, Any]:
    """The series of theirs with n terms goes up to Q^(n - 1), but not below Q^3 from three terms on.

    Raises:
        AdapterError: It has fewer than three terms.
    """
    terms = file.read("num_cayley_neumann_terms", whole, 5)
    series = file.read("use_cayley_neumann", flag, False)
    if series and terms < 3:
        raise AdapterError(
            f"num_cayley_neumann_terms = {terms} is not supported: such a series is no rotation",
            where=f"{file.path}: num_cayley_neumann_terms",
            fix="train with 3 terms or more, or merge this adapter into its base with PEFT",
        )
    order = max(2, terms - 2) if series else None
    return {"block_size": file.read("oft_block_size", whole, 32), "series_order": order}


def _write_oft(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    return {
        "r": 0,
        "oft_block_size": config.block_size,
        "use_cayley_neumann": config.series_order is not None,
        "num_cayley_neumann_terms": 5 if config.series_order is None else config.series_order + 2,
        "bias": "none",
        "coft": False,
        "block_share": False,
        "init_weights": True,
    }


_OFT = Dialect(
    method="oft",
    peft_type="OFT",
    read=_read_oft,
    write=_write_oft,
    leaf="oft_R",
    honoured=frozenset({"oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"}),
    refused={"bias": "none", "coft": False, "block_share": False, "r": 0},
    idle=frozenset({"init_weights", "fan_in_fan_out", "eps"}),
    in_training=frozenset({"module_dropout"}),
    names={"block_size": "oft_block_size"},
)


def _read_tokens(file: Field) -> dict[str, Any]:
    return {"token_indices": file.read("token_indices", tokens, ())}


def _write_tokens(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    return {"token_indices": list(config.token_indices), "init_weights": True}


_TOKENS = Dialect(
    method="trainable_tokens",
    peft_type="TRAINABLE_TOKENS",
    read=_read_tokens,
    write=_write_tokens,
    leaf="trainable_tokens_delta",
    honoured=frozenset({"token_indices"}),
    refused={},
    idle=frozenset({"init_weights", "fan_in_fan_out"}),
    names={},
    lacks=frozenset({
        "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    }),
)  # fmt: skip


DIALECTS: tuple[Dialect, ...] = (
    lora_dialect("lora", lambda raw: not raw.get("use_dora")),
    lora_dialect("dora", lambda raw: bool(raw.get("use_dora")), target_parameters=None),
    lora_dialect("lora_fa", lambda raw: False, use_dora=False),
    lora_dialect("qa_lora", lambda raw: False, use_dora=False, target_parameters=None),
    _VERA,
    _IA3,
    _LOHA,
    _LOKR,
    _OFT,
    ADALORA,
    _TOKENS,
)
"""Of the methods that PEFT has too. Of several that fit a file, the first one or what graft.json says."""


def dialect_of(method: str) -> Dialect:
    """How a method's settings are written.

    Args:
        method: Key of METHODS.
    """
    return next((known for known in DIALECTS if known.method == method), None) or _own(METHODS[method])


def dialect_for(file: Field, method: str = "") -> Dialect:
    """The dialect that a file is in.

    Args:
        file: The content of an adapter_config.json.
        method: What graft.json says, where that is needed to tell.

    Raises:
        AdapterError: Its peft_type is of none of the methods.
    """
    kind = file.raw.get("peft_type")
    if kind == OWN_TYPE:
        return _own(_known_method(file))
    fitting = [known for known in DIALECTS if known.peft_type == kind]
    for known in fitting:
        if known.method == method or (not method and known.claims(file.raw)):
            return known
    if "lora_parameters" in file.raw:
        raise AdapterError(
            "this is an adapter of mlx-lm, not one in PEFT's format",
            where=str(file.path),
            fix="graft.load_adapter reads it into a model, graft.save_adapter writes it as PEFT's from there",
        )
    raise AdapterError(
        f"peft_type {shown(kind)} is none of {', '.join(sorted({known.peft_type for known in DIALECTS}))}",
        where=f"{file.path}: peft_type",
        fix="merge an adapter of another kind into its base with PEFT",
    )


def check_options(file: Field, dialect: Dialect) -> None:
    """Refuse options that change the function and that graft does not have.

    Raises:
        AdapterError: One is set; it is named.
    """
    for name, harmless in dialect.refused.items():
        value = file.raw.get(name, harmless)
        if value not in (harmless, None, False) and value not in ([], {}):
            raise AdapterError(
                f"{name} = {shown(value)} is not supported",
                where=f"{file.path}: {name}",
                fix="train without it, or merge this adapter into its base with PEFT",
            )


def _known_method(file: Field) -> AdapterMethod:
    name = file.raw.get("method")
    if not isinstance(name, str) or name not in METHODS:
        raise AdapterError(
            f"the adapter's method {shown(name)} is not known here",
            where=f"{file.path}: method",
            fix=f"register it in METHODS before loading; {did_you_mean(str(name), METHODS)}",
        )
    return METHODS[name]


def _own(method: AdapterMethod) -> Dialect:
    """Of a method that PEFT does not have: its settings under their own names."""
    kind = method.config_class

    def read(file: Field) -> dict[str, Any]:
        given = file.raw.get("settings")
        made: Any = from_dict(kind, given if isinstance(given, dict) else {}, str(file.path))
        return {item.name: getattr(made, item.name) for item in fields(made) if item.name not in PLACEMENT}

    def write(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
        kept = {name: value for name, value in to_dict(config).items() if name not in PLACEMENT}
        return {"method": method.name, "settings": kept}

    return Dialect(
        method=method.name,
        peft_type=OWN_TYPE,
        read=read,
        write=write,
        leaf="",
        honoured=frozenset({"method", "settings"}),
        refused={},
    )
