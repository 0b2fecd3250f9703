"""Model directories quantized: read, rounded and written tensor by tensor, never whole in memory."""

from __future__ import annotations

import os
import reprlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.dialects import explained
from graft.errors import ConfigError, ModelError, QuantError, StorageError
from graft.files import new_directory, read_json, write_json
from graft.models import bitsandbytes_files, graft_files
from graft.models.contents import Contents
from graft.models.filler import select_linears
from graft.models.fingerprint import WeightsDigest
from graft.models.keys import check_finite
from graft.models.locate import BUILTIN, resolve, rooted_name
from graft.models.packed import SOURCE, open_packed, stored_method
from graft.models.save import HEADER_BYTES, MAX_SHARD_BYTES, write_shards
from graft.models.shards import StoredTensor
from graft.models.stream import TensorStream
from graft.quant.config import QuantizationConfig
from graft.quant.layout import FLOATS
from graft.quant.tensor import QuantizedTensor
from graft.quant.tensor import quantize as quantize_tensor

COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.jinja",
    "generation_config.json",
    "graft.json",
    "LICEN[CS]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that go with a model, by name: tokenizer, templates, generation settings, lineage, licences."""


Rounding = Callable[[str, Tensor, QuantizationConfig], QuantizedTensor]
"""Quantizes the weight (out_features, in_features) of the linear at a path."""

_MOST_PARTS = 8
_MAX_HEADER_BYTES = 2 * 2**20


