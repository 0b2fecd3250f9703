"""Composed adapters against the formulas on dense deltas, which are computed here from the files alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import graft.models.load as models
from graft.adapters import deltas, sparsify
from graft.adapters.adalora import AdaLoraConfig
from graft.adapters.attach import attach
from graft.adapters.attached import adapter_modules, adapter_tensors, fixed_tensors, trained_tensors
from graft.adapters.compose import ComposeReport, compose
from graft.adapters.composition import OPERATIONS, ComposeConfig
from graft.adapters.dora import DoraConfig
from graft.adapters.ia3 import Ia3Config
from graft.adapters.initializers import generator_for
from graft.adapters.loha import LohaConfig
from graft.adapters.lokr import LokrConfig
from graft.adapters.lora import LoraConfig
from graft.adapters.lora_fa import LoraFaConfig
from graft.adapters.oft import OftConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.truncate import spectrum
from graft.adapters.vera import VeraConfig
from graft.errors import AdapterError, ConfigError, FingerprintError, StorageError

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))

EXACT = 1e-6
"""Relative: what is written is float32."""

Deltas = dict[str, np.ndarray]


def write(directory: Path, config: Any, out: Path, seed: int, **facts: Any) -> Path:
    """Save an adapter whose tensors are random."""
    base = models.load(directory)
    attach(base.model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in trained_tensors(base.model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        for tensor in fixed_tensors(base.model).values():  # the file tells them, not the seed
            tensor.mul_(-1.5)
    return save_adapter(base.model, out, facts=facts)


def read_deltas(directory: Path) -> Deltas:
    """Delta W = scaling * B A of every layer of a LoRA in PEFT's files, in float64."""
    told = json.loads((directory / "adapter_config.json").read_text())
    assert told["peft_type"] == "LORA"
    assert not told["use_dora"]
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("base_model.model.")
        if ".lora_A" not in key and ".lora_embedding_A" not in key:
            continue
        path = key.partition(".lora_")[0]
        up = tensors[name.replace("_A", "_B")]
        rank = told["rank_pattern"].get(path, told["r"])
        alpha = told["alpha_pattern"].get(path, told["lora_alpha"])
        assert len(tensor) == rank == up.shape[1]
        scaling = alpha / (math.sqrt(rank) if told["use_rslora"] else rank)
        found[path] = scaling * up.double().numpy() @ tensor.double().numpy()
    return found


def same(found: Deltas, wanted: Deltas, tolerance: float = EXACT) -> None:
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        gap = np.linalg.norm(found[path] - delta) / np.linalg.norm(delta)
        assert gap <= tolerance, (path, gap)


def summed(parts: list[Deltas], weights: list[float]) -> Deltas:
    total: Deltas = {}
    for part, weight in zip(parts, weights, strict=True):
        for path, delta in part.items():
            total[path] = total.get(path, 0.0) + weight * delta
    return total


