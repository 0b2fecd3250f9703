"""The generated reference page: as the script would write it now, with every field and its docstring."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_up_to_date(script: ModuleType) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/reference.py"


def test_every_field_is_on_the_page_with_its_docstring(script: ModuleType) -> None:
    text = script.page()
    for name, kind in script.SECTIONS:
        docs = script.field_docs(kind)
        assert f"## `{name}`" in text or not name
        for field in dataclasses.fields(kind):
            assert f"| `{field.name}` |" in text
            assert docs[field.name].replace("|", "\\|") in text
