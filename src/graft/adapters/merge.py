"""Fold an adapter into its base, write the result, and certify how close it is to the live model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.adapters.attach import disabled
from graft.adapters.attached import Adapter
from graft.adapters.base import method_of, ships_quantized
from graft.adapters.fold import decode_from, merge_into, merges_into_codes
from graft.adapters.peft_config import PeftSettings, directory_of, read_object, read_settings
from graft.adapters.peft_format import load_adapter
from graft.adapters.peft_open import CONFIG
from graft.adapters.peft_tensors import full_name, open_weights
from graft.adapters.shipped import shipped_as
from graft.adapters.side_file import FILE, SideFile, read_side_file, tensors_digest
from graft.adapters.trainable_tokens import token_rows
from graft.dialects import explained
from graft.errors import AdapterError
from graft.files import new_directory, write_json
from graft.models.dense import make_dense
from graft.models.fingerprint import Fingerprint
from graft.models.load import BaseModel, load
from graft.models.locate import resolve
from graft.models.packed import open_packed, stored_method
from graft.models.save import save_model
from graft.models.save_quantized import save_quantized
from graft.quant.config import QuantizationConfig
from graft.quant.linear import quantized_modules

PROBE_SHAPE = (2, 32)
"""Rows and tokens of the probe that certifies a merge."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, and how far the written model is from the live one.

    Gaps are largest absolute differences of fp32 logits over the probe tokens.
    """

    directory: Path
    """The merged model."""
    base: str
    """The base that the adapter was folded into."""
    folded_into: str
    """dense: the base's own weights; dequantized: those that a quantized base computed with in training;
    quantized: the shifts of its blocks, so that the merged model is quantized as the base was."""
    dtype: str
    """Of the written weights."""
    logit_gap: float
    """Merged model, read back from its files, against the live base and adapter."""
    adapter_effect: float
    """Live base and adapter against the live base alone: what the gap is to be measured by."""
    gap_dense: float | None
    """For an adapter trained on a quantized base: the gap after folding into the dense base."""
    gap_dequantized: float | None
    """For an adapter trained on a quantized base: the gap after folding into the dequantized base."""
    num_layers: int
    """Layers and modules whose weights changed."""
    untied: bool
    """Whether embedding and output head, tied in the base, were written as two matrices."""
    forced_base: bool
    """Whether the base is another one than the adapter was trained on."""
    fingerprint: Fingerprint
    """Of the merged model."""
    notes: tuple[str, ...]
    """What the user should know."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "directory": str(self.directory), "notes": list(self.notes)}


@dataclass
class _Job:
    adapter_dir: Path
    settings: PeftSettings
    side: SideFile | None
    base: str
    revision: str | None
    dtype: torch.dtype
    force_base: bool
    lineage: list[dict[str, Any]]
    digest: str
    packed: bool
    """Whether the base is stored quantized, so that there is no dense original."""

    @property
    def quantization(self) -> QuantizationConfig | None:
        text = self.side.base.quantization if self.side is not None else ""
        return QuantizationConfig.from_dict(json.loads(text)) if text else None

    def load(self, quantization: QuantizationConfig | None = None) -> BaseModel:
        return load(self.base, revision=self.revision, dtype=self.dtype, quantization=quantization)

    def with_adapter(self, base: BaseModel) -> Adapter:
        return load_adapter(base.model, self.adapter_dir, force_base=self.force_base)


