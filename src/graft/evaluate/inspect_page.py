"""The page of an inspected adapter: what it is, where its updates are and what they look like."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from graft.adapters.inspect_groups import count_new
from graft.adapters.inspect_records import SHARES, Finding, Group, Inspection, LayerFacts
from graft.adapters.spectrum import energy
from graft.evaluate.report import Curves, Facts, Section, Series, Table, json_in_page, write_report
from graft.evaluate.run_page import Folded

MOST_VALUES = 256
"""Singular values of a layer that the page holds; a full spectrum of a large layer has thousands."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the user should know, the worst first."""

    title: str = "Findings"
    findings: Sequence[Finding]
    note: str = ""

    def body(self) -> str:
        """HTML below the title."""
        order = ("alarm", "advice", "note")
        lines = sorted(self.findings, key=lambda finding: order.index(finding.level))
        items = "".join(_item(finding) for finding in lines)
        return f'<ul class="events">{items}</ul>'


def _item(finding: Finding) -> str:
    kind = ' class="bad"' if finding.level == "alarm" else ""
    return f"<li{kind}><b>{finding.level}</b> {escape(finding.text)}</li>"


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """Figures of every layer by block and linear; a cell shows the singular values of its layer."""

    scripts: ClassVar[tuple[str, ...]] = ("heat", "inspect")
    title: str = "Layer by layer"
    layers: Sequence[dict[str, Any]]
    directions: int
    threshold: float
    note: str = "Columns are blocks, rows their linears. Choose a cell for the singular values of its update."

    def body(self) -> str:
        """HTML below the title."""
        data = {"layers": list(self.layers), "directions": self.directions, "threshold": self.threshold}
        return (
            f'<script type="application/json" id="inspection">{json_in_page(data)}</script>'
            '<div data-part="layers"></div>'
            '<noscript><p class="note">The map needs JavaScript; nothing is fetched.</p></noscript>'
        )


def write_inspection(path: str | os.PathLike[str], found: Inspection) -> None:
    """Write an inspection as a page that can be viewed anywhere, also offline.

    Args:
        path: The HTML file; its directory must exist.
        found: What `inspect_adapter` found.

    Raises:
        StorageError: The file cannot be written; an old one is untouched.
    """
    name = Path(found.directory).name
    shown = Path(found.directory).parent.name if name == "adapter" else name
    write_report(
        path,
        [*_sections(found)],
        title=f"Adapter {shown}",
        subtitle=f"{found.method} on {found.base_name or 'a base that is not named'}",
    )


def _sections(found: Inspection) -> Iterator[Section]:
    yield Facts(title="Adapter", facts=_facts(found))
    if found.findings:
        yield Findings(findings=found.findings)
    if any(layer.norm is not None for layer in found.layers):
        yield from _depth(found)
        yield LayerMap(
            layers=[_layer(layer, found.threshold) for layer in found.layers],
            directions=max((len(layer.cosines or ()) for layer in found.layers), default=0),
            threshold=found.threshold,
        )
        yield from _energy(found)
    yield _groups("Bands of blocks", "band", found.bands, "The first, second and last third of the blocks.")
    yield _groups("Kinds of layers", "kind", found.kinds, "")
    if found.saved:
        rows = [(item.name, item.parameters, item.norm, item.change_ratio) for item in found.saved]
        yield Table(
            title="Trained in full", columns=("tensor", "numbers", "norm", "change / weight"), rows=rows
        )
    if found.trained:
        yield Facts(title="Training", facts=_trained(found))
    columns = ("tensor", "shape", "dtype", "bytes", "norm", "largest")
    tensors = [
        (item.name, " × ".join(map(str, item.shape)), item.dtype, item.bytes, item.norm, item.largest)
        for item in found.tensors
    ]
    yield Folded(
        title="Tensors",
        summary=f"{len(tensors):,} tensors: shapes, bytes, norms",
        inner=Table(title="", columns=columns, rows=tensors),
    )


def _facts(found: Inspection) -> dict[str, object]:
    facts: dict[str, object] = {"method": found.method}
    for name, value in found.settings.items():
        facts[name.replace("_", " ")] = _plain(value)
    facts |= {
        "layers": len(found.layers),
        "numbers": found.parameters,
        "size": f"{found.bytes / 2**20:,.2f} MiB",
        "base": found.base_name,
        "fingerprint of the base": found.base_digest,
    }
    if found.base_quantization is not None:
        facts["base in training"] = "quantized" if found.base_quantization else "dense"
    if found.measured_on is not None:
        checked = "the same" if found.base_checked else "not checked"
        facts["measured against"] = f"{found.measured_on} ({checked})"
    return facts