@pytest.fixture(scope="module")
def pair(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of different ranks, alphas, scalings and targets."""
    out = tmp_path_factory.mktemp("pair")
    one = LoraConfig(rank=4, alpha=10, target_modules=("q_proj", "down_proj", "embed_tokens"))
    pattern = {"rank_pattern": ("layers.1.*=3",), "alpha_pattern": ("down_proj=5",)}
    other = LoraConfig(rank=6, alpha=7, use_rslora=True, target_modules=("down_proj", "v_proj"), **pattern)
    facts = {"format": "prompt", "chat_template": None}
    write(tiny_dir("llama"), one, out / "one", 1, **facts, steps=3)
    write(tiny_dir("llama"), other, out / "two", 2, **facts, steps=5)
    return [out / "one", out / "two"]


@pytest.fixture(scope="module")
def wanted(pair: list[Path]) -> list[Deltas]:
    return [read_deltas(path) for path in pair]


WEIGHTED = [(0.7, 0.3), (1.0, 1.0), (-0.4, 2.5)]


@pytest.mark.parametrize("weights", WEIGHTED)
def test_cat_is_the_weighted_sum_and_ranks_add_up(
    pair: list[Path], wanted: list[Deltas], weights: tuple[float, float], tmp_path: Path
) -> None:
    report = compose(pair, ComposeConfig(operation="cat", weights=weights), tmp_path / "c")
    same(read_deltas(tmp_path / "c"), summed(wanted, list(weights)))
    ranks = {layer.path: layer.rank for layer in report.layers}
    before = {layer.path: layer.ranks_before for layer in report.layers}
    for path, rank in ranks.items():
        assert rank == sum(r for r in before[path] if r is not None)
    assert ranks["model.embed_tokens"] == 4
    assert ranks["model.layers.0.mlp.down_proj"] == 10
    assert ranks["model.layers.1.mlp.down_proj"] == 7
    assert before["model.layers.1.self_attn.v_proj"] == (None, 3)
    assert report.error < EXACT
    told = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert not told["use_rslora"]
    assert told["r"] == told["lora_alpha"]
    assert told["rank_pattern"] == told["alpha_pattern"]


SIMPLE: dict[str, tuple[ComposeConfig, tuple[int, ...], list[float]]] = {
    "add": (ComposeConfig(operation="add"), (0, 1), [1, 1]),
    "subtract": (ComposeConfig(operation="subtract"), (1, 0), [1, -1]),
    "subtract of three": (ComposeConfig(operation="subtract"), (0, 1, 1), [1, -1, -1]),
    "negate": (ComposeConfig(operation="negate"), (1,), [-1]),
    "scale": (ComposeConfig(operation="scale", weights=(0.3,)), (0,), [0.3]),
    "svd that keeps all": (ComposeConfig(operation="svd", weights=(1, 2), energy=1.0), (0, 1), [1, 2]),
    "resize that keeps all": (ComposeConfig(operation="resize", energy=1), (1,), [1]),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_arithmetic(pair: list[Path], wanted: list[Deltas], name: str, tmp_path: Path) -> None:
    config, places, weights = SIMPLE[name]
    report = compose([pair[place] for place in places], config, tmp_path / "c")
    same(read_deltas(tmp_path / "c"), summed([wanted[place] for place in places], weights))
    assert report.error < EXACT


@pytest.mark.parametrize("operation", ["svd", "add", "subtract"])
def test_a_rank_keeps_the_leading_singular_values(
    pair: list[Path], wanted: list[Deltas], operation: Any, tmp_path: Path
) -> None:
    report = compose(pair, ComposeConfig(operation=operation, rank=4), tmp_path / "c")
    total = summed(wanted, [1, -1 if operation == "subtract" else 1])
    found = read_deltas(tmp_path / "c")
    for layer in report.layers:
        values = np.linalg.svd(total[layer.path], compute_uv=False)
        norm = np.linalg.norm(values)
        lost = np.linalg.norm(found[layer.path] - total[layer.path]) / norm
        tail = np.linalg.norm(values[4:]) / norm
        assert lost == pytest.approx(tail, abs=EXACT), layer.path  # no matrix of rank 4 is nearer
        assert layer.error == pytest.approx(tail, abs=EXACT)
        assert layer.norm == pytest.approx(norm, rel=EXACT)
        assert layer.rank == min(4, int((values > 1e-9).sum()))
    whole = math.sqrt(sum(np.linalg.norm(found[path] - total[path]) ** 2 for path in total))
    assert report.error == pytest.approx(
        whole / math.sqrt(sum(np.linalg.norm(d) ** 2 for d in total.values()))
    )
    assert report.num_bytes == (tmp_path / "c" / "adapter_model.safetensors").stat().st_size
    assert report.num_bytes < report.bytes_before


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("operation", ["svd", "resize"])
def test_energy_is_met_by_the_smallest_rank(
    pair: list[Path], wanted: list[Deltas], energy: float, operation: Any, tmp_path: Path
) -> None:
    chosen = pair if operation == "svd" else pair[1:]
    report = compose(chosen, ComposeConfig(operation=operation, energy=energy), tmp_path / "c")
    total = summed(wanted, [1, 1]) if operation == "svd" else wanted[1]
    found = read_deltas(tmp_path / "c")
    for layer in report.layers:
        squares = np.linalg.svd(total[layer.path], compute_uv=False) ** 2
        kept = squares.cumsum() / squares.sum()
        assert kept[layer.rank - 1] >= energy - 1e-9
        assert layer.rank == 1 or kept[layer.rank - 2] < energy
        lost = np.linalg.norm(found[layer.path] - total[layer.path]) ** 2 / squares.sum()
        assert 1 - lost == pytest.approx(kept[layer.rank - 1], abs=EXACT)
    assert len({layer.rank for layer in report.layers}) > 1 or energy == 0.5


def test_ranks_of_single_layers(pair: list[Path], wanted: list[Deltas], tmp_path: Path) -> None:
    pattern = ("layers.0.mlp.down_proj=5", "v_proj=1")
    config = ComposeConfig(operation="svd", rank=2, rank_pattern=pattern)
    report = compose(pair, config, tmp_path / "c")
    ranks = {layer.path: layer.rank for layer in report.layers}
    assert ranks["model.layers.0.mlp.down_proj"] == 5
    assert ranks["model.layers.1.mlp.down_proj"] == 2
    assert ranks["model.layers.0.self_attn.v_proj"] == ranks["model.layers.1.self_attn.v_proj"] == 1
    total = summed(wanted, [1, 1])
    for path, delta in read_deltas(tmp_path / "c").items():
        left, values, right = np.linalg.svd(total[path], full_matrices=False)
        best = (left[:, : ranks[path]] * values[: ranks[path]]) @ right[: ranks[path]]
        assert np.linalg.norm(delta - best) <= EXACT * np.linalg.norm(best)
    told = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert told["rank_pattern"]["model.layers.0.mlp.down_proj"] == 5
    with pytest.raises(ConfigError, match="matches none of the"):
        compose(pair, ComposeConfig(operation="svd", rank=2, rank_pattern=("k_proj=1",)), tmp_path / "d")


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    flat = delta.ravel()
    kept = np.argsort(-np.abs(flat), kind="stable")[: int(density * flat.size)]
    out = np.zeros_like(flat)
    out[kept] = flat[kept]
    return out.reshape(delta.shape)


def elected(thin: list[np.ndarray], weights: list[float], majority: str) -> np.ndarray:
    out = np.zeros_like(thin[0])
    for place in np.ndindex(out.shape):
        values = [delta[place] for delta in thin]
        votes = sum(values) if majority == "total" else sum(np.sign(value) for value in values)
        sign = 1 if votes >= 0 else -1
        agree = [w * v for w, v in zip(weights, values, strict=True) if np.sign(v) == sign]
        out[place] = sum(agree) / max(len(agree), 1)
    return out


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties(pair: list[Path], wanted: list[Deltas], density: float, majority: Any, tmp_path: Path) -> None:
    weights = (0.7, 1.5)
    settings = {"weights": weights, "density": density, "majority": majority, "energy": 1.0}
    compose(pair, ComposeConfig(operation="ties", **settings), tmp_path / "c")
    found = read_deltas(tmp_path / "c")
    for path, delta in found.items():
        parts = [(part[path], w) for part, w in zip(wanted, weights, strict=True) if path in part]
        thin = [trimmed(part, density) for part, _ in parts]
        best = elected(thin, [w for _, w in parts], majority)
        assert np.linalg.norm(delta - best) <= EXACT * np.linalg.norm(best), path
    assert found.keys() == {*wanted[0], *wanted[1]}


def test_magnitude_pruning(pair: list[Path], wanted: list[Deltas], tmp_path: Path) -> None:
    config = ComposeConfig(operation="magnitude_prune", weights=(2, -1), density=0.3, energy=1)
    compose(pair, config, tmp_path / "c")
    thin = [{path: trimmed(delta, 0.3) for path, delta in part.items()} for part in wanted]
    same(read_deltas(tmp_path / "c"), summed(thin, [2, -1]))


@pytest.mark.parametrize("operation", ["ties", "dare_ties", "dare", "magnitude_prune"])
def test_one_adapter_of_density_one_is_what_it_was(
    pair: list[Path], wanted: list[Deltas], operation: Any, tmp_path: Path
) -> None:
    compose(pair[1], ComposeConfig(operation=operation, density=1.0, energy=1.0), tmp_path / "c")
    same(read_deltas(tmp_path / "c"), wanted[1])


@pytest.mark.parametrize("operation", ["dare", "dare_ties"])
def test_dare(pair: list[Path], wanted: list[Deltas], operation: Any, tmp_path: Path) -> None:
    weights = [0.7, 1.5]
    config = ComposeConfig(operation=operation, weights=(0.7, 1.5), density=0.4, energy=1.0, seed=9)
    compose(pair, config, tmp_path / "c")
    for path, delta in read_deltas(tmp_path / "c").items():
        thin = []
        for number, part in enumerate(wanted):
            drawn = torch.rand(delta.shape, generator=generator_for(9, f"{path} of adapter {number}"))
            if path in part:
                thin.append((np.where(drawn.numpy() < 0.4, part[path] / 0.4, 0.0), weights[number]))
        if operation == "dare":
            best = sum(one * weight for one, weight in thin)
        else:
            best = elected([one for one, _ in thin], [weight for _, weight in thin], "total")
        assert np.linalg.norm(delta - best) <= EXACT * np.linalg.norm(best), path


def test_dare_draws_by_the_seed(pair: list[Path], tmp_path: Path) -> None:
    written = []
    for number, seed in enumerate((3, 3, 4)):
        config = ComposeConfig(operation="dare", density=0.5, rank=4, seed=seed)
        compose(pair, config, tmp_path / str(number))
        written.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert written[0] != written[2]


def test_dare_is_unbiased_over_seeds() -> None:
    delta = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    density, count = 0.3, 400
    drawn = torch.stack(
        [sparsify.drop(delta, density, torch.Generator().manual_seed(seed)) for seed in range(count)]
    )
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], (delta / density).expand_as(drawn)[kept])
    # The mean of `count` draws of delta / density with probability density: its standard deviation.
    deviation = delta.abs() * math.sqrt((1 - density) / density / count)
    off = (drawn.mean(0) - delta) / deviation
    assert off.abs().max() < 5
    assert abs(float(off.mean())) < 5 / math.sqrt(delta.numel())
    assert float(off.square().mean()) == pytest.approx(1, abs=0.3)


def test_an_adapter_less_itself_is_refused(pair: list[Path], tmp_path: Path) -> None:
    compose(pair[0], "negate", tmp_path / "minus")
    for adapters, operation in (([pair[0], tmp_path / "minus"], "cat"), ([pair[0], pair[0]], "subtract")):
        with pytest.raises(AdapterError, match="nothing is left: the deltas of all 5 layers cancel out"):
            compose(adapters, operation, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_layers_that_cancel_are_left_out(pair: list[Path], wanted: list[Deltas], tmp_path: Path) -> None:
    compose(pair, "add", tmp_path / "sum")
    report = compose([tmp_path / "sum", pair[0]], "subtract", tmp_path / "c")
    assert [layer.rank for layer in report.layers if layer.path.endswith(("q_proj", "embed_tokens"))] == [
        0
    ] * 3
    assert "3 of 7 layers cancel out" in report.notes[0]
    same(read_deltas(tmp_path / "c"), wanted[1], 1e-5)
    least = compose(
        [tmp_path / "sum", pair[0]], ComposeConfig(operation="subtract", energy=1), tmp_path / "d"
    )
    ranks = {layer.path: layer.rank for layer in least.layers if layer.rank}
    assert ranks == {path: np.linalg.matrix_rank(delta, tol=1e-6) for path, delta in wanted[1].items()}


def formula(kind: str, tensors: dict[str, np.ndarray], told: dict[str, Any], path: str) -> np.ndarray:
    """Delta W of another method, from its file."""
    t = {key.removeprefix(f"base_model.model.{path}."): value for key, value in tensors.items()}
    if kind == "lora_fa":
        return told["lora_alpha"] / told["r"] * t["lora_B.weight"] @ t["lora_A.weight"]
    scaling = told.get("alpha", 1) / told["r"]
    if kind == "loha":
        return scaling * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    if kind == "lokr":
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        return scaling * np.kron(w1, w2)
    b, d = t["vera_lambda_b"], t["vera_lambda_d"]
    columns = {"q_proj": 32, "down_proj": 64}[path.rpartition(".")[2]]
    down, up = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    return (b[:, None] * up[: len(b)] * d) @ down[:, :columns]


TARGETS = ("q_proj", "down_proj")
ADDITIVE: dict[str, Any] = {
    "lora_fa": LoraFaConfig(rank=3, alpha=5, target_modules=TARGETS),
    "loha": LohaConfig(rank=2, alpha=5, target_modules=TARGETS),
    "lokr": LokrConfig(rank=2, alpha=5, target_modules=TARGETS),
    "vera": VeraConfig(rank=6, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", ADDITIVE)
@pytest.mark.parametrize("operation", ["cat", "ties"])
def test_other_additive_methods_become_a_plain_lora(
    tiny_dir: Callable[..., Path],
    pair: list[Path],
    wanted: list[Deltas],
    kind: str,
    operation: Any,
    tmp_path: Path,
) -> None:
    write(tiny_dir("llama"), ADDITIVE[kind], tmp_path / kind, 5)
    raw = load_file(tmp_path / kind / "adapter_model.safetensors")
    tensors = {key: value.double().numpy() for key, value in raw.items()}
    told = json.loads((tmp_path / kind / "adapter_config.json").read_text())
    paths = {
        key.removeprefix("base_model.model.").partition(f".{mark}")[0]
        for key in tensors
        for mark in ("lora_", "hada_", "lokr_", "vera_lambda")
        if f".{mark}" in key
    }
    theirs = {path: formula(kind, tensors, told, path) for path in paths}
    settings = {"density": 1.0, "energy": 1.0} if operation == "ties" else {}
    report = compose(
        [pair[0], tmp_path / kind], ComposeConfig(operation=operation, **settings), tmp_path / "c"
    )
    if operation == "cat":
        total = summed([wanted[0], theirs], [1, 1])
    else:
        both = [{**{path: 0 * d for path, d in theirs.items()}, **wanted[0]}, theirs]
        total = {
            path: elected(
                [part[path] for part in both if path in part], [1, 1][: 1 + (path in theirs)], "total"
            )
            for path in both[0]
        }
    same(read_deltas(tmp_path / "c"), total)
    assert report.parents[1]["method"] == kind
    assert len(theirs) == 4


@pytest.mark.parametrize(
    "config", [DoraConfig(rank=2), Ia3Config(feedforward_modules=("down_proj",)), OftConfig(block_size=8)]
)
def test_methods_that_do_not_add_up_are_refused_by_name(
    tiny_dir: Callable[..., Path], pair: list[Path], config: Any, tmp_path: Path
) -> None:
    write(tiny_dir("llama"), config, tmp_path / "a", 5)
    with pytest.raises(AdapterError, match=f"it is {config.method}: ") as caught:
        compose([pair[0], tmp_path / "a"], "cat", tmp_path / "c")
    assert caught.value.where == str(tmp_path / "a")
    assert not (tmp_path / "c").exists()


def test_modules_trained_in_full(tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path) -> None:
    config = LoraConfig(rank=4, target_modules=("q_proj",), modules_to_save=("norm", "lm_head"))
    write(tiny_dir("llama"), config, tmp_path / "a", 5)
    with pytest.raises(AdapterError, match=re.escape("it trains model.norm, lm_head in full; cat")):
        compose([pair[0], tmp_path / "a"], "cat", tmp_path / "c")
    with pytest.raises(AdapterError, match="negate is not defined on modules"):
        compose(tmp_path / "a", "negate", tmp_path / "c")
    compose(tmp_path / "a", ComposeConfig(operation="resize", energy=1), tmp_path / "c")
    logits = []
    for name in ("a", "c"):
        base = models.load(tiny_dir("llama"))
        load_adapter(base.model, tmp_path / name)
        with torch.no_grad():
            logits.append(base.model(IDS).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    compose(tmp_path / "a", ComposeConfig(operation="resize", rank=1), tmp_path / "d")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ad")
    for key in ("base_model.model.model.norm.weight", "base_model.model.lm_head.weight"):
        assert torch.equal(one[key], other[key])
    whole = LoraConfig(target_modules=(), modules_to_save=("norm",))
    write(tiny_dir("llama"), whole, tmp_path / "e", 5)
    with pytest.raises(AdapterError, match="it adapts no layer"):
        compose(tmp_path / "e", ComposeConfig(operation="resize", rank=1), tmp_path / "f")


def test_adapters_of_different_bases(tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_dir("llama"), other)
    base = models.load(other)
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1
    base.model.save_pretrained(other)
    write(other, LoraConfig(rank=2), tmp_path / "a", 5)
    with pytest.raises(FingerprintError, match="one belongs to base .*, a to .*: weights differ"):
        compose([pair[0], tmp_path / "a"], "cat", tmp_path / "c")
    report = compose([pair[0], tmp_path / "a"], "cat", tmp_path / "c", force_base=True)
    assert report.forced_base
    assert "composed by force" in report.notes[0]
    assert json.loads((tmp_path / "c" / "graft.json").read_text())["forced_base"] is True


def test_a_quantized_and_a_dense_parent(
    tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path
) -> None:
    base = models.load(tiny_dir("llama"), quantization="nf4")
    attach(base.model, LoraConfig(rank=2))
    with torch.no_grad():
        for tensor in trained_tensors(base.model).values():
            tensor.add_(0.1)
    save_adapter(base.model, tmp_path / "a")
    report = compose([pair[0], tmp_path / "a"], "cat", tmp_path / "c")
    assert "nf4" in report.notes[0]
    assert "the dense base" in report.notes[0]
    side = json.loads((tmp_path / "c" / "graft.json").read_text())
    assert side["base"]["quantization"] == ""
    assert not side["forced_base"]


def test_adapters_of_other_tools(tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path) -> None:
    for number, parent in enumerate(pair):
        shutil.copytree(parent, tmp_path / str(number))
        (tmp_path / str(number) / "graft.json").unlink()
    report = compose([tmp_path / "0", pair[1]], "cat", tmp_path / "mixed")
    assert "0 has no graft.json" in report.notes[0]
    base = models.load(tiny_dir("llama"))
    assert load_adapter(base.model, tmp_path / "mixed").notes == []
    report = compose([tmp_path / "0", tmp_path / "1"], "cat", tmp_path / "unknown")
    assert len(report.notes) == 2
    again = load_adapter(models.load(tiny_dir("llama")).model, tmp_path / "unknown")
    assert "do not say which base they belong to" in again.notes[0]
    settings = tmp_path / "0" / "adapter_config.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps({**told, "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="does not say which base it belongs to") as caught:
        compose([tmp_path / "0", tmp_path / "1"], "cat", tmp_path / "no")
    assert "--base" in caught.value.fix
    compose([tmp_path / "0", tmp_path / "1"], "cat", tmp_path / "yes", base=tiny_dir("llama"))
    written = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("yes", "unknown")]
    assert written[0] == written[1]


def test_only_the_config_of_the_base_is_read(
    tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    shutil.copy(tiny_dir("llama") / "config.json", tmp_path / "base")
    compose(pair, "cat", tmp_path / "a", base=tmp_path / "base")
    compose(pair, "cat", tmp_path / "b")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_no_dense_delta_is_made_where_factors_do(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a dense delta was made")

    monkeypatch.setattr(deltas, "dense", never)
    monkeypatch.setattr("graft.adapters.compose.dense", never)
    monkeypatch.setattr("graft.adapters.truncate._of_wide", never)
    for number, (operation, more) in enumerate(
        [("cat", {}), ("svd", {"rank": 3}), ("svd", {"energy": 0.9}), ("subtract", {"rank": 2})]
    ):
        compose(pair, ComposeConfig(operation=operation, **more), tmp_path / str(number))
    with pytest.raises(AssertionError, match="a dense delta"):
        compose(pair, ComposeConfig(operation="ties", density=0.5, rank=2), tmp_path / "ties")


def test_lineage_facts_and_progress(pair: list[Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = ComposeConfig(operation="ties", weights=(0.5, 2), density=0.5, rank=3)
    compose(pair, config, tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 7) for done in range(1, 8)]
    side = json.loads((tmp_path / "c" / "graft.json").read_text())
    composed = side["facts"]["composed"]
    assert side["facts"].keys() == {"format", "chat_template", "composed"}
    assert composed["operation"] == "ties"
    assert composed["weights"] == [0.5, 2]
    assert (composed["density"], composed["rank"]) == (0.5, 3)
    for parent, told in zip(pair, composed["parents"], strict=True):
        own = json.loads((parent / "graft.json").read_text())
        assert told["tensors"] == own["tensors"]
        assert told["settings"] == own["settings"]
        assert told["facts"] == own["facts"]
    compose(tmp_path / "c", "negate", tmp_path / "d")
    again = json.loads((tmp_path / "d" / "graft.json").read_text())["facts"]["composed"]
    assert again["parents"][0]["facts"]["composed"] == composed  # of the parents' parents too


def test_prompts_that_were_taught_differently_are_told(
    tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path
) -> None:
    write(tiny_dir("llama"), LoraConfig(rank=2), tmp_path / "a", 5, format="messages", chat_template=None)
    report = compose([pair[0], tmp_path / "a"], "cat", tmp_path / "c")
    assert report.notes == ("the adapters were trained with different formats; none is kept",)
    side = json.loads((tmp_path / "c" / "graft.json").read_text())
    assert side["facts"].keys() == {"chat_template", "composed"}


def edit(directory: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(directory, out)
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


KEY = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"


def test_damaged_parents_leave_nothing_behind(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "c"
    changed = edit(pair[1], tmp_path / "changed", lambda t: t[KEY].mul_(2))
    with pytest.raises(AdapterError, match="changed after the adapter was saved"):
        compose([pair[0], changed], "cat", out)
    (changed / "graft.json").unlink()
    compose([pair[0], changed], "cat", tmp_path / "fine")
    broken = edit(pair[1], tmp_path / "nan", lambda t: t[KEY].mul_(math.nan))
    (broken / "graft.json").unlink()
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        compose([pair[0], broken], "cat", out)
    assert KEY in caught.value.where
    lacking = edit(pair[1], tmp_path / "lacking", lambda t: t.pop(KEY))
    with pytest.raises(AdapterError, match="1 of 8 tensors are missing"):
        compose([pair[0], lacking], "cat", out)
    with pytest.raises(AdapterError, match="cannot be read"):
        compose([pair[0], tmp_path / "nowhere"], "cat", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".c*"))
    with pytest.raises(StorageError, match="already exists"):
        compose(pair, "cat", tmp_path / "fine")


def test_a_base_that_they_do_not_fit(tiny_dir: Callable[..., Path], pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="the shape is"):
        compose(pair, "cat", tmp_path / "c", base=tiny_dir("llama", intermediate_size=48))


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_other_layouts(tiny_dir: Callable[..., Path], family: str, tmp_path: Path) -> None:
    targets = {"gpt2": ("c_attn", "c_fc"), "gemma3_text": ("embed_tokens", "o_proj")}[family]
    directory = tiny_dir(family)
    for number, rank in enumerate((2, 3)):
        write(directory, LoraConfig(rank=rank, alpha=5, target_modules=targets), tmp_path / str(number), rank)
    parts = [tmp_path / "0", tmp_path / "1"]
    compose(parts, ComposeConfig(operation="cat", weights=(0.5, 2)), tmp_path / "c")
    same(read_deltas(tmp_path / "c"), summed([read_deltas(part) for part in parts], [0.5, 2]))
    told = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert sorted(told["target_modules"]) == sorted(targets)
    assert told["fan_in_fan_out"] is (family == "gpt2")
    load_adapter(models.load(directory).model, tmp_path / "c")


def test_decompositions_of_matrices_tall_and_wide() -> None:
    generator = torch.Generator().manual_seed(2)
    for shape in ((30, 12), (12, 30), (9, 9)):
        matrix = torch.randn(shape, dtype=torch.float64, generator=generator)
        matrix[-2:] = matrix[:2]  # of a smaller rank
        found = spectrum(matrix, float(matrix.norm()))
        values = torch.linalg.svdvals(matrix)
        number = int((values > 1e-9).sum())
        torch.testing.assert_close(found.values, values[:number])
        whole = found.truncated(number)
        torch.testing.assert_close(whole.up @ whole.down, matrix)
        gap = float((matrix - deltas.dense(found.truncated(3))).norm())
        assert gap == pytest.approx(float(values[3:].norm()))


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"operation": "linear"}, "'linear' is not an operation", "PEFT's linear is cat here"),
    ({"operation": "tie"}, "'tie' is not an operation", "did you mean 'ties'?"),
    ({"operation": "cat", "rank": 4}, "cat keeps every rank", "svd is a weighted sum"),
    ({"operation": "svd"}, "svd needs the rank", "--energy 0.95"),
    ({"operation": "ties", "density": 0.5}, "ties needs the rank", "--rank 16"),
    ({"operation": "ties", "rank": 4}, "density None", "share of numbers"),
    ({"operation": "ties", "rank": 4, "density": 0.0}, "density 0.0", "share of numbers"),
    ({"operation": "ties", "rank": 4, "density": 1.5}, "density 1.5", "share of numbers"),
    ({"operation": "svd", "rank": 4, "density": 0.5}, "density cannot act on svd", "it is for ties"),
    ({"operation": "svd", "rank": 4, "energy": 0.5}, "rank and energy both", "one of the two"),
    ({"operation": "svd", "rank": 0}, "rank 0 is not", "8 to 64"),
    ({"operation": "svd", "energy": 1.1}, "energy 1.1", "0.95"),
    ({"operation": "svd", "energy": 0}, "energy 0", "0.95"),
    ({"operation": "cat", "weights": (1.0, math.nan)}, "weight nan", "0.5"),
    ({"operation": "cat", "weights": (1.0, 0.0)}, "weight 0 takes no part", "leave that adapter out"),
    ({"operation": "add", "weights": (1.0, 2.0)}, "add takes no weights", "cat and svd"),
    ({"operation": "scale"}, "scale needs a weight", "--weights"),
    ({"operation": "cat", "seed": 3}, "seed cannot act on cat", "dare"),
    ({"operation": "dare", "rank": 2, "density": 0.5, "seed": 0.5}, "seed 0.5", "such as 0"),
    ({"operation": "dare", "rank": 2, "density": 0.5, "majority": "total"}, "majority cannot act", "ties"),
    ({"operation": "ties", "rank": 2, "density": 0.5, "majority": "most"}, "majority 'most'", "frequency"),
    ({"operation": "cat", "rank_pattern": ("q_proj=2",)}, "rank_pattern cannot act", "give rank too"),
    ({"operation": "svd", "rank": 2, "rank_pattern": ("q_proj",)}, "is not regex=number", "q_proj=16"),
    ({"operation": "svd", "ranks": 2}, "takes no ranks=2", "did you mean 'rank'?"),
]


@pytest.mark.parametrize(("fields", "what", "fix"), BAD)
def test_settings_that_cannot_be(fields: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(what)) as caught:
        ComposeConfig(**fields)
    assert fix in caught.value.fix
    assert caught.value.where


def test_as_many_adapters_as_the_operation_takes(pair: list[Path], tmp_path: Path) -> None:
    cases: list[tuple[list[Path], Any, str]] = [
        (pair, ComposeConfig(operation="negate"), "negate takes one adapter, 2 were given"),
        (pair, ComposeConfig(operation="resize", rank=2), "resize takes one adapter"),
        (pair[:1], ComposeConfig(operation="subtract"), "subtract has nothing to work on"),
        ([], ComposeConfig(operation="cat"), "cat has nothing to work on"),
        (pair, ComposeConfig(operation="cat", weights=(1.0,)), "1 weights for 2 adapters"),
    ]
    for adapters, config, what in cases:
        with pytest.raises(ConfigError, match=what):
            compose(adapters, config, tmp_path / "c")


def test_every_operation_was_tried(pair: list[Path], tmp_path: Path) -> None:
    """Each one writes an adapter that loads, with a report that says JSON."""
    needs: dict[str, dict[str, Any]] = {
        "svd": {"rank": 2},
        "resize": {"rank": 2},
        "scale": {"weights": (2.0,)},
        **{name: {"rank": 2, "density": 0.5} for name in ("ties", "dare", "dare_ties", "magnitude_prune")},
    }
    for operation in OPERATIONS:
        chosen = pair[:1] if operation in ("negate", "scale", "resize") else pair
        config: Any = ComposeConfig(operation=operation, **needs.get(operation, {}))  # type: ignore[arg-type]
        report: ComposeReport = compose(chosen, config, tmp_path / operation)
        assert json.loads(json.dumps(report.to_dict()))["operation"] == operation
        assert report.num_parameters == sum(
            t.numel() for t in load_file(tmp_path / operation / "adapter_model.safetensors").values()
        )


@pytest.mark.parametrize("field", ["bias", "lora_bias", "trainable_token_indices"])
def test_what_is_no_delta_of_a_weight_is_refused(
    field: str, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    value: Any = {"bias": "all", "lora_bias": True, "trainable_token_indices": (3, 4)}[field]
    base = models.load(tiny_dir("gpt2"))
    attach(base.model, LoraConfig(rank=2, target_modules=("c_fc",), **{field: value}))
    for tensor in adapter_tensors(base.model).values():
        torch.nn.init.normal_(tensor)
    save_adapter(base.model, tmp_path / "one")
    with pytest.raises(AdapterError, match=f"more than deltas of weights: {field} is"):
        compose([tmp_path / "one"], ComposeConfig(operation="negate"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adalora_is_composed_at_the_ranks_that_are_left(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = models.load(tiny_dir("llama"))
    attach(base.model, AdaLoraConfig(target_modules=("q_proj",), rank=4, target_rank=2))
    layers = [module.adapters["default"] for module in adapter_modules(base.model).values()]
    with torch.no_grad():
        for layer in layers:
            for tensor in layer.tensors().values():
                tensor.normal_()
            layer.lora_E[1] = 0
    wanted = [
        module.adapters["default"].merged_weight(module.base, torch.zeros_like(module.base.dense_weight()))
        for module in adapter_modules(base.model).values()
    ]
    save_adapter(base.model, tmp_path / "one")
    compose([tmp_path / "one"], ComposeConfig(operation="scale", weights=(2.0,)), tmp_path / "out")
    fresh = models.load(tiny_dir("llama"))
    load_adapter(fresh.model, tmp_path / "out")
    for module, delta in zip(adapter_modules(fresh.model).values(), wanted, strict=True):
        found = module.adapters[next(iter(module.adapters))].merged_weight(
            module.base, torch.zeros_like(module.base.dense_weight())
        )
        torch.testing.assert_close(found, 2 * delta, rtol=1e-5, atol=1e-5)