@explained
def merge(
    adapter_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    force_base: bool = False,
    dtype: torch.dtype | str | None = None,
    from_quantized: bool = False,
) -> MergeReport:
    """Fold an adapter into its base and write a model directory that transformers loads.

    An adapter that was trained on a quantized base is folded into the dense original by default: that is the
    better base, though not the one it was trained with. Both choices are measured against the live quantized
    model and reported. One that makes up for rounding (init "loftq") is folded into the dequantized weights
    only. One that was trained to be stored quantized (method qat) is stored so, with the codes that it
    computed with.

    Args:
        adapter_dir: The adapter.
        out: A new directory; it appears whole or not at all, with a certificate in graft.json.
        base: The base model; by default the one that adapter_config.json names.
        force_base: Accept a base that the adapter was not trained on.
        dtype: Of the written weights; by default that of the base's files.
        from_quantized: Fold into the dequantized weights instead.

    Returns:
        The measured gaps and what else to know.

    Raises:
        AdapterError: The adapter is damaged, names no base, is in this base already, or `from_quantized` is
            set for one that was trained on a dense base.
        FingerprintError: The base is not the one the adapter was trained on.
        ModelError: The base cannot be loaded.
        StorageError: `out` exists or cannot be written.

    Cost: the dense base in memory; for an adapter trained on a quantized base that base as well.
    """
    out = directory_of(out, "out")
    job = _prepare(directory_of(adapter_dir, "adapter_dir"), base, force_base, dtype)
    if from_quantized and job.quantization is None and not job.packed:
        raise AdapterError(
            "from_quantized cannot act: the adapter was trained on a dense base",
            where=str(job.adapter_dir),
            fix="leave it out",
        )
    with new_directory(out) as partial:
        live = job.load(job.quantization)
        adapter = job.with_adapter(live)
        rows = token_rows(adapter.config)
        expected = probe_logits(live.model, rows)
        with disabled(live.model):
            effect = _gap(expected, probe_logits(live.model, rows))
        gaps: dict[str, float] = {}
        shipped = shipped_as(live.model, adapter)
        exact = not from_quantized and (shipped is not None or merges_into_codes(live.model, adapter.name))
        if exact:
            chosen, merged = "quantized", live
            untied = merge_into(live.model, adapter.name, codes=shipped is not None)
        elif job.packed or (job.side is not None and job.side.makes_up):
            chosen = "dequantized"
            merged, untied = _folded(job, live, chosen)
        elif job.quantization is not None:
            chosen, other = ("dequantized", "dense") if from_quantized else ("dense", "dequantized")
            gaps[other] = _gap(expected, probe_logits(_folded(job, live, other)[0].model, rows))
            merged, untied = _folded(job, live, chosen)
        else:
            chosen, merged = "dense", live
            untied = merge_into(live.model, adapter.name)
        if template := job.side.facts.get("chat_template") if job.side is not None else None:
            merged.tokenizer.chat_template = template  # prompts as the adapter was taught them
        partial.rmdir()  # save_model makes it anew
        if exact:
            stored = shipped or next(iter(quantized_modules(merged.model).values())).config
            fingerprint = save_quantized(merged.model, merged.tokenizer, partial, stored)
        else:
            fingerprint = save_model(merged.model, merged.tokenizer, partial)
        del live, merged
        gap = _gap(expected, probe_logits(load(partial, dtype=job.dtype).model, rows))
        if (job.packed or job.quantization is not None) and not exact:
            gaps[chosen] = gap
        report = MergeReport(
            directory=out,
            base=job.base,
            folded_into=chosen,
            dtype=str(job.dtype).removeprefix("torch."),
            logit_gap=gap,
            adapter_effect=effect,
            gap_dense=gaps.get("dense"),
            gap_dequantized=gaps.get("dequantized"),
            num_layers=len(adapter.places),
            untied=untied,
            forced_base=adapter.forced_base,
            fingerprint=fingerprint,
            notes=(
                *adapter.notes,
                *_advice(chosen, gaps, effect, made_up=adapter.makes_up),
                *_told_of_codes(adapter, chosen),
            ),
        )
        write_json(partial / FILE, _certificate(job, report))
    return report


def _prepare(
    adapter_dir: Path, base: str | os.PathLike[str] | None, force_base: bool, dtype: torch.dtype | str | None
) -> _Job:
    settings, _ = read_settings(adapter_dir / CONFIG)
    name = os.fspath(base) if base is not None else settings.base_name
    if not name:
        raise AdapterError(
            "the adapter does not say which base it belongs to",
            where=str(adapter_dir / CONFIG),
            fix="give the base (--base)",
        )
    revision = settings.revision if base is None else None
    digest = tensors_digest((full_name(key), t.load()) for key, t in open_weights(adapter_dir).items())
    path = resolve(name, revision)
    lineage = _lineage(path)
    if any(earlier.get("tensors") == digest for earlier in lineage):
        raise AdapterError(
            "this adapter is already folded into this base",
            where=str(path / FILE),
            fix="merge into the base that it was trained on, or use this model as it is",
        )
    side = read_side_file(adapter_dir)
    dtype = _as_trained(side, dtype)
    return _Job(
        adapter_dir,
        settings,
        side,
        name,
        revision,
        _dtype(path, dtype),
        force_base,
        lineage,
        digest,
        packed=bool(stored_method(path)),
    )


