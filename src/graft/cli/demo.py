"""`graft demo`: full, LoRA and QLoRA on the built-in base and task, compared, merged, shown on a page."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer

from graft.cli import answer
from graft.errors import StopRequested, StorageError, TrainingError

METHODS = ("full", "lora", "qlora")
SHOWN = 4
"""Examples shown before and after."""


@dataclass
class Result:
    """What one method cost and gave.

    Attributes:
        method: "full", "lora" or "qlora".
        run: Its run directory.
        trained: Numbers that were trained.
        size_bytes: Size of the result on disk.
        peak_memory_bytes: Of the training process.
        tokens_per_second: Real tokens.
        seconds: Of the whole command.
        accuracy: Share of evaluation rows answered exactly.
        answers: What it says to the evaluation rows.
    """

    method: str
    run: Path
    trained: int
    size_bytes: int
    peak_memory_bytes: int
    tokens_per_second: float
    seconds: float
    accuracy: float = 0.0
    answers: list[str] = field(default_factory=list)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seeds every run.")] = 0,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Train less, for a quick look.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Five minutes, offline, on a CPU: fine-tune three ways, compare, merge, and see before and after."""
    started = time.monotonic()
    if out.exists() and any(out.iterdir()):
        raise StorageError("is not empty", where=str(out), fix=f"rm -r {out}, or --out another")
    task = resources.files("graft") / "builtin" / "tasks" / "demo"
    with resources.as_file(task) as directory:
        report = _demo(directory, out, ["training.seed=" + str(seed), *_steps(max_steps)])
    report["seconds"] = time.monotonic() - started
    answer.success(as_json, report, _closing(out, report))


def _steps(max_steps: int | None) -> list[str]:
    return [] if max_steps is None else [f"training.max_steps={max_steps}"]


def _demo(task: Path, out: Path, settings: list[str]) -> dict[str, Any]:
    answer.note(f"Task: {(task / 'README.md').read_text(encoding='utf-8').splitlines()[2]}\n")
    prompts, wanted, before = _answers_of(task, None, None)
    results = []
    for method in METHODS:
        answer.note(f"\n=== {method} ===")
        result = _train(task, method, out / method, settings)
        result.answers = _answers_of(task, method, result.run)[2]
        result.accuracy = _accuracy(result.answers, wanted)
        results.append(result)
    answer.note("\n=== merge the QLoRA adapter ===")
    merged = _merge(out)
    base_accuracy = _accuracy(before, wanted)
    answer.note("\n" + _table(results, base_accuracy) + "\n")
    samples = list(zip(prompts, wanted, before, *(result.answers for result in results), strict=True))[:SHOWN]
    for prompt, reference, base_says, *_, qlora_says in samples:
        before_text = shorten(base_says, 100, placeholder=" ...")
        answer.note(
            f"asked:   {prompt}\nbefore:  {before_text}\nafter:   {qlora_says}\nwanted:  {reference}\n"
        )
    _write_page(out, results, base_accuracy, samples, merged)
    return {
        "metrics": {result.method: _figures(result) for result in results}
        | {"base": {"accuracy": base_accuracy}},
        "merge": merged,
        "report": str(out / "report.html"),
    }


def _train(task: Path, method: str, run: Path, settings: list[str]) -> Result:
    """Train in a process of its own, as a user would, so that its peak memory is its own."""
    command = [sys.executable, "-m", "graft.cli.main", "train", str(task / f"{method}.yaml"), "--json"]
    command += ["--method", method, "--out", str(run), *(word for s in settings for word in ("--set", s))]
    command += ["--data", str(task / "train.jsonl"), "--eval-data", str(task / "eval.jsonl")]
    started = time.monotonic()
    status, out = _in_a_child(command)
    if status == StopRequested.exit_code:
        raise StopRequested(
            f"the {method} run was stopped", fix=f"graft train --resume {run}, or start the demo again"
        )
    if status != 0:
        told = json.loads(out or b"{}").get("error", {})
        raise TrainingError(
            f"the {method} run failed: {told.get('what')}", where=str(run), fix=str(told.get("fix"))
        )
    from graft.runs import RunDirectory
    from graft.training.report import tokens_per_second

    told = json.loads(out)
    directory = RunDirectory(run)
    result = directory.adapter_path if told["adapter"] else directory.model_path
    return Result(
        method=method,
        run=run,
        trained=told["metrics"]["num_trained"],
        size_bytes=sum(path.stat().st_size for path in result.iterdir()),
        peak_memory_bytes=told["metrics"]["peak_memory_bytes"],
        tokens_per_second=tokens_per_second(directory) or 0.0,
        seconds=time.monotonic() - started,
    )


