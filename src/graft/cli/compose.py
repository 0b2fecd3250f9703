"""`graft compose`: one adapter of several, or a smaller one of one, with what it costs in loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli import answer
from graft.cli.evaluate import read_data_fields
from graft.errors import ConfigError

if TYPE_CHECKING:
    from graft.adapters.compose import ComposeReport
    from graft.data.config import DataConfig

MAX_LAYERS = 30
"""Layers that are listed one by one; of more the worst are."""


def compose(
    operation: Annotated[
        str,
        typer.Argument(
            help="cat, svd, add, subtract, negate, scale, resize, ties, dare, dare_ties or magnitude_prune."
        ),
    ],
    adapters: Annotated[list[Path], typer.Argument(help="Adapter or run directories.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adapter directory to make.")] = Path("composed"),
    weights: Annotated[
        str | None, typer.Option("--weights", "-w", help="One for each adapter: 0.7,0.3. All 1 if left out.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Largest rank of the result.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Share of the squared norm to keep, in place of --rank.")
    ] = None,
    rank_pattern: Annotated[
        list[str] | None, typer.Option("--rank-pattern", help="regex=rank for some layers. May be repeated.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of numbers that ties, dare and pruning keep.")
    ] = None,
    majority: Annotated[
        str | None, typer.Option("--majority", help="What elects a sign in ties: total or frequency.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what dare draws.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Measure the loss of adapters and result here."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="data.max_length=256, data.limit and the like. May be repeated."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows in one forward pass of --data; 16 if left out.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Where the base is; the first adapter tells if left out."),
    ] = None,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept adapters of different bases.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Combine adapters on their true deltas, or cut the rank of one; the result is a plain LoRA for PEFT."""
    from graft.adapters.compose import compose as write
    from graft.adapters.compose import new_place
    from graft.adapters.composition import ComposeConfig
    from graft.cli.opening import adapter_directory

    if data is None and (assignments or batch_size is not None):
        flag = "--set" if assignments else "--batch-size"
        raise ConfigError(f"{flag} acts on --data only", where=flag, fix="give --data FILE, or leave it out")
    fields = read_data_fields(assignments or [], "compose")
    config = ComposeConfig(
        operation=operation.replace("-", "_"),  # type: ignore[arg-type]
        weights=_numbers(weights),
        rank=rank,
        energy=energy,
        rank_pattern=tuple(rank_pattern or ()),
        density=density,
        majority=majority,  # type: ignore[arg-type]
        seed=seed,
    )
    parents = [found for path in adapters if (found := adapter_directory(path)) is not None]
    config.check_count(len(parents))
    new_place(out)
    scale = None if data is None else _Scale(parents[0], data, fields, base, batch_size or 16)
    before = {} if scale is None else scale.before(parents, force_base)
    with _bar() as progress:
        report = write(parents, config, out, base=base, force_base=force_base, progress=progress)
    losses = {} if scale is None else {**before, "loss_after": scale.loss(out, force_base)}
    told = {"adapter": str(out), **report.to_dict(), **({"metrics": losses} if losses else {})}
    answer.success(as_json, told, _summary(report, parents, losses))


class _Scale:
    """Weighs adapters by their loss on a data set, over one copy of the base.

    Args:
        first: The adapter that says which base, and how it is quantized.
        data: The data.
        fields: How its rows are read.
        base: Where the base is, if not where the adapter says.
        batch_size: Rows in one forward pass.
    """

    def __init__(self, first: Path, data: str, fields: DataConfig, base: str | None, batch_size: int) -> None:
        self._first, self._data, self._fields = first, data, fields
        self._base, self._batch_size = base, batch_size

    def before(self, parents: list[Path], force_base: bool) -> dict[str, Any]:
        """The loss of the base and of each adapter."""
        from graft.adapters.attach import disabled
        from graft.cli.opening import open_model

        self._opened = open_model(self._base, self._first, force_base=force_base).base
        with disabled(self._opened.model):
            plain = self._measured()
        first = self._measured()
        return {"base_loss": plain, "loss_before": [first, *(self.loss(p, force_base) for p in parents[1:])]}

    def loss(self, adapter: Path, force_base: bool) -> float:
        """The loss of an adapter, which takes the place of the one before."""
        from graft.adapters.attach import detach
        from graft.adapters.peft_format import load_adapter

        detach(self._opened.model)
        load_adapter(self._opened.model, adapter, "default", force_base=force_base)
        return self._measured()

    def _measured(self) -> float:
        from graft.evaluate.kinds import measure

        opened, data = self._opened, self._fields
        found = measure(
            opened.model, opened.tokenizer, self._data, ["loss"], data=data, batch_size=self._batch_size
        )
        return found.metrics["loss"]


def _numbers(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no list of numbers", where="--weights", fix="for example --weights 0.7,0.3"
        ) from error


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, where that is a terminal; it goes when the work is done."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("composing layer"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(report: ComposeReport, parents: list[Path], losses: dict[str, Any]) -> str:
    layers = sorted(report.layers, key=lambda layer: -layer.error)
    shown = report.layers if len(layers) <= MAX_LAYERS else layers[:MAX_LAYERS]
    rows = [["layer", "rank of each", "rank", "relative error"]]
    for layer in shown:
        ranks = " ".join("-" if rank is None else str(rank) for rank in layer.ranks_before)
        rows.append([layer.path, ranks, str(layer.rank), f"{layer.error:.4f}"])
    lines = [f"{report.operation} of {len(parents)}: {report.directory}", answer.table(rows)]
    if len(layers) > len(shown):
        lines.append(f"the worst {len(shown)} of {len(layers)} layers; --json tells all")
    used = [layer.rank for layer in report.layers if layer.rank]
    span = f"rank {used[0]}" if min(used) == max(used) else f"ranks {min(used)} to {max(used)}"
    lines.append(
        f"{span}; relative error {report.error:.4f} over all layers, "
        f"{1 - report.error**2:.2%} of the squared norm kept"
    )
    table = [["", "bytes", *(["loss"] if losses else [])]]
    if losses:
        table.append(["base", "", f"{losses['base_loss']:.4f}"])
    for number, (parent, told) in enumerate(zip(parents, report.parents, strict=True)):
        row = [str(parent), f"{told['bytes']:,}"]
        table.append([*row, *([f"{losses['loss_before'][number]:.4f}"] if losses else [])])
    last = [str(report.directory), f"{report.num_bytes:,}"]
    table.append([*last, *([f"{losses['loss_after']:.4f}"] if losses else [])])
    lines += [answer.table(table), *(f"note: {note}" for note in report.notes)]
    return "\n".join(lines)