def _as_trained(side: SideFile | None, wanted: torch.dtype | str | None) -> torch.dtype | str | None:
    """The dtype of an adapter whose codes depend on that of the base's weights; else what is wanted.

    Raises:
        AdapterError: It is not the one that is wanted.
    """
    known = "" if side is None else side.weight_dtype
    if known and wanted is not None and str(wanted).removeprefix("torch.") != known:
        raise AdapterError(
            f"the adapter was trained over weights in {known}, and its codes depend on it, not {wanted}",
            where="dtype",
            fix="leave it out",
        )
    return known or wanted


def _lineage(base: Path) -> list[dict[str, Any]]:
    """The adapters that a base directory has in it already."""
    if not (base / FILE).exists():
        return []
    adapters = read_object(base / FILE).get("adapters", [])
    return [item for item in adapters if isinstance(item, dict)] if isinstance(adapters, list) else []


def _dtype(base: Path, wanted: torch.dtype | str | None) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted is not None:
        if wanted not in names:
            raise AdapterError(
                f"{wanted!r} is not a dtype to write", where="dtype", fix=f"one of: {', '.join(names)}"
            )
        return names[wanted]
    sizes: dict[torch.dtype, int] = {}
    for tensor in open_packed(base):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    largest = max(sizes, key=lambda kind: sizes[kind])
    return largest if largest in names.values() else torch.bfloat16


def _folded(job: _Job, live: BaseModel, into: str) -> tuple[BaseModel, bool]:
    """A dense copy of the base with the adapter folded in, and whether it was untied."""
    base = job.load()
    decoded = make_dense(base.model)
    if into == "dequantized" and not decoded:
        decode_from(live.model, base.model)
        base.model.graft_fingerprint = live.fingerprint  # its weights are those that the adapter knows
    name = job.with_adapter(base).name
    return base, merge_into(base.model, name)


def probe_logits(model: Any, tokens: tuple[int, ...] = ()) -> Tensor:
    """Logits (rows, tokens, vocabulary), fp32, over probe tokens that depend on the vocabulary alone.

    Args:
        model: A causal language model.
        tokens: Some that must be among them, since only they show a change: those of rows that train.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, PROBE_SHAPE, generator=generator)
    first = torch.tensor(tokens[: PROBE_SHAPE[1]], dtype=torch.long)
    ids[0, : len(first)] = first
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _advice(chosen: str, gaps: dict[str, float], effect: float, *, made_up: bool = False) -> list[str]:
    if not gaps:
        return []
    if len(gaps) == 1:
        (gap,) = gaps.values()
        why = "its rounding is made up for" if made_up else "the base is stored quantized"
        told = f"{why}: the adapter was folded into the decoded weights"
        if gap > effect / 2:
            told += (
                f". Rounding them moves logits by {gap:.3g}, the adapter itself by {effect:.3g}: "
                "evaluate the merged model, or merge with dtype float32"
            )
        return [told]
    other = "dense" if chosen == "dequantized" else "dequantized"
    told = (
        f"trained on a quantized base: logits move by {gaps[chosen]:.3g} when folded into the {chosen} "
        f"weights, {gaps[other]:.3g} when folded into the {other} ones; "
        f"the adapter itself moves them by {effect:.3g}"
    )
    if chosen == "dense" and gaps["dense"] > effect:
        told += ". The move exceeds the adapter's effect: evaluate the merged model, or use from_quantized"
    return [told]


def _told_of_codes(adapter: Adapter, chosen: str) -> list[str]:
    if ships_quantized(method_of(adapter.config)):
        return ["stored as it was trained to be: its codes are those that the live model computes with"]
    if chosen == "quantized":
        return [
            "folded into the shifts of the base's blocks: the merged model is quantized with the same codes, "
            "its scales and shifts are in float32"
        ]
    if adapter.config.method == "qa_lora":
        return [
            "folded into dense weights: only a base in int4, int3 or int2, in blocks no larger than the "
            "groups, takes QA-LoRA into its codes"
        ]
    return []


def _certificate(job: _Job, report: MergeReport) -> dict[str, Any]:
    entry = {
        "tensors": job.digest,
        "base": job.side.base.to_dict() if job.side is not None else None,
        "facts": job.side.facts if job.side is not None else {},
    }
    measured = report.to_dict()
    del measured["directory"]
    return {"format": 1, "kind": "merged", "adapters": [*job.lineage, entry], "merge": measured}
