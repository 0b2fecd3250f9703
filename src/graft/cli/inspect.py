"""`graft inspect`: an adapter under the microscope."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli import answer

if TYPE_CHECKING:
    from graft.adapters.inspect_records import Finding, Group, Inspection, LayerFacts

MOST_LAYERS = 40
"""Rows of the table of layers in a terminal; JSON and the page have all."""

WIDTH = 100
"""Columns of running text."""


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter or run directory, of graft or PEFT.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model: measures updates against its weights, one at a time."),
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="Write an HTML page with plots here.")] = None,
    directions: Annotated[
        int,
        typer.Option(
            "--directions",
            help="Leading directions of each changed weight to look for in the base; 0 is far faster.",
        ),
    ] = 10,
    threshold: Annotated[
        float, typer.Option("--threshold", help="The |cosine| under which a direction is new to the base.")
    ] = 0.5,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept another base than the adapter's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Show what an adapter is: spectra, ranks, what it changes and how much, what it was trained on."""
    from graft.adapters.inspection import inspect_adapter
    from graft.evaluate.inspect_page import write_inspection

    with _bar() as progress:
        found = inspect_adapter(
            adapter,
            base=base,
            force_base=force_base,
            directions=directions,
            threshold=threshold,
            progress=progress,
        )
    if page is not None:
        write_inspection(page, found)
    told = found.to_dict()
    fields = {**told, "page": None if page is None else str(page)}
    answer.success(as_json, fields, _text(found, page))


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, where that is a terminal; it goes when the work is done."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _text(found: Inspection, page: Path | None) -> str:
    parts = [
        _facts(found),
        "\n".join(_finding(item) for item in found.findings),
        _groups("band", found.bands),
        _groups("kind", found.kinds),
        _layers(found.layers, found.threshold),
        _saved(found),
        f"page: {page}" if page is not None else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _facts(found: Inspection) -> str:
    trained = {name.replace("_", " "): value for name, value in found.trained.items()}
    pairs: dict[str, Any] = {
        "adapter": found.directory,
        "method": f"{found.method} ({found.peft_type})",
        **{name.replace("_", " "): value for name, value in found.settings.items()},
        "base": _base(found),
        "size": f"{found.parameters:,} numbers in {len(found.tensors):,} tensors, "
        f"{found.bytes / 2**20:,.2f} MiB",
        **{f"trained: {name}": value for name, value in trained.items() if not isinstance(value, Mapping)},
    }
    width = max(len(name) for name in pairs)
    return "\n".join(f"{name.ljust(width)}  {_spelled(value)}" for name, value in pairs.items())


def _base(found: Inspection) -> str:
    told = found.base_name or "not named"
    if found.base_digest is not None:
        kind = "quantized" if found.base_quantization else "dense"
        told += f", fingerprint {found.base_digest}, {kind} in training"
    if found.measured_on is None:
        return f"{told}; --base MODEL measures against it"
    checked = "the one it was trained on" if found.base_checked else "not checked"
    return f"{told}; measured against {found.measured_on}, {checked}"


def _spelled(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finding(item: Finding) -> str:
    return textwrap.fill(f"{item.level}: {item.text}", WIDTH, subsequent_indent="  ")


def _groups(title: str, groups: Sequence[Group]) -> str:
    rows = [
        (
            group.name,
            str(group.layers),
            f"{group.parameters:,}",
            _number(group.norm),
            "–" if group.share is None else f"{group.share:.1%}",
            _number(group.effective_rank, 1),
            _number(group.stable_rank, 1),
            str(group.rank_for.get(0.95, "–")),
            _number(group.update_ratio),
            "–" if group.intruders is None else str(group.intruders),
        )
        for group in groups
    ]
    head = (title, "layers", "numbers", "update", "energy", "eff. rank", "stable", "95 %", "/ weight", "new")
    return _table(head, rows)


def _layers(layers: Sequence[LayerFacts], threshold: float) -> str:
    from graft.adapters.inspect_groups import count_new

    shown = layers
    if len(layers) > MOST_LAYERS:
        shown = sorted(layers, key=lambda layer: -(layer.update_ratio or layer.norm or 0.0))[:MOST_LAYERS]
    rows = [
        (
            layer.path,
            "–" if layer.rank is None else str(layer.rank),
            _number(layer.norm),
            _number(layer.effective_rank, 1),
            _number(layer.stable_rank, 1),
            str(layer.rank_for.get(0.95, "–")),
            _number(layer.balance, 2),
            _number(layer.update_ratio),
            "–" if layer.cosines is None else str(count_new(layer, threshold)),
        )
        for layer in shown
    ]
    head = ("layer", "rank", "update", "eff. rank", "stable", "95 %", "A / B", "/ weight", "new")
    lines = [_table(head, rows)]
    if len(shown) < len(layers):
        lines.append(f"the {len(shown)} largest updates of {len(layers)}; --json and --page have all")
    for note in dict.fromkeys(layer.note for layer in layers if layer.note):
        lines.append(f"note: {note}")
    if any(layer.of == "direction" for layer in layers):
        lines.append("note: figures are of s B A, before the magnitudes")
    return "\n".join(lines)


def _saved(found: Inspection) -> str:
    if not found.saved:
        return ""
    rows = [
        (item.name, f"{item.parameters:,}", _number(item.norm), _number(item.change_ratio))
        for item in found.saved
    ]
    return _table(("trained in full", "numbers", "norm", "change / weight"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns in which there is nothing to tell."""
    kept = [place for place in range(len(head)) if not place or any(row[place] != "–" for row in rows)]
    return answer.table([[row[place] for place in kept] for row in (head, *rows)])


def _number(value: float | None, decimals: int | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
