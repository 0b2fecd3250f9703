"""graft.json beside an adapter: which base it belongs to, what it was made from, digests of what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.attached import base_state
from graft.adapters.peft_config import SIDE_FILE, read_object
from graft.errors import AdapterError, FingerprintError
from graft.models.fingerprint import Fingerprint, WeightsDigest, fingerprint_of

FILE = SIDE_FILE

_OF_THE_PLACE = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")
"""Fields of adapter_config.json that may change without changing the adapter."""


@dataclass(frozen=True)
class SideFile:
    """What graft knows of an adapter beyond the PEFT files."""

    base: Fingerprint
    tensors: str
    """sha256 over names, dtypes, shapes and bytes of all tensors."""
    settings: str
    """sha256 over adapter_config.json, but for the base's name."""
    forced_base: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    """The adapter method, where adapter_config.json alone would be taken for another one."""
    makes_up: bool = False
    """Whether it makes up for the rounding of its base: on another quantization it is another function."""
    own: dict[str, Any] = field(default_factory=dict)
    """Settings of that method that adapter_config.json has no place for, by their names."""
    weight_dtype: str = ""
    """Of the base's weights in training, where what is merged depends on it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, in a fixed order."""
        return {
            "format": 1,
            "base": self.base.to_dict(),
            "tensors": self.tensors,
            "settings": self.settings,
            "forced_base": self.forced_base,
            "facts": self.facts,
            **({"method": self.method} if self.method else {}),
            **({"makes_up": True} if self.makes_up else {}),
            **({"own": self.own} if self.own else {}),
            **({"weight_dtype": self.weight_dtype} if self.weight_dtype else {}),
        }


def read_side_file(directory: Path) -> SideFile | None:
    """Read the side file of an adapter directory.

    Returns:
        What it says, or None where there is none: the adapter was made by another tool.

    Raises:
        AdapterError: It is damaged, or of a newer graft.
    """
    path = directory / FILE
    if not path.exists():
        return None
    raw = read_object(path)
    if raw.get("format") != 1:
        raise AdapterError(
            f"format {raw.get('format')!r} is not known", where=str(path), fix="use the graft that wrote it"
        )
    base, facts, own = raw.get("base"), raw.get("facts", {}), raw.get("own", {})
    texts = [raw.get("tensors"), raw.get("settings")]
    if (
        not isinstance(base, dict)
        or not isinstance(facts, dict)
        or not isinstance(own, dict)
        or not all(isinstance(t, str) for t in texts)
    ):
        raise AdapterError(
            "the file is incomplete",
            where=str(path),
            fix="restore it; without it the adapter loads, but its base is not checked",
        )
    return SideFile(
        Fingerprint.from_dict(base),
        str(texts[0]),
        str(texts[1]),
        raw.get("forced_base") is True,
        facts,
        str(raw.get("method", "")),
        raw.get("makes_up") is True,
        own,
        str(raw.get("weight_dtype", "")),
    )


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of an adapter's tensors by their names in the file, as 64 hex digits."""
    digest = WeightsDigest()
    for name, tensor in tensors:
        digest.update(name, tensor)
    return digest.hexdigest()


def settings_digest(raw: dict[str, Any]) -> str:
    """Digest of the content of an adapter_config.json, but for what names its base."""
    kept = {key: value for key, value in raw.items() if key not in _OF_THE_PLACE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def base_fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of the base under a model's adapters.

    Cost: none for a model of `graft.load`; else every base tensor is read once.
    """
    if isinstance(getattr(model, "graft_fingerprint", None), Fingerprint):
        return fingerprint_of(model)
    digest = WeightsDigest()
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in base_state(model):
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if not tensor.numel() or key not in seen:
            digest.update(name, tensor)
        seen.add(key)
    return Fingerprint(digest.hexdigest(), "", "", "")


def check_base(
    model: nn.Module, side: SideFile | None, directory: Path, *, force: bool
) -> tuple[bool, list[str]]:
    """Compare a model with the base that an adapter was trained on.

    Args:
        model: The model that is to carry the adapter.
        side: The adapter's side file.
        directory: Of the adapter, for errors.
        force: Accept another base.

    Returns:
        Whether another base was accepted, and what to tell the user.

    Raises:
        FingerprintError: Weights or tokenizer differ, or the quantization that the adapter makes up for, and
            `force` is not set.
    """
    if side is None:
        return False, [
            f"{directory.name} has no {FILE}: whether this is the base it was trained on is not known"
        ]
    if not side.base.weights:
        return False, [f"{directory.name} was composed of adapters that do not say which base they belong to"]
    here = base_fingerprint(model)
    differ = [part for part in side.base.differences(here) if _comparable(part, side.base, here)]
    binding = ("weights", "tokenizer", *(("quantization",) if side.makes_up else ()))
    vital = [part for part in differ if part in binding]
    notes = [
        f"{part.replace('_', ' ')}: {_part(side.base, part)} in training, {_part(here, part)} now"
        for part in differ
        if part not in vital
    ]
    if not vital:
        return False, notes
    told = ", ".join(f"{part} {_part(side.base, part)} then, {_part(here, part)} now" for part in vital)
    if not force:
        made_for = " and makes up for its rounding" if "quantization" in vital else ""
        raise FingerprintError(
            f"the adapter belongs to base {side.base.short}{made_for}, this base is {here.short} ({told})",
            where=str(directory),
            fix="load the base it was trained on, or insist with force_base=True (--force-base)",
        )
    return True, [f"put on another base by force: {told}", *notes]


def _comparable(part: str, then: Fingerprint, now: Fingerprint) -> bool:
    # A model that graft did not load has no tokenizer and no template to compare.
    known = bool(getattr(then, part)) and bool(getattr(now, part))
    return known or part == "quantization"


def _part(fingerprint: Fingerprint, part: str) -> str:
    value: str = getattr(fingerprint, part)
    if part == "quantization":
        return value or "dense"
    return value[:12] or "none"
