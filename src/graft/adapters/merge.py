"""Fold an adapter into its base, write the result, and certify how close it is to the live model.

Every way of writing it is measured first, each model running with one block in memory (`models/passing.py`);
the chosen one is written tensor by tensor (`merged_files.py`), read back and measured again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graft.adapters.candidates import Form, Tally
from graft.adapters.likeness import Likeness, likeness, probe_logits
from graft.adapters.merge_base import MergeBase, open_base
from graft.adapters.merge_choice import AS_TRAINED, check_choice, choose, refuse_without_effect
from graft.adapters.merge_report import Candidate, MergeReport
from graft.adapters.merged_files import num_bytes, write_merged
from graft.adapters.peft_config import directory_of
from graft.adapters.probe import Probe, make_probe
from graft.adapters.side_file import FILE
from graft.adapters.trainable_tokens import token_rows
from graft.dialects import explained
from graft.errors import StorageError
from graft.files import new_directory, write_json
from graft.models.contents import Contents
from graft.models.passing import passing
from graft.models.save import MAX_SHARD_BYTES
from graft.models.shards import StoredTensor
from graft.models.stream import Progress
from graft.quant.config import QuantizationConfig

Into = Literal["auto", "dense", "dequantized", "quantized", "requantized"]

Told = Callable[[str, int, int], None]
"""Called with what is being done, bytes read and bytes in all."""


@explained
def merge(  # noqa: PLR0913 - what a merge may be asked for
    adapter_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    into: Into = "auto",
    quantization: QuantizationConfig | str | None = None,
    data: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    force_base: bool = False,
    allow_no_op: bool = False,
    from_quantized: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Told | None = None,
) -> MergeReport:
    """Fold an adapter into its base and write a model directory that transformers loads.

    An adapter that was trained on a quantized base can be folded into the dense original, into the weights
    that the quantized base computes with, or into either and rounded to codes again. Each is compared with
    the live model on held-out text; by default the closest one that stays dense is written. QA-LoRA over
    int4, int3 or int2 moves the shifts of the base's blocks alone, and keeps its codes; an adapter that makes
    up for rounding (init "loftq") is folded into what the quantized base computes with, and nothing else; one
    that was trained to be stored quantized (method qat) is written with the codes that it computed with.

    Args:
        adapter_dir: The adapter.
        out: A new directory; it appears whole or not at all, with a certificate in graft.json.
        base: The base model; by default the one that adapter_config.json names.
        into: "dense", "dequantized", "quantized" (the base's codes, for QA-LoRA), "requantized" (the closer
            one of both bases), or "auto": "quantized" where that can be, else the closer one of the first
            two.
        quantization: Of the requantized candidate: settings, or only a quant_type; by default that of the
            base in training, and without one there is no such candidate.
        data: Held-out rows to compare on, of the kinds that `graft train` reads; graft's own prompts if None.
        dtype: Of dense weights in the files; by default that of each tensor in the base's files.
        force_base: Accept a base that the adapter was not trained on.
        allow_no_op: Write a model that has lost the update, or an adapter that changes nothing.
        from_quantized: The same as into="dequantized".
        max_shard_bytes: Size at which a new file is begun.
        progress: Called with what is being done, bytes read and bytes in all.

    Returns:
        The measured candidates, which one was written, and what else to know.

    Raises:
        AdapterError: The adapter is damaged, names no base, is in this base already or changes nothing; the
            choice cannot act; or the update would be lost in the written weights.
        FingerprintError: The base is not the one the adapter was trained on.
        ModelError: The base cannot be loaded.
        DataError: The data cannot be used.
        StorageError: `out` exists or cannot be written, or its files do not read back as they were written.

    Cost: memory for the adapter, embeddings, head, one block and the logits of the text, all in fp32; the
    base is read once for its digest and once for each of: live model, base, candidates, the write. A base
    that another library quantized is held whole, and written dense once, beside `out`.
    """
    out = directory_of(out, "out")
    told = progress or (lambda what, done, total: None)
    chosen_into = check_choice(into, from_quantized, quantization)
    with new_directory(out) as partial:
        found = open_base(
            directory_of(adapter_dir, "adapter_dir"),
            base,
            dtype,
            force_base=force_base,
            scratch=partial / "decoded",
            progress=lambda done, total: told("reading the base", done, total),
        )
        forms = found.forms(chosen_into, quantization)
        if found.weights.folder.shipped is not None and chosen_into == "auto":
            chosen_into = AS_TRAINED
        path = None if data is None else os.fspath(data)
        rows = token_rows(found.weights.folder.config)
        probe = make_probe(found.weights.contents.model.config, found.tokenizer, found.side, path, rows)
        job = _Job(found, probe, told)
        effect = job.measure_live()
        refuse_without_effect(effect, job.live, str(found.adapter_dir), allowed=allow_no_op)
        candidates = [job.candidate(form) for form in forms]
        form, reason = choose(forms, candidates, chosen_into, effect, allowed=allow_no_op)
        written = partial / "model"
        fingerprint = write_merged(
            found.weights,
            form,
            written,
            found.tokenizer,
            found.dtype,
            max_shard_bytes=max_shard_bytes,
            progress=lambda done, total: told("writing", done, total),
        )
        after = job.measure_files(written)
        measured = next(item for item in candidates if item.name == form.name)
        _check_files(after, measured, out)
        report = MergeReport(
            directory=out,
            base=found.name,
            folded_into=form.name,
            reason=reason,
            dtype=str(found.dtype).removeprefix("torch."),
            quantization=None if form.plan is None else form.plan.settings.to_dict(),
            kl=after.kl,
            flips=after.flips,
            logit_gap=after.gap,
            survival=measured.survival,
            adapter_effect=effect.gap,
            adapter_kl=effect.kl,
            adapter_flips=effect.flips,
            candidates=tuple(candidates),
            probe=probe.to_dict(),
            num_layers=len(found.weights.folder.places),
            untied=found.weights.folder.pair is not None,
            forced_base=found.forced,
            allowed_no_op=allow_no_op,
            fingerprint=fingerprint,
            notes=(
                *found.notes,
                *probe.notes,
                *_told_of_method(found, form),
                *_advice(form, measured, candidates, effect),
            ),
        )
        _publish(written, partial, found)
        write_json(partial / FILE, found.certificate(report.to_dict()))
    return report


@dataclass
class _Job:
    """The models that are compared, one after the other."""

    base: MergeBase
    probe: Probe
    told: Told

    def measure_live(self) -> Likeness:
        """Run the live model and the base; keep the logits of the first."""
        self.live, plain = self.base.foreign_logits(self.probe) or (
            self._running("live model", with_adapter=True),
            self._running("base alone", with_adapter=False),
        )
        return likeness(self.live, plain)

    def _running(self, what: str, *, with_adapter: bool) -> Tensor:
        weights = self.base.weights
        contents = self._fresh(weights.contents.path)
        with passing(
            contents,
            lambda fill: weights.running(contents, fill, with_adapter=with_adapter),
            weights.folder.put_on if with_adapter else None,
            self._progress(f"measuring the {what}"),
        ) as model:
            return probe_logits(model, self.probe)

    def candidate(self, form: Form) -> Candidate:
        """Measure one way of writing, without writing it."""
        weights = self.base.weights
        tally = Tally()
        with passing(
            self._fresh(weights.contents.path),
            lambda fill: weights.written(form, fill, tally=tally),
            progress=self._progress(f"measuring {form.name}"),
        ) as model:
            found = likeness(self.live, probe_logits(model, self.probe))
        whole = tally.whole
        stored_as = str(self.base.dtype).removeprefix("torch.")
        return Candidate(
            name=form.name,
            stored_as=stored_as if form.plan is None else form.plan.settings.quant_type,
            num_bytes=num_bytes(weights, form),
            kl=found.kl,
            flips=found.flips,
            gap=found.gap,
            survival=whole.survival,
            error=whole.error,
            layers={name: figures.to_dict() for name, figures in tally.layers.items()},
        )

    def measure_files(self, directory: Path) -> Likeness:
        """Measure what was written."""
        contents = self._fresh(directory)
        with passing(
            contents,
            lambda fill: contents.read(fill, _load).items(),
            progress=self._progress("reading back"),
        ) as model:
            return likeness(self.live, probe_logits(model, self.probe))

    def _fresh(self, path: Path) -> Contents:
        return Contents.of(path, torch.float32)

    def _progress(self, what: str) -> Progress:
        return lambda done, total: self.told(what, done, total)


def _load(source: StoredTensor) -> Tensor:
    return source.load()


def _check_files(after: Likeness, measured: Candidate, out: Path) -> None:
    """Refuse files that read back as another model than the one that was measured.

    Raises:
        StorageError: They do.
    """
    scale = max(1.0, measured.gap)
    if abs(after.gap - measured.gap) > 1e-3 * scale or abs(after.kl - measured.kl) > 1e-4 * max(1, after.kl):
        raise StorageError(
            f"the files read back as another model: KL {after.kl:.3g} and gap {after.gap:.3g}, "
            f"measured before {measured.kl:.3g} and {measured.gap:.3g}",
            where=str(out),
            fix="check the disk and merge again; nothing was kept",
        )


def _publish(written: Path, partial: Path, found: MergeBase) -> None:
    found.clean()
    for path in sorted(written.iterdir()):
        path.rename(partial / path.name)
    written.rmdir()


def _told_of_method(found: MergeBase, form: Form) -> list[str]:
    if form.exact:
        return [
            "folded into the shifts of the base's blocks: the merged model is quantized with the same codes, "
            "its scales and shifts are in float32"
        ]
    if found.makes_up:
        return ["its rounding is made up for: the adapter was folded into the decoded weights"]
    if found.weights.folder.config.method == "qa_lora" and form.plan is None:
        return [
            "folded into dense weights: only a base in int4, int3 or int2, in blocks no larger than the "
            "groups, takes QA-LoRA into its codes"
        ]
    return []


def _advice(form: Form, measured: Candidate, candidates: Sequence[Candidate], effect: Likeness) -> list[str]:
    told = []
    if measured.kl > effect.kl / 2:
        told.append(
            f"the merged model is {measured.kl:.2g} nats a token from the live one, the adapter itself moves "
            f"the base by {effect.kl:.2g}: evaluate it on your own data before you use it"
        )
    lost = [item.name for item in candidates if item.is_no_op and item.name != form.name]
    if lost:
        told.append(f"rounding would lose the update in: {', '.join(lost)}")
    return told


__all__ = ["Into", "MergeReport", "merge"]
