"""`graft train`: fine-tune a model from a config file or from flags, or go on with a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.adapters.base import METHODS as ADAPTERS
from graft.cli import answer
from graft.config import Settings, build, did_you_mean, read_assignments, read_yaml
from graft.errors import ConfigError, GraftError, StopRequested

if TYPE_CHECKING:
    from graft.training.build import Run
    from graft.training.monitors import Monitor

WATCH_PORT = 8127
"""Where the live page is when --watch stands alone."""

METHODS: dict[str, dict[str, str | None]] = {
    "full": {"adapter": None, "quantization": None},
    "lora": {"adapter.method": "lora", "quantization": None},
    "qlora": {"adapter.method": "lora", "quantization.quant_type": "nf4"},
    **{name: {"adapter.method": name} for name in ADAPTERS if name != "lora"},
}
"""What --method sets; it wins over the file, except that qlora keeps the quantization of the file. Adapter
methods other than lora go with a quantization or without."""

SKIP_INVALID = (
    "Leave out rows that cannot be used, each into quarantine.jsonl of the run, instead of stopping."
)

UNWANTED = {"full": {"adapter", "quantization"}, "lora": {"quantization"}}
"""Sections that a method is without: those of the file are left out, and told; those of --set are refused."""


ModelName = Annotated[
    str | None, typer.Option("--model", "-m", help='Directory, hub id, or "builtin" (the default).')
]
TrainingData = Annotated[
    str | None, typer.Option("--data", "-d", help="Training data: a file, a directory, hub:owner/name.")
]
EvaluationData = Annotated[str | None, typer.Option("--eval-data", help="Evaluation data.")]
Task = Annotated[str | None, typer.Option("--task", help="generation (the default) or classification.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any field: section.key=value. May be repeated.")
]
"""Flags of a run's configuration, which `graft data check` reads as well."""


