"""The pretraining curve: averaged, counted through over several runs, drawn as a page that parses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from xml.etree import ElementTree

Script = Callable[[str], ModuleType]


def run(num_steps: int) -> list[dict[str, float]]:
    """Metrics of a run whose loss is its step number."""
    steps = [{"step": n, "loss": float(n), "num_tokens": 10 * n} for n in range(1, num_steps + 1)]
    return [*steps, {"step": num_steps, "eval_loss": 2.5, "best": True}]


def test_losses_are_averaged(script: Script) -> None:
    first, second, held_out = script("curve").thin(run(20), every=10)
    assert first == {"step": 10, "loss": sum(range(1, 11)) / 10, "num_tokens": 100}
    assert second["loss"] == sum(range(11, 21)) / 10
    assert held_out == {"step": 20, "eval_loss": 2.5}


def test_runs_are_counted_through(script: Script) -> None:
    kept = script("curve").joined([run(25), run(50)])
    assert [record["step"] for record in kept] == [25, 25, 50, 75, 75]
    assert [record["num_tokens"] for record in kept if "num_tokens" in record] == [250, 500, 750]


def test_the_drawing_parses(script: Script) -> None:
    kept = script("curve").joined([run(100)])
    page = ElementTree.fromstring(script("curve").draw(kept))
    assert len(page.findall("{*}circle")) == 1
    assert len(page.find("{*}polyline").get("points").split()) == 4