def _trained(found: Inspection) -> dict[str, object]:
    return {name.replace("_", " "): _plain(value) for name, value in found.trained.items()}


def _plain(value: object) -> object:
    """A setting as it is read: a list in words, a whole number without its point."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _depth(found: Inspection) -> Iterator[Section]:
    """The size of the updates over the depth of the model, a line for each kind of layer."""
    by_ratio = all(layer.update_ratio is not None for layer in found.layers)
    lines: dict[str, dict[int, list[float]]] = {}
    for layer in found.layers:
        size = layer.update_ratio if by_ratio else layer.norm
        if layer.block is not None and size is not None:
            lines.setdefault(layer.kind, {}).setdefault(layer.block, []).append(size)
    if max((len(points) for points in lines.values()), default=0) < 2:
        return
    yield Curves(
        title="Size of the updates over the depth",
        series=[
            Series(
                run=kind,
                kind="",
                steps=sorted(points),
                values=[sum(points[block]) / len(points[block]) for block in sorted(points)],
            )
            for kind, points in lines.items()
        ],
        x_label="block",
        whole_x=True,
        y_label="update / weight" if by_ratio else "norm of the update",
    )


def _energy(found: Inspection) -> Iterator[Section]:
    """How much of the energy the first directions hold, on average over the layers of each kind."""
    lines: dict[str, list[list[float]]] = {}
    for layer in found.layers:
        if layer.values and (held := energy(layer.values)):
            lines.setdefault(layer.kind, []).append(held[:MOST_VALUES])
    if max((len(held) for several in lines.values() for held in several), default=0) < 2:
        return
    yield Curves(
        title="Energy in the first directions",
        series=[
            Series(
                run=kind,
                kind="",
                steps=range(1, max(map(len, several)) + 1),
                values=[
                    sum(held[min(at, len(held) - 1)] for held in several) / len(several)
                    for at in range(max(map(len, several)))
                ],
            )
            for kind, several in lines.items()
        ],
        x_label="directions",
        whole_x=True,
        y_label="share of the energy",
        note="The share of ‖update‖² that the largest singular values hold, the mean over the layers of a "
        "kind. A line that is at 1 early says that a smaller rank would do.",
    )


def _groups(title: str, name: str, groups: Sequence[Group], note: str) -> Table:
    columns: dict[str, list[object]] = {
        name: [group.name for group in groups],
        "layers": [group.layers for group in groups],
        "numbers": [group.parameters for group in groups],
        "norm": [group.norm for group in groups],
        "energy %": [None if group.share is None else round(100 * group.share, 1) for group in groups],
        "effective rank": [group.effective_rank for group in groups],
        "stable rank": [group.stable_rank for group in groups],
        **{f"{share:.0%} in": [group.rank_for.get(share) for group in groups] for share in SHARES},
        "/ weight": [group.update_ratio for group in groups],
        "new": [group.intruders for group in groups],
    }
    kept = {title: cells for title, cells in columns.items() if any(cell is not None for cell in cells)}
    told = (
        "Norms are of all updates together, ranks means over the layers; 95% in: so many directions hold "
        "95% of the energy, in the layer that needs most."
    )
    return Table(
        title=title,
        columns=list(kept),
        rows=list(zip(*kept.values(), strict=True)),
        note=f"{note} {told}".strip(),
    )


def _layer(layer: LayerFacts, threshold: float) -> dict[str, Any]:
    """What the map shows of a layer."""
    figures = {
        "norm": layer.norm,
        "effective_rank": layer.effective_rank,
        "stable_rank": layer.stable_rank,
        "balance": layer.balance,
        "update_ratio": layer.update_ratio,
        "rank_95": layer.rank_for.get(0.95),
        "intruders": None if layer.cosines is None else count_new(layer, threshold),
    }
    rounded = {
        name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()
    }
    values = [float(f"{value:.6g}") for value in (layer.values or ())[:MOST_VALUES]]
    return {"path": layer.path, "note": layer.note, "values": values, **rounded}
