"""graft: LoRA and QLoRA for one ordinary machine. Importing it does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from graft.models.transformers_hook import install as _install

__version__ = "0.1.0"

_HOMES = {
    "AdaLoraConfig": "graft.adapters.adalora",
    "Adapter": "graft.adapters.attached",
    "BaseModel": "graft.models.load",
    "ComposeConfig": "graft.adapters.composition",
    "DataConfig": "graft.data.config",
    "DoraConfig": "graft.adapters.dora",
    "GenerationConfig": "graft.evaluate.generate",
    "GraftError": "graft.errors",
    "Ia3Config": "graft.adapters.ia3",
    "LohaConfig": "graft.adapters.loha",
    "LokrConfig": "graft.adapters.lokr",
    "LoraConfig": "graft.adapters.lora",
    "LoraFaConfig": "graft.adapters.lora_fa",
    "OftConfig": "graft.adapters.oft",
    "QaLoraConfig": "graft.adapters.qa_lora",
    "QatConfig": "graft.adapters.qat",
    "QuantizationConfig": "graft.quant.config",
    "Run": "graft.training.build",
    "RunConfig": "graft.training.config",
    "TrainingConfig": "graft.training.config",
    "TrainableTokensConfig": "graft.adapters.trainable_tokens",
    "VeraConfig": "graft.adapters.vera",
    "adapters_of": "graft.adapters.attached",
    "as_classifier": "graft.models.classifier",
    "attach": "graft.adapters.attach",
    "compose": "graft.adapters.compose",
    "detach": "graft.adapters.attach",
    "disabled": "graft.adapters.attached",
    "generate": "graft.evaluate.generate",
    "inspect_adapter": "graft.adapters.inspection",
    "load": "graft.models.load",
    "load_adapter": "graft.adapters.peft_format",
    "load_foreign_adapter": "graft.adapters.foreign",
    "loftq": "graft.adapters.loftq",
    "merge": "graft.adapters.merge",
    "merge_in_place": "graft.adapters.in_place",
    "quantize": "graft.models.quantize",
    "resume": "graft.training.build",
    "save_active": "graft.adapters.compose_live",
    "save_adapter": "graft.adapters.peft_format",
    "save_foreign_adapter": "graft.adapters.foreign",
    "set_active": "graft.adapters.attached",
    "train": "graft.training.build",
    "unmerge": "graft.adapters.in_place",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from the room where it lives, on first use.

    Raises:
        AttributeError: There is no such name.
    """
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
