"""What a merge starts from: the base as its files have it, and the adapter that was read for it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.adapters.attach import tied_notes
from graft.adapters.attached import disabled
from graft.adapters.candidates import Form, Weights
from graft.adapters.folder import Folder
from graft.adapters.likeness import probe_logits
from graft.adapters.peft_config import read_object, read_settings
from graft.adapters.peft_format import load_adapter
from graft.adapters.peft_open import CONFIG, read_adapter
from graft.adapters.peft_tensors import full_name, open_weights
from graft.adapters.probe import Probe
from graft.adapters.shipped_plan import shipped_plan
from graft.adapters.side_file import FILE, SideFile, read_side_file, tensors_digest
from graft.errors import AdapterError
from graft.models.contents import Contents
from graft.models.dense import make_dense
from graft.models.fingerprint import (
    Fingerprint,
    chat_template_digest,
    quantization_key,
    tokenizer_digest,
)
from graft.models.load import DTYPES, load, load_tokenizer
from graft.models.locate import resolve, rooted_name
from graft.models.packed import (
    OWN_METHODS,
    PackedTensor,
    agree,
    open_packed,
    original_weights,
    stored_method,
)
from graft.models.quantize import QuantizedPlan
from graft.models.save import save_model
from graft.models.stream import Progress, TensorStream
from graft.quant.config import QuantizationConfig


@dataclass
class MergeBase:
    """A base and an adapter that belong together, ready to be measured and written."""

    adapter_dir: Path
    name: str
    """Of the base, as it was asked for."""
    path: Path
    """Where its files are."""
    tokenizer: Any
    """With the chat template that the adapter was taught with."""
    weights: Weights
    dtype: torch.dtype
    """What most of the dense weights are written in."""
    side: SideFile | None
    notes: list[str]
    digest: str
    """Of the adapter's tensors."""
    lineage: list[dict[str, Any]]
    """The adapters that are in the base already."""
    scratch: Path | None = None
    """Where the decoded weights of a base that another library quantized are, which `weights` reads."""
    foreign: Any = None
    """That base in memory, with the adapter."""

    @property
    def forced(self) -> bool:
        """Whether the base is another one than the adapter was trained on."""
        side = self.side
        return self.weights.folder.stored.forced or (side is not None and side.forced_base)

    @property
    def makes_up(self) -> bool:
        """Whether the adapter makes up for the rounding of its base, so that it is wrong on dense weights."""
        return self.side is not None and self.side.makes_up

    def forms(self, into: str, quantization: QuantizationConfig | str | None) -> list[Form]:
        """The ways of writing the merged model that there are.

        Args:
            into: What was asked for.
            quantization: Of the requantized ones; None for that of the live model.

        Raises:
            AdapterError: What was asked for is not among them.
            ConfigError: The quantization is none.
        """
        weights = self.weights
        if weights.folder.shipped is not None:
            shipped = shipped_plan(weights, quantization, self.name, str(self.adapter_dir))
            forms = [Form("dense", "dense", None), Form("requantized", "dense", shipped)]
            self._check(into, [form.name for form in forms])
            return forms
        plan = self._plan(quantization)
        decoded = weights.origin == "dequantized" or self.scratch is not None
        forms = [Form("dequantized", weights.origin, None)] if decoded else []
        dense = weights.live is not None and not self.makes_up
        if dense or not decoded:
            forms.insert(0, Form("dense", "dense", None))
        codes = self._codes()
        if codes is not None:
            forms.append(Form("quantized", weights.origin, codes))
        if plan is not None:
            forms.append(Form("requantized", weights.origin, plan))
            if dense:
                forms.append(Form("requantized_dense", "dense", plan))
        self._check(into, [form.name for form in forms])
        return forms

    def _plan(self, quantization: QuantizationConfig | str | None) -> QuantizedPlan | None:
        contents, live = self.weights.contents, self.weights.live
        settings = live.settings if live is not None else None
        if contents.is_packed:
            settings = agree(None, contents.stored, contents.path)
        if isinstance(quantization, str):
            kind: Any = quantization
            settings = (
                QuantizationConfig(quant_type=kind)
                if settings is None or settings.hqq
                else replace(settings, quant_type=kind)
            )
        elif quantization is not None:
            settings = quantization
        if settings is None:
            return None
        plan = QuantizedPlan.of(contents, settings)
        packed = [tensor.name for tensor in contents.stored if isinstance(tensor, PackedTensor)]
        # What a base in codes keeps dense stays dense, whatever its config says of it.
        return replace(plan, targets=frozenset(n.removesuffix(".weight") for n in packed)) if packed else plan

    def _codes(self) -> QuantizedPlan | None:
        """How the live codes are written, where every layer takes its update into the shifts of blocks."""
        folder = self.weights.folder
        plan = self._plan(None)
        if plan is None or not plan.settings.affine or not folder.layers:
            return None
        for path in folder.layers:
            if path not in plan.targets or folder.block_update(path, plan.settings.blocksize) is None:
                return None
        return replace(plan, settings=replace(plan.settings, double_quant=False))

    def _check(self, into: str, names: list[str]) -> None:
        where = str(self.adapter_dir)
        if into == "dequantized" and into not in names:
            raise AdapterError(
                "from_quantized cannot act: the adapter was trained on a dense base",
                where=where,
                fix="leave it out",
            )
        if into == "dense" and self.makes_up and into not in names:
            raise AdapterError(
                "the adapter makes up for the rounding of its base (init loftq): dense weights have none",
                where=where,
                fix="--into dequantized, or leave it out",
            )
        if into == "quantized" and into not in names:
            raise AdapterError(
                "only a base in int4, int3 or int2 takes an update into its codes, and only that of QA-LoRA "
                "with groups of whole blocks",
                where=where,
                fix="leave it out, or --into requantized, which rounds to codes again",
            )
        if into == "dense" and into not in names:
            raise AdapterError(
                f"{self.name} is stored quantized: there are no dense weights to fold into",
                where=where,
                fix="give the dense original (--base), or --into dequantized",
            )
        if into == "requantized" and into not in names:
            raise AdapterError(
                "the base is dense: nothing says how to quantize the merged model",
                where=where,
                fix='quantization="nf4" (--quant-type nf4)',
            )

    def foreign_logits(self, probe: Probe) -> tuple[Tensor, Tensor] | None:
        """Logits of a base in memory with the adapter and without; None where it is read from files."""
        if self.foreign is None:
            return None
        with disabled(self.foreign):
            plain = probe_logits(self.foreign, probe)
        live = probe_logits(self.foreign, probe)
        self.foreign = None
        return live, plain

    def clean(self) -> None:
        """Remove the decoded files of a foreign base."""
        if self.scratch is not None:
            shutil.rmtree(self.scratch)

    def certificate(self, measured: dict[str, Any]) -> dict[str, Any]:
        """What is kept beside the weights.

        Args:
            measured: The report of the merge.
        """
        side = self.side
        entry = {
            "tensors": self.digest,
            "base": side.base.to_dict() if side is not None else None,
            "facts": side.facts if side is not None else {},
        }
        kept = {name: value for name, value in measured.items() if name != "directory"}
        return {"format": 1, "kind": "merged", "adapters": [*self.lineage, entry], "merge": kept}


