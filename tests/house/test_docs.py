"""The pages under docs: commands, flags, fields and Python names that exist, links that lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import graft
from graft.adapters.base import config_classes
from graft.cli.evaluate import FIELDS
from graft.cli.train import METHODS
from graft.config import Settings, build, read_assignments, read_yaml
from graft.data.config import DataConfig
from graft.evaluate.metrics import find_metrics
from graft.quant.config import BITS, QuantizationConfig
from graft.training.config import ModelConfig, RunConfig, TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs" / "how-to").glob("*.md"), *(ROOT / "docs" / "methods").glob("*.md")])
AnyAdapter = dataclasses.make_dataclass(
    "AnyAdapter", sorted({f.name for kind in config_classes().values() for f in dataclasses.fields(kind)})
)
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "quantization": QuantizationConfig,
    "adapter": AnyAdapter,
    "data": DataConfig,
    "training": TrainingConfig,
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def commands(text: str) -> list[list[str]]:
    """The `graft ...` lines of the code blocks, and those in backquotes, as words."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
    lines = re.findall(r"^(?:\$ )?graft (\w+ .*)$", blocks, re.MULTILINE)
    return [shlex.split(line) for line in [*lines, *re.findall(r"`graft (\w+ [^`]*)`", text)]]


def of_verb(group: Any, words: list[str]) -> tuple[Any, list[str]]:
    """The verb that words name, perhaps one within another ("data check"), and the words after it."""
    verb, *rest = words
    assert verb in group.commands, verb
    found = group.commands[verb]
    return of_verb(found, rest) if hasattr(found, "commands") else (found, rest)


@pages
def test_commands_and_flags_exist(page: Path) -> None:
    from graft.cli.main import app

    for given in commands(page.read_text()):
        verb, words = of_verb(typer.main.get_command(app), given)
        flags = {flag for parameter in verb.params for flag in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= {*flags, "--debug"}, given


@pages
def test_command_lines_parse(page: Path) -> None:
    """Each line up to where its verb would begin to work: flags, their values, fields, files named."""
    from graft.cli.main import app

    group = typer.main.get_command(app)
    for words in commands(page.read_text()):
        verb, rest = of_verb(group, words)
        given = verb.make_context(words[0], [word for word in rest if word != "--debug"]).params
        if words[0] in ("train", "data"):
            assert given.get("resume") or given["data"] or given["config"], words
            if given["config"]:
                assert (ROOT / given["config"]).is_file(), words
                build(RunConfig, read_yaml(ROOT / given["config"]))
        if given.get("method"):
            assert given["method"] in METHODS, words
        if given.get("metrics"):
            find_metrics(given["metrics"].split(","))
        assignments = read_assignments(given.get("assignments") or [])
        for path, value in METHODS.get(given.get("method") or "", {}).items():
            assignments.values.setdefault(path, value)
            assignments.origins.setdefault(path, "--method")
        build(DataConfig if words[0] == "evaluate" else RunConfig, _within(words[0], assignments))


def _within(verb: str, assignments: Settings) -> Settings:
    """The settings of a command line as its verb reads them: evaluate takes those of data only."""
    if verb != "evaluate":
        # Where evaluation data comes from does not matter here, only that the names and values are right.
        assignments.values.setdefault("data.eval_fraction", 0.1)
        assignments.origins.setdefault("data.eval_fraction", "the test")
        return assignments
    inner = Settings()
    for path, value in assignments.values.items():
        assert path.removeprefix("data.").partition(".")[0] in FIELDS, path
        inner.put(path.removeprefix("data."), value, "--set")
    return inner


@pages
def test_fields_exist(page: Path) -> None:
    for section, name in re.findall(rf"[`\s]({'|'.join(SECTIONS)})\.(\w+)[`=]", page.read_text()):
        if (section, name) != ("adapter", "notes"):  # an attribute of the object, not of the section
            assert name in {field.name for field in dataclasses.fields(SECTIONS[section])}, (section, name)


@pages
def test_python_names_exist(page: Path) -> None:
    for name in re.findall(r"\bgraft\.([A-Za-z_]+)\b", page.read_text()):
        assert name in graft.__all__ or name == "json", name


@pages
def test_links_lead_somewhere_and_pages_are_short(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= 60
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_every_number_format_is_on_its_page() -> None:
    page = ROOT / "docs" / "formats.md"
    text = page.read_text()
    assert all(f"`{name}`" in text and f"| {name} |" in text for name in BITS)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


def test_every_method_besides_lora_has_a_page() -> None:
    pages = {path.stem.replace("-", "_") for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages - {"initialisations"} == set(config_classes()) - {"lora"}


def test_there_are_pages() -> None:
    assert len(PAGES) >= 4
    assert sum(len(commands(page.read_text())) for page in PAGES) >= 10
