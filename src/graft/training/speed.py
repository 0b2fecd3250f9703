"""How fast a run was, from its log of timings: tokens a second, the share of the machine's rate."""

from __future__ import annotations

from typing import Any

from graft.runs import RunDirectory, read_lines
from graft.training.flops import ProductRate


def speed_of(run: RunDirectory, rate: ProductRate) -> dict[str, Any]:
    """What run.json says of a run's speed; its first step, which warms up, is left out where there are more.

    Args:
        run: The run.
        rate: What the machine does in products.
    """
    # Steps that a kill undid were made again: their last line counts.
    by_step = {line["step"]: line for line in read_lines(run.timings_path)}
    lines = [by_step[step] for step in sorted(by_step)]
    lines = lines[1:] or lines
    seconds = sum(line["seconds"] for line in lines)
    rows, inner, outer = rate.shape
    told: dict[str, Any] = {
        "product_flops_per_second": round(rate.flops_per_second),
        "product": f"({rows}, {inner}) x ({inner}, {outer}) in {str(rate.dtype).removeprefix('torch.')}",
    }
    if seconds and all("flops_per_second" in line for line in lines):
        flops = sum(line["flops_per_second"] * line["seconds"] for line in lines)
        shares = sum(line["achieved"] * line["seconds"] for line in lines)
        told |= {
            "flops_per_second": round(flops / seconds),
            "achieved": round(shares / seconds, 4),
            "tokens_per_second": round(sum(line["num_tokens"] for line in lines) / seconds, 1),
            "padded_tokens_per_second": round(sum(line["num_padded_tokens"] for line in lines) / seconds, 1),
        }
    return told
