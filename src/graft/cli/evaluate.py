"""`graft evaluate`: the figures of a model on a data set, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli import answer
from graft.config import closest

if TYPE_CHECKING:
    from graft.data.config import DataConfig

FIELDS = (
    *("format", "limit", "max_length", "on_overlong", "loss_on", "chat_template", "skip_invalid"),
    *("columns", "prompt_template", "train_on_roles", "train_on_last_turn"),
)
"""Fields of the data section that act on an evaluation."""

FLAGS = {
    "model.name": "give it as MODEL: graft evaluate DIRECTORY",
    "data.train": "--data FILE",
    "data.eval": "--data FILE",
    "training.batch_size": "--batch-size N",
    "quantization": "--quantization nf4",
    "quantization.quant_type": "--quantization nf4",
    "adapter": "--adapter DIRECTORY",
}
"""What evaluate has instead of other fields of a configuration."""


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; the adapter's own base if left out.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Evaluation data: a file, a directory, hub:owner/name.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="Adapter or run directory.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Names with commas between them; the usual ones if left out.",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="data.max_length=256, data.limit and the like. May be repeated."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Most tokens of a generated answer.")
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows in one forward pass.")] = 16,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Write each row's answer here.")
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="A quant_type (nf4, int8, ...) or none; as trained if left out."),
    ] = None,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept another base than the adapter's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Measure loss, perplexity, exact match, label accuracy and more on a data set."""
    from graft.cli.opening import open_model
    from graft.errors import ConfigError
    from graft.evaluate.generate import GenerationConfig
    from graft.evaluate.kinds import check_names, measure
    from graft.evaluate.tasks import write_predictions

    if data is None:
        raise ConfigError("no evaluation data", where="--data", fix="--data FILE")
    config = read_data_fields(assignments or [], "evaluate")
    names = list(dict.fromkeys(name.strip() for name in (metrics or "").split(",") if name.strip()))
    if metrics is not None and not names:
        raise ConfigError("no metric was named", where="--metrics", fix="leave it out, or name some")
    check_names(names)
    opened = open_model(model, adapter, quantization=quantization, force_base=force_base, classifier=True)
    result = measure(
        opened.base.model,
        opened.base.tokenizer,
        data,
        names,
        data=config,
        generation=GenerationConfig(max_new_tokens=max_new_tokens),
        batch_size=batch_size,
    )
    if predictions is not None:
        write_predictions(predictions, result.predictions)
    rows = [["metric", "value"], *([name, f"{value:.4f}"] for name, value in result.metrics.items())]
    left_out = [{"where": where, "reason": reason} for where, reason in result.rejected]
    fields = {"metrics": result.metrics, "num_rows": result.num_rows, "rejected": left_out}
    text = f"{answer.table(rows)}\n{result.num_rows} rows"
    if left_out:
        text += f"; {len(left_out)} left out, the first: {left_out[0]['where']}: {left_out[0]['reason']}"
    answer.success(as_json, fields, text)


def read_data_fields(assignments: Sequence[str], verb: str) -> DataConfig:
    """The data section that --set gives a verb that evaluates.

    Args:
        assignments: "data.limit=100" and the like.
        verb: Which, for errors.
    """
    from graft.config import Settings, build, read_assignments
    from graft.data.config import DataConfig
    from graft.errors import ConfigError

    settings = Settings()
    for path, value in read_assignments(assignments).values.items():
        name = path.removeprefix("data.")
        if name.partition(".")[0] not in FIELDS:
            raise ConfigError(
                f"{verb} does not take {path!r}", where=f"--set {path}", fix=_instead(path, name)
            )
        settings.put(name, value, f"--set {path}")
    config: DataConfig = build(DataConfig, settings)
    return config


def _instead(path: str, name: str) -> str:
    near = closest(name, FIELDS)
    told = FLAGS.get(path) or (f"did you mean data.{near}?" if near else "")
    return f"{told}{'; ' if told else ''}--set takes here: {', '.join(f'data.{field}' for field in FIELDS)}"