@dataclass(kw_only=True)
class QuantizedDirectory:
    """What was written. Sizes are those of the tensors, in bytes."""

    directory: Path
    base: str
    """What was quantized."""
    layout: str
    """bitsandbytes: transformers loads it with that library; graft: it does after `import graft`."""
    quantization: QuantizationConfig
    source_bytes: int
    num_parameters: int
    """Numbers in the model, quantized or not; tied ones once."""
    num_bytes: int = 0
    num_quantized: int = 0
    """Linears that are quantized."""
    num_weights: int = 0
    """Elements of their weights."""
    quantized_bytes: int = 0
    """What they take."""
    dense_bytes: int = 0
    """What everything else takes."""
    source_weights: str = ""
    """Digest of the tensors that were read: of the base, and of the directory when it is loaded unless it is
    a base of its own."""
    weights: str = ""
    """Digest of the tensors that were written."""
    companions: tuple[str, ...] = ()
    """Files that were carried over."""
    notes: tuple[str, ...] = ()
    """What the user should know."""

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized weights: stored bits, scales included, over elements."""
        return 8 * self.quantized_bytes / self.num_weights

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **asdict(self),
            "directory": str(self.directory),
            "quantization": self.quantization.to_dict(),
            "companions": list(self.companions),
            "notes": list(self.notes),
            "bits_per_weight": self.bits_per_weight,
        }


@explained
def quantize(
    name: str | os.PathLike[str],
    config: QuantizationConfig | str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    rounding: Rounding | None = None,
) -> QuantizedDirectory:
    """Quantize a model directory into a smaller one that loads without being quantized again.

    nf4 and fp4 are written as bitsandbytes writes them, so that transformers loads them with that library.
    The other formats, and models with experts, are in graft's own layout. `graft.load` reads both.

    Args:
        name: A directory, a hub id, or "builtin"; dense.
        config: How linears are stored, or only the quant_type. Embeddings and output head stay as they are.
        out: The directory to make; it appears whole or not at all.
        revision: Branch, tag or commit of a hub id.
        overwrite: Whether a model directory of that name is replaced, once the new one is whole.
        max_shard_bytes: Size at which a new file is begun.
        progress: Called with (bytes read, bytes in all) after each tensor.
        rounding: Quantizes in place of the plain way. What it makes is a base of its own: the directory does
            not say that it stands for the dense model.

    Returns:
        Sizes and digest.

    Raises:
        ModelError: The model cannot be read, or is quantized already.
        ConfigError: The quantization is none.
        StorageError: `out` exists, or cannot be written.

    Cost: memory for three tensors as stored and one quantized; each byte is read once.
    """
    settings = _settings(config)
    path = resolve(name, revision)
    if method := stored_method(path):
        raise ModelError(
            f"the weights are already quantized by {method}",
            where=str(path / "config.json"),
            fix="give the original model",
        )
    out = Path(out)
    check_place(out, path, overwrite)
    stored = open_packed(path)
    plan = QuantizedPlan.of(Contents.of(path, _main_dtype(stored), stored), settings, rounding)
    source = os.fspath(name) if os.fspath(name) == BUILTIN else rooted_name(name)
    report = QuantizedDirectory(
        directory=out,
        base=source,
        layout=plan.layout,
        quantization=settings,
        source_bytes=sum(tensor.nbytes for tensor in stored),
        num_parameters=sum(tensor.numel() for tensor in plan.contents.model.parameters()),
        notes=tuple(plan.notes()),
    )
    digest = WeightsDigest()
    with new_directory(out, replace=out.exists()) as partial:
        with TensorStream(plan.contents.sources(), plan.passing(), progress) as stream:
            tensors = plan.tensors(stream.read, report)
            write_shards(tensors, partial, max_shard_bytes, digest, plan.header_bytes())
            report.source_weights = stream.digest()
        report.companions = tuple(copy_companions(path, partial))
        report.weights = digest.hexdigest()
        digests = {"weights": report.source_weights, "stored": report.weights}
        source_digests = {SOURCE: digests} if rounding is None else {}
        raw = read_json(path / "config.json")
        quantization = {"quantization_config": {**plan.described(_main_dtype(stored)), **source_digests}}
        write_json(partial / "config.json", {**raw, **quantization})
    report.num_bytes = report.quantized_bytes + report.dense_bytes
    return report


def _settings(config: QuantizationConfig | str) -> QuantizationConfig:
    if isinstance(config, QuantizationConfig):
        return config
    if not isinstance(config, str):
        raise ConfigError(
            f"a model cannot be quantized as {reprlib.repr(config)}",
            where="config",
            fix='"nf4", or a graft.QuantizationConfig',
        )
    return QuantizationConfig(quant_type=config)  # type: ignore[arg-type]


def check_place(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse a place where a model directory may not be made.

    Args:
        out: The place.
        source: Directory of the model that is read.
        overwrite: Whether a model directory there is replaced.

    Raises:
        StorageError: Something is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() == source.resolve():
        raise StorageError("this is the model itself", where=str(out), fix="give another directory")
    if not overwrite:
        raise StorageError(
            "already exists", where=str(out), fix="choose another name, or --overwrite (overwrite=True)"
        )
    if not (out / "config.json").is_file():
        raise StorageError(
            "exists and is no model directory, so it is not overwritten",
            where=str(out),
            fix="choose another name",
        )


@dataclass(frozen=True)
class QuantizedPlan:
    """Which linears of a model become quantized, and in which layout they are written."""

    contents: Contents
    settings: QuantizationConfig
    targets: frozenset[str]
    """Paths of the linears to quantize."""
    layout: str
    """bitsandbytes or graft."""
    rounding: Rounding | None = None
    """What quantizes in place of the plain way."""

    @classmethod
    def of(
        cls, contents: Contents, settings: QuantizationConfig, rounding: Rounding | None = None
    ) -> QuantizedPlan:
        """Plan for a model.

        Raises:
            ModelError: skip_modules name nothing, or the model has no linears of its own.
        """
        targets = frozenset(select_linears(contents.model, settings))
        theirs = settings.quant_type in bitsandbytes_files.QUANT_TYPES and not contents.has_experts
        return cls(contents, settings, targets, "bitsandbytes" if theirs else "graft", rounding)

    def passing(self) -> frozenset[str]:
        """Names of stored tensors of which nothing is kept but what is made of them."""
        return frozenset(fill.sources[0].name for fill in self.contents.fills if fill.converter is None)

    def tensors(
        self, read: Callable[[StoredTensor], Tensor], report: QuantizedDirectory
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the new directory; counts them in the report."""
        for fill in self.contents.fills:
            for name, tensor in fill.realize(read, self.contents.model).items():
                path = name.removesuffix(".weight")
                if path == name or path not in self.targets:
                    check_finite(tensor, fill.sources[0])
                    report.dense_bytes += tensor.nbytes
                    yield name, tensor
                    continue
                made = self.quantized(path, tensor, fill.sources[0])
                report.num_quantized += 1
                report.num_weights += made.num_elements
                report.quantized_bytes += made.nbytes
                yield from self.parts(name, made)

    def parts(self, name: str, weight: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
        """A quantized weight as the layout stores it."""
        write = bitsandbytes_files if self.layout == "bitsandbytes" else graft_files
        yield from write.tensors_of(name, weight)

    def quantized(self, path: str, weight: Tensor, source: StoredTensor) -> QuantizedTensor:
        """Quantize the weight of a linear, which is given in the layout of its module.

        Raises:
            ModelError: It is not finite.
        """
        from transformers.pytorch_utils import Conv1D

        if isinstance(self.contents.model.get_submodule(path), Conv1D):
            weight = weight.t().contiguous()
        if weight.dtype not in FLOATS.values():
            weight = weight.to(torch.float32)
        try:
            if self.rounding is not None:
                return self.rounding(path, weight, self.settings)
            return quantize_tensor(weight, self.settings, where=path)
        except QuantError as error:
            raise ModelError(error.what, where=source.where, fix=error.fix) from error

    def notes(self) -> Iterator[str]:
        """What the layout costs with this model."""
        split = [
            path
            for path in sorted(self.targets)
            if _num_inputs(self.contents.model.get_submodule(path)) % self.settings.blocksize
        ]
        if split and self.layout == "bitsandbytes":
            yield (
                f"rows of {split[0]} (of {len(split):,} layers) are no whole blocks of "
                f"{self.settings.blocksize}: "
                "bitsandbytes 0.50 fails or decodes wrongly on a CPU; graft does not"
            )

    def header_bytes(self) -> int:
        """Room for the names of all tensors in one file, within reason."""
        num_tensors = sum(1 for _ in self.contents.sources()) + _MOST_PARTS * len(self.targets)
        return min(_MAX_HEADER_BYTES, max(HEADER_BYTES, 256 * num_tensors))

    def described(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """The quantization_config of the new directory."""
        if self.layout == "graft":
            return graft_files.config_of(self.settings)
        return bitsandbytes_files.config_of(self.settings, compute_dtype, self._dense())

    def _dense(self) -> list[str]:
        from transformers.pytorch_utils import Conv1D

        return [
            path
            for path, module in self.contents.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and path not in self.targets
        ]


def _num_inputs(module: Any) -> int:
    from transformers.pytorch_utils import Conv1D

    return int(module.weight.shape[0 if isinstance(module, Conv1D) else 1])


def _main_dtype(stored: list[StoredTensor]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for tensor in stored:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return torch.float32 if max(sizes, key=lambda kind: sizes[kind]) == torch.float32 else torch.bfloat16


def copy_companions(source: Path, directory: Path) -> Iterator[str]:
    """Carry over the files that go with a model.

    Yields:
        Their names.

    Raises:
        StorageError: One cannot be copied.
    """
    found = {path for pattern in COMPANIONS for path in source.glob(pattern)}
    for path in sorted(path for path in found if path.is_file() and path.suffix != ".py"):
        try:
            shutil.copyfile(path, directory / path.name)
        except OSError as error:
            raise StorageError(
                f"cannot be copied: {error.strerror}",
                where=str(path),
                fix="check the file and the free space",
            ) from error
        yield path.name