def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with the whole configuration.")] = None,
    model: ModelName = None,
    data: TrainingData = None,
    eval_data: EvaluationData = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help=f"full, lora, qlora, {', '.join(name for name in ADAPTERS if name != 'lora')}; without a "
            "config file lora.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="classification, generation, instruction, domain or preference."),
    ] = None,
    task: Task = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Run directory to make.")] = None,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help=SKIP_INVALID)] = False,
    assignments: Assignments = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with this run exactly.")] = None,
    watch: Annotated[
        int | None,
        typer.Option(
            "--watch",
            metavar="[PORT]",
            help="Serve a live page on this port of 127.0.0.1: 8127 without a number, 0 for a free one.",
        ),
    ] = None,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            help='With --resume: what may change, by name: a field whose value --set gives, "training data", '
            '"base weights". May be repeated.',
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Fine-tune a model; --resume RUN goes on exactly where a run stopped."""
    given: dict[str, object] = {"CONFIG": config, "--model": model, "--data": data, "--eval-data": eval_data}
    given |= {"--method": method, "--preset": preset, "--task": task, "--out": out}
    given |= {"--skip-invalid": skip_invalid}
    if allow_changes and resume is None:
        raise ConfigError(
            "only a run that goes on can change", where="--allow-change", fix="--resume RUN, or leave it out"
        )
    if resume is not None:
        besides = [flag for flag, value in given.items() if value]
        if besides:
            raise ConfigError(
                f"{', '.join(besides)} cannot go with --resume: a run goes on with its own settings",
                where="--resume",
                fix=f"graft train --resume {resume}; what is meant to change is named by --allow-change "
                "and given by --set",
            )
        from graft.training.build import resume as go_on

        changed = read_assignments(assignments or [])
        log_steps = int(changed.values.get("training.log_steps", _log_steps(resume)))
        with _watched(watch, resume, _monitor(quiet, log_steps)) as monitor:
            for told in changed.notes:
                monitor.say(told)
            finished = go_on(resume, monitor, settings=changed, allow_changes=allow_changes or [])
    else:
        settings = settings_of(
            config,
            model=model,
            data=data,
            eval_data=eval_data,
            method=method,
            out=out,
            task=task,
            preset=preset,
            skip_invalid=skip_invalid,
            assignments=assignments or [],
        )
        finished = _start(settings, quiet, watch)
    _tell(finished, as_json)


def settings_of(
    config: Path | None,
    *,
    model: str | None = None,
    data: str | None = None,
    eval_data: str | None = None,
    method: str | None = None,
    out: str | None = None,
    task: str | None = None,
    preset: str | None = None,
    skip_invalid: bool = False,
    assignments: Sequence[str] = (),
) -> Settings:
    """The settings of a run: a file's, over them those of flags, over these those of --set.

    Raises:
        ConfigError: The file is no YAML, or a flag contradicts another.
    """
    settings = read_yaml(config) if config is not None else Settings()
    flags = _flags(model, data, eval_data, method or (None if config else "lora"), out)
    for section in sorted(_sections(settings) & UNWANTED.get(method or "", set())):
        settings.notes.append(f"--method {method}: the {section} section of {config} is left out")
    if method == "qlora" and _sections(settings) & {"quantization"}:
        del flags.values["quantization.quant_type"]  # the file says which
    for name, value in (("task", task), ("preset", preset)):
        if value is not None:
            flags.put(name, value, f"--{name}")
    if skip_invalid:
        flags.put("data.skip_invalid", True, "--skip-invalid")
    settings.update(flags)
    assigned = read_assignments(assignments)
    _check_method(method, assigned)
    settings.update(assigned)
    return settings


def _start(settings: Settings, quiet: bool, watch: int | None) -> Run:
    from graft.training.build import run_from_config
    from graft.training.config import RunConfig

    run_config = build(RunConfig, settings)
    console = _monitor(quiet, run_config.training.log_steps)
    with _watched(watch, Path(run_config.output), console) as monitor:
        for told in settings.notes:
            monitor.say(told)
        return run_from_config(run_config, monitor)


@contextmanager
def _watched(port: int | None, run: Path, monitor: Monitor) -> Iterator[Monitor]:
    """The monitor, and within the block a live page besides where a port is given."""
    if port is None:
        yield monitor
        return
    from graft.training.relay import Relay
    from graft.training.watch import Watch

    watch = Watch(run, port)
    answer.note(f"live page: {watch.address}")
    phase, error = "failed", ""
    try:
        yield Relay([monitor, watch])
        phase = "finished"
    except StopRequested:
        phase = "stopped"
        raise
    except GraftError as failure:
        error = failure.what
        raise
    finally:
        watch.close(phase, error)


def with_port(words: list[str]) -> list[str]:
    """The words of a command line in which a bare --watch has its port."""
    bare = [
        word == "--watch" and not after.isdecimal()
        for word, after in zip(words, [*words[1:], ""], strict=True)
    ]
    return [f"--watch={WATCH_PORT}" if alone else word for word, alone in zip(words, bare, strict=True)]


def _flags(
    model: str | None, data: str | None, eval_data: str | None, method: str | None, out: str | None
) -> Settings:
    settings = Settings()
    values = {"model.name": (model, "--model"), "data.train": (data, "--data")}
    values |= {"data.eval": (eval_data, "--eval-data"), "output": (out, "--out")}
    for path, (value, flag) in values.items():
        if value is not None:
            settings.put(path, value, flag)
    if method is not None:
        if method not in METHODS:
            raise ConfigError(
                f"unknown method {method!r}", where="--method", fix=did_you_mean(method, METHODS)
            )
        for path, setting in METHODS[method].items():
            settings.put(path, setting, "--method")
    return settings


def _check_method(method: str | None, assigned: Settings) -> None:
    for section in sorted(_sections(assigned) & UNWANTED.get(method or "", set())):
        raise ConfigError(
            f"--method {method} has no {section}, --set gives one",
            where=f"--set {section}",
            fix="--method qlora" if section == "quantization" else "--method lora",
        )


def _sections(settings: Settings) -> set[str]:
    return {path.partition(".")[0] for path, value in settings.values.items() if value is not None}


def _log_steps(run: Path) -> int:
    """How often the run was told to show itself."""
    from graft.runs import RunDirectory

    training = RunDirectory.open(run).read_record().get("config", {}).get("training", {})
    return int(training.get("log_steps", 10))


def _monitor(quiet: bool, log_steps: int) -> Monitor:
    from graft.training.monitors import Console, Silent

    return Silent() if quiet else Console(log_steps)


def _tell(run: Run, as_json: bool) -> None:
    result = run.adapter or run.model
    model = f"--adapter {run.adapter}" if run.adapter else f"{run.model}"
    fields = {
        "run": str(run.directory),
        "adapter": str(run.adapter) if run.adapter else None,
        "model": str(run.model) if run.model else None,
        "metrics": run.metrics,
    }
    steps = run.metrics["steps"]
    text = f"done after {steps} step{'' if steps == 1 else 's'}: {result}\n"
    text += f"page:  {run.directory / 'report.html'}\nnext:  graft generate {model} --prompt ..."
    if run.adapter:
        text += f" --compare\n       graft merge {run.adapter} --out merged/"
    answer.success(as_json, fields, text)
