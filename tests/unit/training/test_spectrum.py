"""Spectra of updates: against the SVD of the product itself, and the log that a resumed run writes again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.adapters.attach import attach
from graft.adapters.lora import LoraConfig
from graft.adapters.spectrum import effective_rank, singular_values, triangles
from graft.config import build, read_assignments
from graft.errors import ConfigError
from graft.models.load import load
from graft.runs import read_lines
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.spectra import interval
from graft.training.spectrum import measure, updates, weight_norms


@pytest.mark.parametrize(("rank", "inner", "outer"), [(4, 30, 20), (8, 8, 50), (16, 10, 6), (1, 5, 5)])
def test_values_are_those_of_the_product(rank: int, inner: int, outer: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(3, rank, inner, generator=generator)
    up = torch.randn(3, outer, rank, generator=generator)
    wanted = torch.linalg.svdvals(up.double() @ down.double())
    found = singular_values(*triangles(down, up))
    kept = min(rank, inner, outer)
    assert found.shape == (3, kept)
    torch.testing.assert_close(found, wanted[:, :kept], rtol=1e-9, atol=1e-12)
    assert float(wanted[:, kept:].abs().max() if wanted.shape[-1] > kept else 0) < 1e-12
    for triangle, factor in zip(triangles(down, up), (down, up), strict=True):
        torch.testing.assert_close(triangle.norm(), factor.double().norm(), rtol=1e-12, atol=0)


def test_values_of_an_update_that_is_nearly_singular() -> None:
    """Directions that differ by ten each: every digit that is written is right, down to 1e-9 of the first."""
    generator = torch.Generator().manual_seed(0)
    up = torch.linalg.qr(torch.randn(60, 6, generator=generator, dtype=torch.float64)).Q
    up *= torch.tensor([1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-9], dtype=torch.float64)
    down = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    wanted = torch.linalg.svdvals(up @ down)[:6]
    torch.testing.assert_close(singular_values(*triangles(down, up)), wanted, rtol=1e-6, atol=0)


def test_effective_rank_counts_directions() -> None:
    assert effective_rank([2.0] * 7) == pytest.approx(7)
    assert effective_rank([3.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) is None
    shares = [0.5, 0.25, 0.25]
    assert effective_rank(shares) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_every_layer_is_measured_against_its_own_weight(
    tiny_dir: Callable[..., Path], family: str, quantization: str | None
) -> None:
    base = load(str(tiny_dir(family)), quantization=quantization)
    made = attach(base.model, LoraConfig(rank=4, alpha=12, target_modules="all-linear"), seed=0)
    found = updates(base.model, made.name)
    assert sorted(found) == sorted(made.targets)
    generator = torch.Generator().manual_seed(1)
    for update in found.values():
        update.up.normal_(generator=generator)
    measured = measure(found, weight_norms(base.model, list(found)))
    for path, update in found.items():
        module = base.model.get_submodule(path)
        weight = module.base.dense_weight(torch.float64)
        product = 3.0 * update.up.double() @ update.down.double()
        figures = measured[path]
        assert figures["singular_values"] == pytest.approx(
            torch.linalg.svdvals(product)[:4].tolist(), rel=1e-5
        )
        assert figures["update_ratio"] == pytest.approx(float(product.norm() / weight.norm()), rel=1e-5)
        assert figures["balance"] == pytest.approx(float(update.down.norm() / update.up.norm()), rel=1e-5)


def test_updates_that_are_zero_or_not_finite_have_no_rank(tiny_dir: Callable[..., Path]) -> None:
    base = load(str(tiny_dir("llama")))
    made = attach(base.model, LoraConfig(rank=2, target_modules="all-linear"), seed=0)
    found = updates(base.model, made.name)
    first, second = list(found)[:2]
    found[second].up[0, 0] = math.nan
    measured = measure(found, weight_norms(base.model, list(found)))
    assert measured[first] == {
        "singular_values": [0.0, 0.0],
        "effective_rank": None,
        "update_ratio": 0.0,
        "balance": None,
    }
    assert set(measured[second].values()) == {None}


@pytest.mark.parametrize(
    ("asked", "steps", "every"), [(None, 1000, 100), (None, 12, 20), (7, 1000, 7), (0, 9, 0)]
)
def test_how_often(asked: int | None, steps: int, every: int) -> None:
    assert interval(asked, steps) == every


@pytest.fixture
def config(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(name: str, *more: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / name}"]
        words += ["data.max_length=64", "adapter.rank=4", "training.batch_size=2", "training.max_steps=7"]
        return build(RunConfig, read_assignments([*words, "training.learning_rate=1e-2", *more]))

    return make


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "spectra.jsonl")]


def test_the_log_is_the_same_after_a_kill(config: Callable[..., RunConfig]) -> None:
    """A checkpoint in the middle, then lines that the killed process wrote: they are cut and made again."""
    more = ("training.spectrum_steps=2", "training.save_steps=3", "training.keep_checkpoints=9")
    straight = run_from_config(config("straight", *more)).directory
    killed = run_from_config(config("killed", *more)).directory
    assert steps_of(straight) == [2, 4, 6, 7]
    for step in (6, 7):
        for file in (killed / "checkpoints" / f"step-{step:06d}").iterdir():
            file.unlink()
        (killed / "checkpoints" / f"step-{step:06d}").rmdir()
    record = json.loads((killed / "run.json").read_text())
    (killed / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with open(killed / "spectra.jsonl", "a") as file:
        file.write('{"step": 8, "layers": {')
    resume(killed)
    assert (killed / "spectra.jsonl").read_bytes() == (straight / "spectra.jsonl").read_bytes()


def test_a_run_that_stops_early_ends_with_its_spectra(config: Callable[..., RunConfig], rows: Path) -> None:
    more = (f"data.eval={rows}", "training.eval_steps=1", "training.early_stopping_patience=1")
    bad = ("training.early_stopping_min_delta=9", "training.spectrum_steps=5", "training.max_steps=20")
    run = run_from_config(config("early", *more, *bad)).directory
    assert steps_of(run) == [2]


def test_spectra_without_an_adapter_are_refused(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="spectrum_steps = 3 without an adapter"):
        config("full", "adapter=", "training.spectrum_steps=3")
    run = run_from_config(config("full", "adapter=", "training.max_steps=2")).directory
    assert not (run / "spectra.jsonl").exists()


def test_the_adapter_is_the_same_with_and_without(config: Callable[..., RunConfig]) -> None:
    runs = [run_from_config(config(f"s{n}", f"training.spectrum_steps={n}")).directory for n in (0, 1)]
    names = ("metrics.jsonl", "adapter/adapter_model.safetensors")
    for name in names:
        assert len({(run / name).read_bytes() for run in runs}) == 1, name
    assert not (runs[0] / "spectra.jsonl").exists()
    assert steps_of(runs[1]) == list(range(1, 8))
