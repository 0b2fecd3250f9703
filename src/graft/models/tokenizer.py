"""The tokenizer of a base model."""

from __future__ import annotations

import os
from typing import Any

from graft.errors import ModelError
from graft.models.locate import resolve

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "vocab.bpe")


def load_tokenizer(name: str | os.PathLike[str], revision: str | None = None) -> Any:
    """Load the tokenizer of a base model.

    Args:
        name: A directory, a hub id, or "builtin".
        revision: Branch, tag or commit of a hub id.

    Returns:
        transformers' tokenizer.

    Raises:
        ModelError: There is none, it is damaged, or it asks for code of its own.
    """
    path = resolve(name, revision)
    if not any((path / file).is_file() for file in _FILES):
        raise ModelError(
            "there is no tokenizer here",
            where=str(path),
            fix=f"put the model's tokenizer files beside its weights (one of {', '.join(_FILES[:3])})",
        )
    # Imported on use: transformers takes seconds.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"the tokenizer cannot be read ({' '.join(str(error).split())})",
            where=str(path),
            fix="download its files again",
        ) from error