def open_base(
    adapter_dir: Path,
    base: str | os.PathLike[str] | None,
    dtype: torch.dtype | str | None,
    *,
    force_base: bool,
    scratch: Path,
    progress: Progress | None = None,
) -> MergeBase:
    """Find the base of an adapter and read the adapter for it.

    Args:
        adapter_dir: The adapter.
        base: The base; None for the one that the adapter names.
        dtype: Of dense weights in the files.
        force_base: Accept another base than the adapter's.
        scratch: A directory to make, for the decoded weights of a base that another library quantized.
        progress: Called with (bytes read, bytes in all) after each tensor of the base.

    Raises:
        AdapterError: The adapter is damaged, does not fit, names no base, or is in this base already.
        FingerprintError: The base is another one than the adapter's.
        ModelError: The base cannot be read.
    """
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
    _refuse_again(digest, lineage, path)
    wanted = _dtype(path, dtype)
    side = read_side_file(adapter_dir)
    tokenizer = load_tokenizer(path)
    foreign = None
    if stored_method(path) in ("", *OWN_METHODS):
        contents = Contents.of(path, wanted)
        asked = _trained_on(side)
        settled = agree(asked, contents.stored, path)
        weights = original_weights(path, _weights_digest(contents, progress))
        fingerprint = Fingerprint(
            weights, tokenizer_digest(tokenizer), chat_template_digest(tokenizer), quantization_key(settled)
        )
    else:
        contents = _decoded(name, revision, wanted, scratch)
        loaded = load(name, revision=revision, dtype=wanted, progress=progress)
        foreign, fingerprint, settled = loaded.model, loaded.fingerprint, None
        load_adapter(foreign, adapter_dir, force_base=force_base)
    model = contents.model
    model.graft_fingerprint, model.graft_name = fingerprint, rooted_name(name)
    stored = read_adapter(model, adapter_dir, force_base=force_base)
    folder = Folder(model, stored)
    live = QuantizedPlan.of(contents, settled) if settled is not None and not contents.is_packed else None
    if template := side.facts.get("chat_template") if side is not None else None:
        tokenizer.chat_template = template  # prompts as the adapter was taught them
    return MergeBase(
        adapter_dir=adapter_dir,
        name=name,
        path=path,
        tokenizer=tokenizer,
        weights=Weights(contents, folder, live, None if dtype is None else wanted),
        dtype=wanted,
        side=side,
        notes=[*tied_notes(model, folder.places, together=folder.pair is None), *stored.notes],
        digest=digest,
        lineage=lineage,
        scratch=None if foreign is None else scratch,
        foreign=foreign,
    )


