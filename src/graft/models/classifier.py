"""Sequence classifiers: a causal language model's decoder under a linear head over its last real token."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.errors import ModelError
from graft.files import read_json, write_json
from graft.models.fingerprint import Fingerprint, chat_template_digest, tokenizer_digest
from graft.models.load import DTYPES, BaseModel
from graft.models.locate import rooted_name
from graft.models.save import guard_save_pretrained
from graft.models.tokenizer import load_tokenizer

HEAD = "score"
"""What transformers calls the head, in every family here."""


def is_classifier(model: Any) -> bool:
    """Whether a model is a sequence classifier of transformers."""
    return isinstance(getattr(model, HEAD, None), nn.Module) and not hasattr(model, "lm_head")


def labels_of(model: Any) -> tuple[str, ...]:
    """The classes of a classifier by number."""
    names: dict[int, str] = model.config.id2label
    return tuple(names[number] for number in range(len(names)))


def as_classifier(base: BaseModel, labels: Sequence[str], *, seed: int = 0) -> BaseModel:
    """Put a new linear head in the place of a language model's output head.

    The decoder is the same object, quantized or not; fingerprint and name stay those of the base, which is
    what an adapter of the classifier belongs to.

    Args:
        base: What `graft.load` returned; its model is not to be used as a language model any more.
        labels: The classes by number; they go into the configuration as id2label.
        seed: Of the head's first values: normal, with the deviation of the model's configuration.

    Returns:
        The same base with transformers' ...ForSequenceClassification as its model.

    Raises:
        ModelError: transformers has no such class for this family, or the model carries adapters.
    """
    from transformers import AutoModelForSequenceClassification

    old = base.model
    if hasattr(old, "graft_attachments"):
        raise ModelError(
            "the model carries adapters already", where=base.name, fix="make the classifier, then attach"
        )
    config = copy.deepcopy(old.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if config.pad_token_id is None:  # by which transformers finds the last token of a padded row
        config.pad_token_id = _pad_id(base.tokenizer)
    try:
        with torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
    except ValueError as error:
        raise ModelError(
            f"there is no sequence classifier of the family {config.model_type!r}",
            where=base.name,
            fix="take another base, or --task generation with the labels as completions",
        ) from error
    head = getattr(made, HEAD, None)
    if type(made.base_model) is not type(old.base_model) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(made).__name__} is not the decoder of {type(old).__name__} under a linear {HEAD!r}",
            where=base.name,
            fix="take another base, or --task generation with the labels as completions",
        )
    setattr(made, made.base_model_prefix, old.base_model)
    setattr(made, HEAD, _new_head(head, base, seed))
    made.eval()
    made.graft_fingerprint, made.graft_name = base.fingerprint, base.name
    made.graft_revision = base.revision
    guard_save_pretrained(made)
    base.model = made
    return base


def _new_head(head: nn.Linear, base: BaseModel, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(base.model.config.get_text_config(), "initializer_range", 0.02))
    made = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, dtype=base.dtype)
    with torch.no_grad():
        values = torch.normal(0.0, deviation, tuple(made.weight.shape), generator=generator)
        made.weight.copy_(values)
        if made.bias is not None:
            made.bias.zero_()
    return made.to(next(base.model.parameters()).device)


def _pad_id(tokenizer: Any) -> int:
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def write_classes(model: Any, directory: Path) -> None:
    """Write a classifier's config.json, with id2label, beside an adapter.

    AutoModelForSequenceClassification makes of it the model that PEFT puts the adapter on.

    Raises:
        StorageError: It cannot be written.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    write_json(directory / "config.json", json.loads(config.to_json_string()))


def stored_labels(directory: Path) -> tuple[str, ...]:
    """The classes that a config.json names; none where it is of no classifier.

    Raises:
        StorageError: The file is damaged.
    """
    path = directory / "config.json"
    raw = read_json(path) if path.is_file() else {}
    if not any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or []):
        return ()
    named = raw.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(named[key] for key in sorted(named, key=int))


def load_classifier(
    directory: str | os.PathLike[str], *, dtype: str | None = None, quantization: Any = None
) -> BaseModel:
    """Load a classifier that was trained whole, by transformers' own loader.

    Args:
        directory: A model directory of a ...ForSequenceClassification class.
        dtype: Of computation; by default that of the files.
        quantization: Must be None: transformers' loader fills it dense.

    Raises:
        ModelError: It is none, cannot be read, or is to be quantized.
    """
    from transformers import AutoModelForSequenceClassification

    path = Path(directory)
    if not stored_labels(path) or (path / "adapter_config.json").exists():
        raise ModelError(
            "is no model of a sequence classifier", where=str(path), fix="an adapter needs a base"
        )
    if quantization is not None:
        raise ModelError(
            "a classifier that was trained whole is not quantized", where=str(path), fix="leave it out"
        )
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=DTYPES.get(dtype or "", "auto"), trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"cannot be loaded: {' '.join(str(error).split())[:300]}",
            where=str(path),
            fix="restore the files",
        ) from error
    tokenizer = load_tokenizer(path)
    fingerprint = Fingerprint("", tokenizer_digest(tokenizer), chat_template_digest(tokenizer), "")
    return BaseModel(model.eval(), tokenizer, rooted_name(path), path, fingerprint, None, model.dtype)
