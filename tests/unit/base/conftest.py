"""The scripts of base/, importable as they import each other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BASE = Path(__file__).resolve().parents[3] / "base"


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of base/ by its name."""
    sys.path.insert(0, str(BASE))
    yield importlib.import_module
    sys.path.remove(str(BASE))


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small books, wrapped as old text files are; one of them must stay unread."""
    directory = tmp_path_factory.mktemp("books")
    lines = [
        f"The {word} was in the garden,\nand nobody saw it “there”." for word in ("cat", "moon", "kettle")
    ]
    for name in ("first", "second"):
        (directory / f"{name}.txt").write_text(
            f"{name.upper()}\n\n\n" + "\n\n".join(lines * 12), encoding="utf-8"
        )
    (directory / "grimms-fairy-tales.txt").write_text("A golden bird.\n" * 40, encoding="utf-8")
    return directory
