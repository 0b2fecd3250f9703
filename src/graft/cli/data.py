"""`graft data check`: what the model will really see, before any training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli import answer
from graft.cli.train import Assignments, EvaluationData, ModelName, Task, TrainingData, settings_of
from graft.config import build
from graft.errors import ConfigError

if TYPE_CHECKING:
    from graft.training.data_check import Checked

app = typer.Typer(
    name="data",
    help="Look at data before it is trained on.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MOST_SAMPLES = 20
"""Samples that --samples can ask for."""


@app.command("check", epilog="Example: graft data check --model MODEL --data train.jsonl --page check.html")
def check(
    config: Annotated[Path | None, typer.Argument(help="YAML file with the configuration of a run.")] = None,
    model: ModelName = None,
    data: TrainingData = None,
    eval_data: EvaluationData = None,
    preset: Annotated[str | None, typer.Option("--preset", help="As of graft train.")] = None,
    task: Task = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out rows that cannot be used, as graft train does.")
    ] = False,
    assignments: Assignments = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Samples to show, the first two and others drawn.")
    ] = 2,
    page: Annotated[Path | None, typer.Option("--page", help="Write an HTML page to browse here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> int:
    """Show what a run would learn from its data: samples with the loss mask, lengths, duplicates, leaks.

    Reads the configuration as graft train does. Exit code 0: it can be trained on; 2: it cannot.
    """
    if not 0 <= samples <= MOST_SAMPLES:
        raise ConfigError(
            f"{samples} samples", where="--samples", fix=f"0 to {MOST_SAMPLES}; --page shows more of them"
        )
    from graft.training.config import RunConfig
    from graft.training.data_check import check_data

    settings = settings_of(
        config,
        model=model,
        data=data,
        eval_data=eval_data,
        task=task,
        preset=preset,
        skip_invalid=skip_invalid,
        assignments=assignments or [],
    )
    run_config = build(RunConfig, settings)
    with _bar() as progress:
        found = check_data(run_config, progress)
    if page is not None:
        from graft.evaluate.check_page import write_check

        write_check(page, found.facts, found.datasets, found.findings, found.encoder)
    return _tell(found, samples, page, as_json)


def _tell(found: Checked, samples: int, page: Path | None, as_json: bool) -> int:
    """Answer; returns the exit code."""
    from graft.cli.data_text import text_of

    fields = {**_fields(found), "page": None if page is None else str(page)}
    text = "" if as_json else text_of(found, samples, page)
    answer.verdict(as_json, found.error, fields, text)
    return 0 if found.error is None else found.error.exit_code


def _fields(found: Checked) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "findings": [asdict(finding) for finding in found.findings],
        **{facts.split: facts.to_dict() for facts in found.facts},
    }


@contextmanager
def _bar() -> Iterator[Callable[[str], Callable[[int, int], None]] | None]:
    """A bar on stderr, where that is a terminal; it goes when the work is done."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the data", total=None)

        def begin(name: str) -> Callable[[int, int], None]:
            bar.update(task, description=name)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield begin
