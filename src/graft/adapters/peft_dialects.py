"""What each method's settings are called in PEFT's adapter_config.json, and which of its options are refused.

Format: PEFT 0.21. An option that would change what the model computes and that graft does not have is
refused by its name. A method that PEFT does not have is written under graft's own peft_type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from graft.adapters.base import METHODS, AdapterMethod
from graft.adapters.peft_fields import Field, flag, names, number, pattern, plain, shown, whole
from graft.config import did_you_mean, from_dict, to_dict
from graft.errors import AdapterError

OWN_TYPE = "GRAFT"
"""peft_type of the methods that PEFT does not have; no other tool reads it."""

PLACEMENT = ("target_modules", "exclude_modules", "layers", "modules_to_save")
"""Fields of every method's settings, which `peft_config` reads and writes."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One method's part of an adapter_config.json."""

    method: str
    """Key of METHODS."""
    peft_type: str
    read: Callable[[Field], dict[str, Any]]
    """Our settings but for the placement, from theirs."""
    write: Callable[[Any, Mapping[str, Any], list[str]], dict[str, Any]]
    """Theirs from our settings, those of each target by its path, and the target_modules to be written."""
    leaf: str
    """What the last part of every key of a tensor starts with."""
    honoured: frozenset[str]
    """Their options that act."""
    refused: Mapping[str, Any]
    """Their options that would change the function, with the value that leaves it as it is."""
    idle: frozenset[str] = frozenset()
    """Their options that say how the file came about, or that follow from the model."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Theirs by ours, for errors."""
    lacks: frozenset[str] = frozenset()
    """Options of placement that their settings do not have."""
    claims: Callable[[Mapping[str, Any]], bool] = lambda raw: True
    """Whether a file of this peft_type is of this method."""


_LORA_REFUSED: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "trainable_token_indices": None,
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
}

_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""


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
        **_written_patterns(config, layers),
        "use_rslora": config.use_rslora,
        # How it started no longer matters, and other tools would make the start again as they load it.
        "init_lora_weights": config.init if config.init == "gaussian" else True,
        "bias": "none",
        "use_dora": config.method == "dora",
        "lora_bias": False,
    }


def _written_patterns(config: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rank_pattern": {path: one.rank for path, one in layers.items() if one.rank != config.rank},
        "alpha_pattern": {
            path: plain(one.alpha) for path, one in layers.items() if one.alpha != config.alpha
        },
    }


def _lora(method: str, claims: Callable[[Mapping[str, Any]], bool], **refused: Any) -> Dialect:
    return Dialect(
        method=method,
        peft_type="LORA",
        read=_read_lora,
        write=_write_lora,
        leaf="lora_",
        honoured=frozenset({
            "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
            "init_lora_weights", "use_dora", "target_parameters",
        }),
        refused={**_LORA_REFUSED, **refused},
        idle=frozenset({
            "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
        }),
        names={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        claims=claims,
    )  # fmt: skip


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
    return {**ours, **_written_patterns(config, layers)}


_LOHA = Dialect(
    method="loha",
    peft_type="LOHA",
    read=_read_loha,
    write=_write_loha,
    leaf="hada_",
    honoured=frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"}),
    refused={},
    idle=frozenset({"init_weights", "use_effective_conv2d"}),
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
    names={"rank": "r"},
    lacks=frozenset({"fan_in_fan_out"}),
)


def _read_oft(file: Field) -> dict[str, Any]:
    return {"block_size": file.read("oft_block_size", whole, 32)}


def _write_oft(config: Any, layers: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    return {
        "r": 0,
        "oft_block_size": config.block_size,
        "use_cayley_neumann": False,
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
    honoured=frozenset({"oft_block_size"}),
    refused={"bias": "none", "coft": False, "block_share": False, "use_cayley_neumann": False, "r": 0},
    idle=frozenset({"init_weights", "fan_in_fan_out", "eps", "num_cayley_neumann_terms"}),
    names={"block_size": "oft_block_size"},
)


DIALECTS: tuple[Dialect, ...] = (
    _lora("lora", lambda raw: not raw.get("use_dora")),
    _lora("dora", lambda raw: bool(raw.get("use_dora")), target_parameters=None),
    _lora("lora_fa", lambda raw: False, use_dora=False, target_parameters=None),
    _VERA,
    _IA3,
    _LOHA,
    _LOKR,
    _OFT,
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
