"""The page of a run: its figures, its decisions with their reasons, its loss curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.evaluate.report import Curves, Facts, Series, write_report
from graft.runs import RunDirectory, read_lines


def loss_series(run: RunDirectory, name: str) -> list[Series]:
    """Training and evaluation loss of a run over its steps.

    Args:
        run: The run.
        name: What it is called in the chart.
    """
    lines = read_lines(run.metrics_path)
    series = []
    for kind, field in (("train", "loss"), ("eval", "eval_loss")):
        points = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            series.append(Series(run=name, kind=kind, steps=steps, values=values))  # type: ignore[arg-type]
    return series


def tokens_per_second(run: RunDirectory) -> float | None:
    """Real tokens a second over the steps of a run, the first one (which warms up) left out."""
    lines = read_lines(run.timings_path)[1:]
    seconds = sum(line["seconds"] for line in lines)
    return sum(line["num_tokens"] for line in lines) / seconds if seconds else None


def write_run_report(run: RunDirectory, record: Mapping[str, Any]) -> None:
    """Write report.html of a finished run.

    Args:
        run: The run.
        record: Its run.json.
    """
    config = {
        f"{section}.{name}" if isinstance(fields, Mapping) else section: value
        for section, fields in record["config"].items()
        for name, value in (fields.items() if isinstance(fields, Mapping) else [("", fields)])
        if value is not None
    }
    speed = tokens_per_second(run)
    results = dict(record["results"]) | {"tokens_per_second": None if speed is None else round(speed)}
    write_report(
        run.report_path,
        [
            Facts(
                title="Results", facts={name: value for name, value in results.items() if value is not None}
            ),
            Curves(title="Loss", series=loss_series(run, "")),
            Facts(title="Decisions", facts=record["derived"]),
            Facts(title="Settings", facts=config),
            Facts(title="Identity", facts={**record["identity"], **record["versions"]}),
        ],
        title=f"Run {run.path.name}",
        subtitle=f"{record['config']['model']['name']} on {record['config']['data']['train']}",
    )
