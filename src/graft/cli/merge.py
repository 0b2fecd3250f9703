"""`graft merge`: fold an adapter into its base and compare the result with the live model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli import answer


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter or run directory.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Base to fold into; the adapter's own if left out.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Model directory to make.")] = Path("merged"),
    from_quantized: Annotated[
        bool,
        typer.Option("--from-quantized", help="Fold into the decoded quantized base that it was trained on."),
    ] = False,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept another base than the adapter's.")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base; the result is an ordinary model directory."""
    import dataclasses

    from graft.adapters.merge import merge as fold
    from graft.cli.opening import adapter_directory

    directory = adapter_directory(adapter)
    assert directory is not None
    report = fold(
        directory, out, base=base, force_base=force_base, dtype=dtype, from_quantized=from_quantized
    )
    fields = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(report).items()}
    lines = "\n".join(f"{name}: {value}" for name, value in fields.items())
    answer.success(as_json, {"model": str(out), "certificate": fields}, lines)