def _in_a_child(command: list[str]) -> tuple[int, bytes]:
    """Exit code and stdout of a command that is asked once to stop, and waited for, when this one is."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # In a session of its own: from the terminal a signal would reach it besides, and the second one kills.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate()
            if process.returncode != StopRequested.exit_code:
                raise
        return process.returncode, out


def _answers_of(task: Path, method: str | None, run: Path | None) -> tuple[list[str], list[str], list[str]]:
    """Prompts, wanted answers, and what the base (method None) or a run's result says."""
    from graft.cli.opening import open_model
    from graft.evaluate.generate import GenerationConfig
    from graft.evaluate.tasks import evaluate_file

    model, adapter = ("builtin", None)
    if run is not None:
        model, adapter = (str(run / "model"), None) if method == "full" else ("builtin", run / "adapter")
    opened = open_model(model, adapter)
    result = evaluate_file(
        opened.base.model,
        opened.base.tokenizer,
        task / "eval.jsonl",
        ["exact_match"],
        generation=GenerationConfig(max_new_tokens=48),
        batch_size=50,
    )
    with open(task / "eval.jsonl", encoding="utf-8") as file:
        asked = [json.loads(line)["messages"][0]["content"] for line in file]
    rows = result.predictions
    return asked, [row.reference or "" for row in rows], [row.prediction or "" for row in rows]


def _accuracy(answers: list[str], wanted: list[str]) -> float:
    return sum(a.strip() == w.strip() for a, w in zip(answers, wanted, strict=True)) / len(wanted)


def _merge(out: Path) -> dict[str, Any]:
    from graft.adapters.merge import merge

    report = merge(out / "qlora" / "adapter", out / "merged", dtype="float32")
    for note in report.notes:
        answer.note(note)
    answer.note(f"merged into the {report.folded_into} weights: {out / 'merged'}")
    return report.to_dict()


def _plain(merged: dict[str, Any]) -> dict[str, Any]:
    """Of a merge's report what fits in a line each."""
    return {name: value for name, value in merged.items() if isinstance(value, str | int | float)}


def _figures(result: Result) -> dict[str, Any]:
    figures = dataclasses.asdict(result)
    del figures["answers"], figures["run"], figures["method"]
    return figures


COLUMNS = ["method", "trained", "result", "peak memory", "tokens/s", "time", "before", "after"]


def _row(result: Result, base_accuracy: float) -> list[str]:
    return [
        result.method,
        f"{result.trained:,}",
        f"{result.size_bytes / 2**20:.2f} MiB",
        f"{result.peak_memory_bytes / 2**20:,.0f} MiB",
        f"{result.tokens_per_second:,.0f}",
        f"{result.seconds:.0f} s",
        f"{base_accuracy:.1%}",
        f"{result.accuracy:.1%}",
    ]


def _table(results: list[Result], base_accuracy: float) -> str:
    return answer.table([COLUMNS, *(_row(result, base_accuracy) for result in results)])


def _write_page(
    out: Path, results: list[Result], base_accuracy: float, samples: list[Any], merged: dict[str, Any]
) -> None:
    from graft.evaluate.report import Curves, Facts, Sample, Samples, Table, write_report
    from graft.runs import RunDirectory
    from graft.training.report import loss_series

    write_report(
        out / "report.html",
        [
            Table(
                title="Three ways", columns=COLUMNS, rows=[_row(result, base_accuracy) for result in results]
            ),
            Curves(
                title="Loss",
                series=[
                    line
                    for result in results
                    for line in loss_series(RunDirectory(result.run), result.method)
                ],
            ),
            Samples(
                title="Before and after",
                names=["base", *(result.method for result in results)],
                samples=[Sample(prompt=p, reference=w, answers=said) for p, w, *said in samples],
            ),
            Facts(title="The merged QLoRA adapter", facts=_plain(merged)),
        ],
        title="graft demo",
        subtitle="One base, one task, the same data and steps: full fine-tuning, LoRA and QLoRA",
    )


def _closing(out: Path, report: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"Done in {report['seconds']:.0f} s. Look at {report['report']}",
            "",
            "Next:",
            f"  graft chat builtin --adapter {out}/qlora/adapter --compare",
            f"  graft generate {out}/merged --prompt ...",
            "  graft train --data YOUR.jsonl --method qlora --out runs/first",
        ]
    )
