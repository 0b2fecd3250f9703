"""What tests of the data room have in common: a small tokenizer, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tokenizer(tinystories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tinystories)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write_rows
