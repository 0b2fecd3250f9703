"""Draws the pretraining curve as SVG from the metrics of the run; needs nothing but Python."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 320, 48, 40, 16, 12


def thin(records: list[Record], every: int = 25) -> list[Record]:
    """Mean loss of each `every` steps, and every evaluation.

    Args:
        records: Lines of a run's metrics.jsonl.
        every: Steps averaged into one record.
    """
    kept: list[Record] = []
    losses: list[float] = []
    for record in records:
        if "eval_loss" in record:
            kept.append({"step": record["step"], "eval_loss": round(record["eval_loss"], 4)})
        elif record.get("loss") is not None:
            losses.append(record["loss"])
            if record["step"] % every == 0:
                mean = sum(losses) / len(losses)
                kept.append(
                    {"step": record["step"], "loss": round(mean, 4), "num_tokens": record["num_tokens"]}
                )
                losses = []
    return kept


def joined(runs: list[list[Record]]) -> list[Record]:
    """The records of runs that went on from each other, thinned and counted through.

    Args:
        runs: Lines of each run's metrics.jsonl.
    """
    kept: list[Record] = []
    steps = tokens = 0
    for records in runs:
        for record in thin(records):
            counted = {"num_tokens": record["num_tokens"] + tokens} if "num_tokens" in record else {}
            kept.append(record | {"step": record["step"] + steps} | counted)
        steps += max(record["step"] for record in records)
        tokens += max(record.get("num_tokens", 0) for record in records)
    return kept


def draw(records: list[Record]) -> str:
    """An SVG page with the training loss as a line and the held-out loss as dots, over steps.

    Args:
        records: What `thin` returned.
    """
    train = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    last = max(step for step, _ in train + held_out)
    top = max(loss for _, loss in train + held_out)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * loss / top

    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in train)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in range(int(top) + 1):
        parts.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    for quarter in range(5):
        step = last * quarter // 4
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{step:,}</text>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>')
    parts += [
        f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3.5" fill="#c0392b"/>' for step, loss in held_out
    ]
    parts.append(
        f'<text x="{WIDTH // 2}" y="{HEIGHT - 5}" text-anchor="middle">step; line: training loss '
        "(nats a token), dots: loss of answers to held-out exercises</text></svg>"
    )
    return "\n".join(parts) + "\n"
