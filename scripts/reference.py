"""Writes docs/reference/configuration.md from the docstrings of the configuration dataclasses.

python scripts/reference.py           write the page
python scripts/reference.py --check   exit with 1 if the page is not what would be written
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

from graft.adapters.base import METHODS
from graft.data.config import DataConfig
from graft.dialects import ALIASES, FOREIGN_SECTIONS, SWITCHES, VALUES
from graft.quant.config import QuantizationConfig
from graft.training.config import ModelConfig, RunConfig, TrainingConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "configuration.md"
SECTIONS: tuple[tuple[str, type], ...] = (
    ("", RunConfig),
    ("model", ModelConfig),
    ("quantization", QuantizationConfig),
    *(("adapter" if name == "lora" else f"adapter: {name}", METHODS[name].config_class) for name in METHODS),
    ("data", DataConfig),
    ("training", TrainingConfig),
)
HEAD = """\
# Configuration

Written by `python scripts/reference.py` from the docstrings in the source; do not edit.

Fields stand in the YAML file given to `graft train CONFIG.yaml`, or after `--set` as `section.field=value`.
An unknown name is an error that names the closest one. `adapter.method` tells which fields the adapter
section has. In Python the sections are `graft.LoraConfig` and its like, `graft.QuantizationConfig`,
`graft.DataConfig` and `graft.TrainingConfig`. Python's None is `null` in YAML.
"""


def page() -> str:
    """The page as Markdown."""
    sections = [_section(name, kind) for name, kind in SECTIONS]
    return "\n".join([HEAD, *sections, _dialects()])


def _section(name: str, kind: type) -> str:
    docs = field_docs(kind)
    rows = []
    for field in dataclasses.fields(kind):
        cells = (f"`{field.name}`", _kind(str(field.type)), _default(field), docs[field.name])
        rows.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    summary = (inspect.getdoc(kind) or "").splitlines()[0]
    shorthand = getattr(kind, "SHORTHAND", None)
    if shorthand:
        summary += f" A single value stands for `{shorthand}`."
    title = f"`{name}`" if name else "The whole file"
    head = ["| field | kind | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {title}", "", summary, "", *head, *rows, ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        text = after.value if isinstance(after, ast.Expr) else None
        if named and isinstance(text, ast.Constant) and isinstance(text.value, str):
            found[node.target.id] = " ".join(text.value.split())
    return found


def _kind(annotation: str) -> str:
    parts = [part.strip() for part in annotation.split(" | ")]
    known = {
        "None": "null",
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "true or false",
        "tuple[str, ...]": "list of texts",
        "tuple[int, ...]": "list of whole numbers",
        "Mapping[str, str]": "texts by name",
    }
    names = []
    for part in parts:
        if part.startswith("Literal["):
            names += [f"`{choice}`" for choice in ast.literal_eval(part.removeprefix("Literal"))]
        else:
            names.append(known.get(part, "section"))
    return " or ".join(names)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is dict:
        return "none"
    if value is dataclasses.MISSING:
        return "its defaults"
    words = {None: "null", True: "true", False: "false", (): "none"}
    return words[value] if value is None or value == () or isinstance(value, bool) else f"`{value}`"


def _dialects() -> str:
    rows = [f"| `{name}` | `{path}` |" for name, path in ALIASES.items()]
    for name, values in SWITCHES.items():
        path, to = values[True]
        rows.append(f"| `{name}: true` | `{path}: {to}` |")
    rows += [f"| `{there}: ...` | `{here}: ...` |" for there, here in FOREIGN_SECTIONS.items()]
    for path, words in VALUES.items():
        rows += [f"| `{path}: {there}` | `{path}: {here}` |" for there, here in words.items()]
    head = "Other tools' names are accepted and answered with ours."
    return "\n".join(["## Names from elsewhere", "", head, "", "| there | here |", "|---|---|", *rows, ""])


def main() -> int:
    """Write the page, or with --check compare it."""
    if "--check" in sys.argv[1:]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != page():
            print(f"{PAGE} is out of date: python scripts/reference.py", file=sys.stderr)
            return 1
        return 0
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
