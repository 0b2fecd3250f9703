"""`graft merge`: fold an adapter into its base and compare the result with the live model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli import answer

if TYPE_CHECKING:
    from graft.adapters.merge_report import MergeReport


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter or run directory.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Base to fold into; the adapter's own if left out.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Model directory to make.")] = Path("merged"),
    into: Annotated[
        str,
        typer.Option(
            "--into",
            help="dense, dequantized, quantized (QA-LoRA in the base's codes), requantized, or auto.",
        ),
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Held-out rows to compare on; graft's own prompts if left out."),
    ] = None,
    quant_type: Annotated[
        str | None,
        typer.Option("--quant-type", help="Of the requantized model; that of training if left out."),
    ] = None,
    from_quantized: Annotated[
        bool,
        typer.Option("--from-quantized", help="The same as --into dequantized."),
    ] = False,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept another base than the adapter's.")
    ] = False,
    allow_no_op: Annotated[
        bool, typer.Option("--allow-no-op", help="Write a model in which the update is lost.")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base, measured against the live model; the result is a model directory."""
    from graft.adapters.merge import merge as fold
    from graft.cli.opening import adapter_directory

    directory = adapter_directory(adapter)
    assert directory is not None
    with _bar() as progress:
        report = fold(
            directory,
            out,
            base=base,
            into=into,  # type: ignore[arg-type]
            quantization=quant_type,
            data=data,
            force_base=force_base,
            allow_no_op=allow_no_op,
            dtype=dtype,
            from_quantized=from_quantized,
            progress=progress,
        )
    answer.success(as_json, {"model": str(out), "certificate": report.to_dict()}, summary(report))


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr, where that is a terminal; it goes when the work is done."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def summary(report: MergeReport) -> str:
    """The certificate for people."""
    from graft.adapters.likeness import Likeness
    from graft.adapters.merge_report import rows

    effect = Likeness(report.adapter_kl, report.adapter_flips, report.adapter_effect)
    return "\n".join(
        [
            f"{report.folded_into}: {report.directory}",
            answer.table(rows(report.candidates, effect, report.folded_into)),
            f"written (*): {report.reason}",
            f"compared with the live model over {_probe(report.probe)}, in float32",
            *(f"note: {note}" for note in report.notes),
            "next:",
            f"  graft evaluate {report.directory} --data eval.jsonl",
        ]
    )


def _probe(probe: dict[str, Any]) -> str:
    sources = {
        "data": f"{probe['num_rows']} rows of {probe['source']}",
        "prompts": f"{probe['num_rows']} prompts that come with graft",
        "random": "random tokens, the base having no tokenizer",
    }
    return f"{probe['num_positions']:,} next tokens of {sources[probe['kind']]}"
