"""The page of a run: figures, curves, spectra, audit, decisions with their reasons, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft import files
from graft.evaluate.report import Facts, Section, Series, Table, write_report
from graft.evaluate.run_page import Folded, RunOverview, curve_parts, drawn_lines
from graft.runs import RunDirectory, read_lines
from graft.training.audit import FILE as AUDIT


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

    Raises:
        StorageError: The page cannot be written.
    """
    write_report(
        run.report_path,
        [
            *_figures(run, record),
            *audit_parts(read_audit(run)),
            *_memory(record),
            Facts(title="Decisions", facts=record["derived"]),
            *_trackers(record),
            Facts(title="Results", facts=_given(record["results"])),
            Facts(title="Settings", facts=_given(_flat(record["config"]))),
            Facts(title="Identity", facts={**record["identity"], **record["versions"]}),
        ],
        title=f"Run {run.path.name}",
        subtitle=f"{record['config']['model']['name']} on {record['config']['data']['train']}",
    )


def read_audit(run: RunDirectory) -> dict[str, Any] | None:
    """audit.json of a run; None where there is none yet."""
    path = run.path / AUDIT
    found: dict[str, Any] | None = files.read_json(path) if path.is_file() else None
    return found


def predicted_memory_bytes(record: Mapping[str, Any]) -> int | None:
    """What the run was predicted to need at most, where its record says so."""
    found = record.get("predicted_memory", {}).get("peak_bytes")
    return found if isinstance(found, int) else None


def _figures(run: RunDirectory, record: Mapping[str, Any]) -> list[Section]:
    lines, every = drawn_lines(
        read_lines(run.metrics_path), read_lines(run.timings_path), read_lines(run.spectra_path)
    )
    results, speed = record["results"], record.get("speed", {})
    state = {
        "phase": record["status"],
        "name": run.path.name,
        "num_steps": results["planned_steps"],
        "skipped_steps": results["skipped_steps"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "predicted_memory_bytes": predicted_memory_bytes(record),
        "product_flops_per_second": speed.get("product_flops_per_second"),
        "speed": speed,
    }
    note = "" if every == 1 else f"One of {every} steps is drawn, spikes among them; metrics.jsonl has all."
    return [RunOverview(lines=lines, state=state, note=note), *curve_parts()]


def audit_parts(audit: Mapping[str, Any] | None) -> list[Section]:
    """What was checked and what was found, then each tensor."""
    if audit is None:
        return []
    end = audit.get("end", {})
    facts = {
        "outcome": "passed" if audit["passed"] else "defects found",
        "tensors that move": f"{audit['moved']:,} of {audit['trained_tensors']:,}"
        if "moved" in audit
        else None,
        "largest change of a logit": audit.get("output_change"),
        "the same at the end": end.get("output_change"),
        "base compared": _compared(audit),
        "base at the end": end.get("base"),
        "optimizer steps watched": ", ".join(map(str, audit.get("steps", []))),
        "seconds it took": audit.get("seconds"),
    }
    parts: list[Section] = [
        Facts(
            title="Audit", facts=_given(facts), note=" ".join(f"{note}." for note in audit.get("notes", []))
        )
    ]
    if defects := audit.get("defects"):
        rows = [(found["what"], ", ".join(found["names"]), found["cause"]) for found in defects]
        parts.append(Table(title="Defects", columns=("what", "where", "likely cause"), rows=rows))
    if tensors := audit.get("tensors"):
        rows = [(name, found["gradient"], found["change"]) for name, found in tensors.items()]
        table = Table(title="", columns=("tensor", "largest gradient", "change"), rows=rows)
        parts.append(
            Folded(
                title="Audit, tensor by tensor",
                summary=f"{len(rows):,} tensors: largest gradient, and how far the watched numbers moved",
                inner=table,
            )
        )
    return parts


def _compared(audit: Mapping[str, Any]) -> str | None:
    if "base_tensors" not in audit:
        return None
    sampled = audit["base_bytes"] if audit["audit"] == "full" else audit["sampled_bytes"]
    return f"{sampled:,} of {audit['base_bytes']:,} bytes in {audit['base_tensors']:,} tensors"


def _memory(record: Mapping[str, Any]) -> list[Section]:
    predicted, measured = predicted_memory_bytes(record), record["results"].get("peak_memory_bytes")
    if predicted is None or not measured:
        return []
    rows: list[tuple[str, object]] = []
    terms = record.get("predicted_memory")
    if isinstance(terms, Mapping):
        rows = [(name, _mebibytes(value)) for name, value in terms.items() if name != "peak_bytes" and value]
    rows += [("predicted peak", _mebibytes(predicted)), ("measured peak", _mebibytes(measured))]
    note = f"Measured is {measured / predicted:.2f} times the predicted peak."
    return [Table(title="Memory", columns=("term", "MiB"), rows=rows, note=note)]


def _mebibytes(value: object) -> object:
    return round(value / 2**20, 1) if isinstance(value, int | float) else value


def _trackers(record: Mapping[str, Any]) -> list[Section]:
    told = record.get("trackers", {})
    rows = [(name, found["last_step"], found["failure"] or "none") for name, found in told.items()]
    return [Table(title="Trackers", columns=("tracker", "last step", "failure"), rows=rows)] if rows else []


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}" if isinstance(fields, Mapping) else section: value
        for section, fields in config.items()
        for name, value in (fields.items() if isinstance(fields, Mapping) else [("", fields)])
    }


def _given(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None and value != ""}
