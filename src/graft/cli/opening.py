"""Opening a model for use: the base as the adapter knew it, the adapter on it, prompts as it was taught."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.cli import answer
from graft.data.formats import CHAT_FORMATS
from graft.errors import ConfigError
from graft.models.load import BaseModel

if TYPE_CHECKING:
    from graft.data.masking import Encoder


@dataclass
class Opened:
    """A model ready to use.

    Attributes:
        base: The base, with the adapter on it where one was asked for.
        adapter: Whether there is one.
        chat: Whether prompts go through the chat template.
    """

    base: BaseModel
    adapter: bool
    chat: bool

    @cached_property
    def encoder(self) -> Encoder:
        """What turns prompts into exactly the ids that begin a training sample."""
        from graft.data.masking import Encoder

        return Encoder(self.base.tokenizer)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer besides the model's own end token."""
        return self.encoder.end_of_turn_ids() if self.chat else []

    def prompt(self, text: str) -> list[int]:
        """Token ids of a user's words, as this model was taught to read them."""
        return self.messages([("user", text)]) if self.chat else self.encoder.prompt(text)

    def messages(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation of (role, content) that the model is to continue."""
        return self.encoder.prompt([{"role": role, "content": content} for role, content in messages])


def open_model(
    model: str | None,
    adapter: Path | None,
    *,
    quantization: str | None = None,
    dtype: str | None = None,
    force_base: bool = False,
    chat: bool | None = None,
    classifier: bool = False,
) -> Opened:
    """Load a base and, where given, an adapter.

    Args:
        model: Directory or hub id; None takes the adapter's own base, or the built-in one.
        adapter: Adapter directory, or a run directory that holds one.
        quantization: A quant_type such as "nf4", or "none"; None takes what the adapter was trained on.
        dtype: Compute dtype; None takes the checkpoint's.
        force_base: Accept another base than the adapter's.
        chat: Whether prompts go through the chat template; None decides by what the adapter was trained on.
        classifier: Whether the model may be a sequence classifier, which writes nothing.

    Raises:
        ConfigError: It is a classifier and may not be; a chat was asked for and there is no template, or
            dense weights of a base that has none.
    """
    from graft.adapters.peft_format import load_adapter
    from graft.models.classifier import as_classifier, load_classifier, stored_labels
    from graft.models.load import load
    from graft.models.packed import stored_method
    from graft.quant.config import QuantizationConfig
    from graft.training.monitors import Console

    adapter = adapter_directory(adapter)
    side = _side_file(adapter)
    name = model or (base_name(adapter) if adapter else "builtin")
    revision = _adapter_settings(adapter).get("revision") if adapter and not model else None
    config: QuantizationConfig | str | None = None
    if quantization is None:
        stored = side.get("base", {}).get("quantization", "")
        config = QuantizationConfig.from_dict(json.loads(stored)) if stored else None
    elif quantization != "none":
        config = quantization
    labels = stored_labels(adapter or Path(name))
    if labels and not classifier:
        raise ConfigError(
            "the model is a classifier: it tells classes apart and writes no text",
            where=str(adapter or name),
            fix="graft evaluate measures it; --predictions FILE writes its answers",
        )
    if labels and adapter is None:
        return Opened(base=load_classifier(name, dtype=dtype, quantization=config), adapter=False, chat=False)
    base = load(name, quantization=config, dtype=dtype, revision=revision, progress=Console().loading)
    if labels:
        as_classifier(base, labels)
    if quantization == "none" and stored_method(base.path):
        raise ConfigError(
            f"{name} is stored quantized; there are no dense weights",
            where="--quantization none",
            fix="leave it out, or give the dense model",
        )
    if taught_template := side.get("facts", {}).get("chat_template"):
        base.tokenizer.chat_template = taught_template
    if adapter is not None:
        loaded = load_adapter(base.model, adapter, force_base=force_base)
        for line in loaded.notes:
            answer.note(f"note: {line}")
    return Opened(base=base, adapter=adapter is not None, chat=_is_chat(base, name, side, chat))


def _is_chat(base: BaseModel, name: str, side: dict[str, Any], asked: bool | None) -> bool:
    """Whether prompts go through the chat template.

    Raises:
        ConfigError: That was asked for and there is none.
    """
    has_template = bool(getattr(base.tokenizer, "chat_template", None))
    if asked and not has_template:
        raise ConfigError(
            f"the tokenizer of {name} has no chat template",
            where="--chat",
            fix="leave --chat out for plain text",
        )
    taught = side.get("facts", {}).get("format")
    return has_template and (taught is None or taught in CHAT_FORMATS) if asked is None else asked


def adapter_directory(path: Path | None) -> Path | None:
    """An adapter directory; a run directory stands for the adapter in it."""
    if path is not None and not (path / "adapter_config.json").exists():
        inside = path / "adapter"
        return inside if (inside / "adapter_config.json").exists() else path
    return path


def base_name(adapter: Path) -> str:
    """The base that an adapter says it belongs to.

    Raises:
        ConfigError: It does not say.
    """
    name = _adapter_settings(adapter).get("base_model_name_or_path")
    if not name:
        raise ConfigError(
            "the adapter does not say which base it belongs to", where=str(adapter), fix="give MODEL"
        )
    return str(name)


def _adapter_settings(adapter: Path) -> dict[str, Any]:
    from graft import files

    settings: dict[str, Any] = files.read_json(adapter / "adapter_config.json")
    return settings


def _side_file(adapter: Path | None) -> dict[str, Any]:
    from graft import files

    if adapter is None or not (adapter / "graft.json").exists():
        return {}
    side: dict[str, Any] = files.read_json(adapter / "graft.json")
    return side