def _decoded(name: str, revision: str | None, dtype: torch.dtype, scratch: Path) -> Contents:
    """A foreign base as dense files: its weights as its layers give them."""
    again = load(name, revision=revision, dtype=dtype)
    make_dense(again.model)
    save_model(again.model, None, scratch)
    return Contents.of(scratch, dtype)


def _trained_on(side: SideFile | None) -> QuantizationConfig | None:
    text = side.base.quantization if side is not None else ""
    return QuantizationConfig.from_dict(json.loads(text)) if text else None


def _weights_digest(contents: Contents, progress: Progress | None) -> str:
    sources = list(contents.sources())
    with TensorStream(sources, frozenset(source.name for source in sources), progress) as stream:
        for source in sources:
            stream.read(source)
        return stream.digest()


def _refuse_again(digest: str, lineage: list[dict[str, Any]], path: Path) -> None:
    if any(earlier.get("tensors") == digest for earlier in lineage):
        raise AdapterError(
            "this adapter is already folded into this base",
            where=str(path / FILE),
            fix="merge into the base that it was trained on, or use this model as it is",
        )


def _lineage(base: Path) -> list[dict[str, Any]]:
    """The adapters that a base directory has in it already."""
    if not (base / FILE).exists():
        return []
    adapters = read_object(base / FILE).get("adapters", [])
    return [item for item in adapters if isinstance(item, dict)] if isinstance(adapters, list) else []


def _dtype(base: Path, wanted: torch.dtype | str | None) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted is not None:
        if wanted not in DTYPES:
            raise AdapterError(
                f"{wanted!r} is not a dtype to write", where="dtype", fix=f"one of: {', '.join(DTYPES)}"
            )
        return DTYPES[wanted]
    sizes: dict[torch.dtype, int] = {}
    for tensor in open_packed(base):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    largest = max(sizes, key=lambda kind: sizes[kind])
    return largest if largest in DTYPES.values() else torch.bfloat16
