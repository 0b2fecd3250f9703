"""`graft quantize`: a model directory in fewer bits, which loads without being quantized again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli import answer

if TYPE_CHECKING:
    from graft.adapters.lora import LoraConfig
    from graft.models.quantize import QuantizedDirectory


def quantize(
    model: Annotated[str, typer.Argument(help="Directory, hub id or builtin; dense.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model directory to make.")] = Path("quantized"),
    quant_type: Annotated[
        str, typer.Option("--quant-type", help="nf4, fp4, e2m1, int8, nf3, nf2, int4, int3 or int2.")
    ] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the scales too.")
    ] = True,
    blocksize: Annotated[int, typer.Option("--blocksize", help="Weights that share one scale.")] = 64,
    hqq: Annotated[
        bool, typer.Option("--hqq", help="Fit the blocks of int4, int3 and int2 better; takes longer.")
    ] = False,
    skip_modules: Annotated[
        list[str] | None,
        typer.Option("--skip-module", help="End of a module name that stays dense. May be repeated."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="adapter.init=loftq: with an adapter that makes up for the rounding; its other settings. "
            "May be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model directory of that name.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Quantize a model into a smaller directory; nf4 and fp4 as bitsandbytes writes them."""
    from graft.models.quantize import quantize as write
    from graft.quant.config import QuantizationConfig

    config = QuantizationConfig(
        quant_type=quant_type,  # type: ignore[arg-type]
        double_quant=double_quant,
        blocksize=blocksize,
        hqq=hqq,
        skip_modules=tuple(skip_modules or ()),
    )
    adapter = _adapter(assignments or [])
    fields: dict[str, Any] = {}
    with _bar() as progress:
        how: dict[str, Any] = {"revision": revision, "overwrite": overwrite, "progress": progress}
        if adapter is None:
            report = write(model, config, out, **how)
        else:
            from graft.adapters.loftq import loftq as write_with_start

            report, errors = write_with_start(model, config, adapter, out, **how)
            fields["loftq_errors"] = errors
    following = _next(report, assignments or [])
    fields |= {"model": str(out), **report.to_dict(), "next": following}
    answer.success(as_json, fields, _summary(report, following, fields.get("loftq_errors", {})))


def _adapter(assignments: list[str]) -> LoraConfig | None:
    """The adapter that the base is made together with; None without one."""
    from graft.adapters.lora import LoraConfig
    from graft.config import from_dict, read_assignments
    from graft.errors import ConfigError

    given = read_assignments(assignments).values
    if not given:
        return None
    strange = [path for path in given if not path.startswith("adapter.")]
    if strange or given.get("adapter.init") != "loftq":
        raise ConfigError(
            f"{strange[0] if strange else 'an adapter that does not make up for rounding'} has no part here",
            where="--set",
            fix="--set adapter.init=loftq, and other settings of that adapter",
        )
    return from_dict(
        LoraConfig, {path.removeprefix("adapter."): value for path, value in given.items()}, "--set"
    )


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, where that is a terminal; it goes when the work is done."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("quantizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _next(report: QuantizedDirectory, assignments: list[str]) -> list[str]:
    same = "".join(f" --set {word}" for word in assignments)
    return [
        f"graft train --model {report.directory} --data train.jsonl{same}",
        f"graft chat {report.directory}",
    ]


def _summary(report: QuantizedDirectory, following: list[str], errors: dict[str, list[float]]) -> str:
    from graft.quant.advice import advice

    readers = {
        "bitsandbytes": "transformers with bitsandbytes loads it too",
        "graft": "transformers loads it after `import graft`",
    }
    told = advice(report.quantization, report.num_parameters, report.num_weights)
    share = report.num_bytes / report.source_bytes
    return "\n".join(
        [
            f"{report.base} as {report.quantization.quant_type}: {report.directory}",
            answer.table(
                [
                    ["", "MiB", "bits per weight"],
                    ["before", _mib(report.source_bytes), ""],
                    ["after", _mib(report.num_bytes), ""],
                    [
                        f"  {report.num_quantized:,} quantized layers",
                        _mib(report.quantized_bytes),
                        f"{report.bits_per_weight:.3f}",
                    ],
                    ["  everything else", _mib(report.dense_bytes), ""],
                ]
            ),
            f"{share:.0%} of the size; {readers[report.layout]}",
            *(f"note: {note}" for note in report.notes),
            *([f"advice: {told}"] if told else []),
            *_made_up(errors),
            "next:",
            *(f"  {command}" for command in following),
        ]
    )


def _made_up(errors: dict[str, list[float]]) -> list[str]:
    if not errors:
        return []
    first, best = (sum(pick(found) for found in errors.values()) / len(errors) for pick in (_first, min))
    return [
        f"with the adapter in loftq_init {best:.2%} of the weights is lost, {first:.2%} after one round "
        f"(mean of {len(errors):,} layers)"
    ]


def _first(values: list[float]) -> float:
    return values[0]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
