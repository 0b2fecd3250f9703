"""torchtune's own adapter checkpoints: adapter_model.pt, with PEFT's adapter_config.json beside it.

Names are torchtune's: layers.N.attn.output_proj is o_proj, mlp.w1, w3, w2 are gate, up, down, output is
lm_head; lora_a.weight (rank, in), lora_b.weight (out, rank), magnitude (out,). In the families whose rotary
embedding turns neighbouring numbers there (Llama, Mistral, Gemma) the rows of q and k stand in another order
than in Hugging Face's checkpoints, so the rows of lora_b and the magnitudes do too; Qwen's stand as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graft.adapters.foreign_layers import ForeignLayer, paired, uniform
from graft.adapters.peft_fields import plain
from graft.errors import AdapterError

WEIGHTS = "adapter_model.pt"
CONFIG = "adapter_config.json"
LEAVES = ("lora_a.weight", "lora_b.weight", "magnitude")

_PATHS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_BACK = {ours: theirs for theirs, ours in _PATHS.items()}

_TURNED = ("llama", "mistral", "gemma", "gemma2")
"""model_types whose rows of q and k torchtune reorders."""

_AS_THEY_ARE = ("qwen2", "qwen3")


def read(tensors: Mapping[str, Tensor], alpha: float, config: Any, where: str) -> list[ForeignLayer]:
    """The layers of an adapter.

    Args:
        tensors: Of adapter_model.pt, by their names.
        alpha: The update is scaled by alpha / rank.
        config: Of the model.
        where: The file of the tensors, for errors.

    Raises:
        AdapterError: The model's family or a name is not known here, or factors do not fit each other.
    """
    layers = []
    for path, (down, up, magnitude) in paired(tensors, LEAVES, where).items():
        ours = _ours(path, where)
        if up.shape[1] != len(down):
            raise AdapterError(
                f"{path} has lora_a {list(down.shape)} and lora_b {list(up.shape)}, of two ranks",
                where=where,
                fix="copy the file again",
            )
        heads = _heads(ours, config)
        if heads:
            up = _from_neighbours(up, heads)  # noqa: PLW2901 - in their order, now in ours
            magnitude = None if magnitude is None else _from_neighbours(magnitude, heads)
        layers.append(ForeignLayer(ours, down, up, alpha / len(down), magnitude))
    return layers


def write(
    layers: Sequence[ForeignLayer], config: Any, base: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of an adapter.

    Args:
        layers: Of one kind, LoRA or DoRA.
        config: Of the model.
        base: The base's name.

    Returns:
        What adapter_model.pt and adapter_config.json hold. torchtune takes rank, alpha and layers from its
        own recipe; the config says what they must be there.

    Raises:
        AdapterError: The model's family is not known here, or a layer has no place in torchtune's models.
    """
    rank, scaling, alike = uniform(layers)
    tensors: dict[str, Tensor] = {}
    for layer in alike:
        theirs, heads = _theirs(layer.path), _heads(layer.path, config)
        up, magnitude = layer.up, layer.magnitude
        if heads:
            up = _to_neighbours(up, heads)
            magnitude = None if magnitude is None else _to_neighbours(magnitude, heads)
        tensors[f"{theirs}.lora_a.weight"] = layer.down
        tensors[f"{theirs}.lora_b.weight"] = up
        if magnitude is not None:
            tensors[f"{theirs}.magnitude"] = magnitude
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": plain(scaling * rank),
        "target_modules": sorted({layer.path.rpartition(".")[2] for layer in layers}),
        "use_dora": layers[0].magnitude is not None,
    }
    return tensors, settings


def _ours(path: str, where: str) -> str:
    if path == "output":
        return "lm_head"
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    if found is None or found[2] not in _PATHS:
        raise AdapterError(
            f"{path!r} is no layer of a torchtune decoder of the Llama kind",
            where=where,
            fix=f"layers.N.{' or layers.N.'.join(_PATHS)} are read",
        )
    return f"model.layers.{found[1]}.{_PATHS[found[2]]}"


def _theirs(path: str) -> str:
    if path == "lm_head":
        return "output"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if found is None or found[2] not in _BACK:
        raise AdapterError(
            f"{path!r} has no place in torchtune's models",
            where=path,
            fix=f"targets can be {', '.join(sorted(name.rpartition('.')[2] for name in _BACK))} and lm_head",
        )
    return f"layers.{found[1]}.{_BACK[found[2]]}"


def _heads(path: str, config: Any) -> int:
    """Heads of a layer whose rows are in another order; 0 where they are in the same.

    Raises:
        AdapterError: The model's family is not known here.
    """
    family = getattr(config, "model_type", "")
    if family not in (*_TURNED, *_AS_THEY_ARE):
        raise AdapterError(
            f"how torchtune orders the rows of q and k of {family!r} models is not known here",
            where="model",
            fix=f"families that are read and written: {', '.join((*_TURNED, *_AS_THEY_ARE))}",
        )
    if family in _AS_THEY_ARE:
        return 0
    if path.endswith(".q_proj"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if path.endswith(".k_proj") else 0


def _from_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs of neighbours to first halves of all pairs, then second halves."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _to_neighbours(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
