"""Inspected adapters: figures beside numpy on the dense update, directions new by construction, bad files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.adapters.adapted import AdaptedLayer
from graft.adapters.attached import adapter_modules, trained_tensors
from graft.adapters.base import METHODS
from graft.adapters.inspect_groups import bands
from graft.adapters.inspect_layers import new_directions
from graft.adapters.inspect_records import LayerFacts
from graft.adapters.inspection import inspect_adapter
from graft.adapters.spectrum import energy, rank_for, stable_rank
from graft.errors import AdapterError, FingerprintError, ModelError
from graft.models.load import load

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 6, "alpha": 9, "rank_pattern": ("q_proj=3",)},
    "dora": {"rank": 4},
    "lora_fa": {"rank": 4, "use_rslora": True},
    "vera": {"rank": 5},
    "ia3": {"target_modules": ("k_proj", "v_proj", "down_proj"), "feedforward_modules": ("down_proj",)},
    "loha": {"rank": 3},
    "lokr": {"rank": 2, "decompose_both": True},
    "oft": {"block_size": 8},
    "adalora": {"rank": 4, "target_rank": 2},
    "qa_lora": {"rank": 3, "group_size": 8},
    "trainable_tokens": {"token_indices": (3, 200)},
}
UNKNOWN_WITHOUT_BASE = {"vera", "ia3", "oft", "trainable_tokens"}


def noisy(model: Any, name: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in trained_tensors(model, name).values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)


def saved(base_dir: Path, out: Path, config: Any, *, trained: bool = True) -> dict[str, tuple[Any, Any]]:
    """Write an adapter; returns W and W' - W of its layers in float64."""
    base = load(base_dir)
    graft.attach(base.model, config)
    if trained:
        noisy(base.model)
    graft.save_adapter(base.model, out, facts={"data": "abc", "steps": 7})
    found = {}
    for path, module in adapter_modules(base.model).items():
        if isinstance(module, AdaptedLayer):
            layer: Any = module.adapters["default"].double()
            weight = module.base.dense_weight().double()
            delta = layer.merged_weight(module.base, weight) - weight
            found[path] = (weight.numpy(), delta.detach().numpy())
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_figures_are_those_of_the_dense_update(
    tiny_dir: Callable[..., Path], tmp_path: Path, method: str, family: str
) -> None:
    settings = dict(SETTINGS[method])
    if family == "gpt2":
        settings.pop("rank_pattern", None)
        if method == "ia3":
            settings = {"target_modules": ("c_attn", "c_proj"), "feedforward_modules": ("c_proj",)}
    config = METHODS[method].config_class(**settings)
    expected = saved(tiny_dir(family), tmp_path / "a", config)
    found = inspect_adapter(tmp_path / "a", base=tiny_dir(family), directions=3)
    assert found.method == method
    assert found.base_checked
    assert not found.dead
    if method == "trainable_tokens":
        expected.pop("lm_head", None)  # tied: it has the embedding's rows
    assert {layer.path for layer in found.layers} == expected.keys()
    for layer in found.layers:
        weight, delta = expected[layer.path]
        assert layer.shape == weight.shape
        wanted = np.linalg.svd(delta, compute_uv=False)
        values = np.array([*layer.values, *[0.0] * len(wanted)])[: len(wanted)]  # type: ignore[misc]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6 * wanted[0])
        squares = wanted**2 / (wanted**2).sum()
        assert layer.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert layer.stable_rank == pytest.approx(1 / squares[0], rel=1e-4)
        shares = wanted / wanted.sum()
        entropy = -sum(share * math.log(share) for share in shares if share > 1e-9)
        assert layer.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
        for rank, share in layer.energy.items():
            assert share == pytest.approx(squares[:rank].sum(), rel=1e-4)
        for share, rank in layer.rank_for.items():
            assert squares[:rank].sum() >= share - 1e-6 > squares[: rank - 1].sum() - 2e-6
        assert layer.update_ratio == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight), rel=1e-5)
        if method == "trainable_tokens":  # directions of embeddings are not compared
            assert layer.cosines is None
            continue
        before = np.linalg.svd(weight, full_matrices=False)[0]
        after = np.linalg.svd(weight + delta, full_matrices=False)[0]
        cosines = np.abs(before.T @ after[:, :3]).max(0)
        np.testing.assert_allclose(layer.cosines, cosines, atol=2e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_can_be_told_without_the_base(
    tiny_dir: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    expected = saved(tiny_dir("llama"), tmp_path / "a", METHODS[method].config_class(**SETTINGS[method]))
    found = inspect_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert {item.name: item.shape for item in found.tensors} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    for item in found.tensors:
        value = tensors[item.name].double()
        assert item.norm == pytest.approx(float(value.norm()), rel=1e-9)
        assert item.largest == pytest.approx(float(value.abs().max()))
    for layer in found.layers:
        assert layer.update_ratio is None
        assert layer.cosines is None
        if method in UNKNOWN_WITHOUT_BASE:
            assert layer.norm is None
            assert "give --base" in layer.note
        elif method == "dora":
            assert layer.of == "direction"
            pair = [tensors[f"base_model.model.{layer.path}.lora_{x}.weight"].double() for x in "AB"]
            norm = float(torch.linalg.norm(pair[1] @ pair[0])) * 16 / 4
            assert layer.norm == pytest.approx(norm, rel=1e-6)
        else:
            assert layer.norm == pytest.approx(np.linalg.norm(expected[layer.path][1]), rel=1e-5)


def test_a_direction_that_is_new_by_construction() -> None:
    """W knows 6 directions, the update is along a seventh: larger than all of W it comes first."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    rows = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    weight = rotation[:, :6] @ torch.diag(torch.tensor([6.0, 5, 4, 3, 2, 1]).double()) @ rows[:6]
    outside = torch.outer(rotation[:, 6], rows[6])
    assert new_directions(weight, torch.zeros_like(weight), 6) == pytest.approx([1.0] * 6, abs=1e-5)
    assert new_directions(weight, 20 * outside, 4) == pytest.approx([0.0, 1, 1, 1], abs=1e-4)
    # Second by size: the leading one is the weight's own.
    assert new_directions(weight, 5.5 * outside, 3) == pytest.approx([1.0, 0, 1], abs=1e-4)
    # On the shorter side the rest of the basis has to be left out: W does nothing along it.
    assert new_directions(weight.mT, 20 * outside.mT, 4) == pytest.approx([0.0, 1, 1, 1], abs=1e-4)
    assert new_directions(torch.zeros(4, 5), torch.ones(4, 5), 2) == [0.0, 0.0]
    # Between two directions of W at 45 degrees: known to each by 0.707.
    between = torch.outer(rotation[:, 0] + rotation[:, 1], rows[7]) * 100
    assert new_directions(weight, between, 1) == pytest.approx([math.sqrt(0.5)], abs=1e-2)


def test_new_directions_are_counted_by_layer_and_group(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    graft.attach(base.model, graft.LoraConfig(rank=1, alpha=1, target_modules=("o_proj", "down_proj")))
    path = "model.layers.1.self_attn.o_proj"
    for name, tensor in trained_tensors(base.model).items():
        tensor.data.fill_(1e-4)
        if name.startswith(path):
            # Between all left singular vectors of W alike: each has a |cosine| of 1 / sqrt(32) with it.
            u = torch.linalg.svd(base.model.get_submodule(path).base.dense_weight()).U
            tensor.data.copy_(torch.eye(32)[:1] if "lora_A" in name else 1e4 * u.sum(1, keepdim=True))
    graft.save_adapter(base.model, tmp_path / "a")
    found = inspect_adapter(tmp_path / "a", base=tiny_dir("llama"), directions=1)
    cosines = {layer.path: layer.cosines for layer in found.layers}
    assert cosines.pop(path) == pytest.approx([1 / math.sqrt(32)], rel=1e-3)
    assert all(min(other or ()) > 0.99 for other in cosines.values())
    assert {group.name: group.intruders for group in found.kinds} == {"o_proj": 1, "down_proj": 0}
    assert {group.name: group.intruders for group in found.bands} == {"early": 0, "middle": 1}
    told = [finding.text for finding in found.findings]
    assert any("1 of the 4 leading directions" in text and path in text for text in told)
    assert any("larger than the weight below" in text and path in text for text in told)
    low = inspect_adapter(tmp_path / "a", base=tiny_dir("llama"), directions=1, threshold=0.1)
    assert sum(group.intruders or 0 for group in low.kinds) == 0
    none = inspect_adapter(tmp_path / "a", base=tiny_dir("llama"), directions=0)
    assert all(layer.cosines is None for layer in none.layers)


def test_ranks_of_known_spectra() -> None:
    assert stable_rank([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert stable_rank([3.0, 0.0]) == pytest.approx(1)
    assert stable_rank([]) is None
    assert stable_rank([0.0, 0.0]) is None
    assert energy([2.0, 1.0, 1.0]) == pytest.approx([4 / 6, 5 / 6, 1])
    assert energy([0.0]) == []
    assert rank_for(4 / 6, [2.0, 1.0, 1.0]) == 1
    assert rank_for(0.7, [2.0, 1.0, 1.0]) == 2
    assert rank_for(1.0, [2.0, 1.0, 1.0]) == 3
    assert rank_for(0.5, [0.0]) is None


def test_bands_are_thirds_of_the_blocks() -> None:
    layers = [
        LayerFacts(path=f"model.layers.{n}.mlp.up_proj", block=n, kind="up_proj", parameters=2, norm=2.0)
        for n in (0, 3, 4, 7, 8, 11)
    ]
    layers.append(LayerFacts(path="lm_head", block=None, kind="lm_head", parameters=5, norm=1.0))
    found = {group.name: group for group in bands(layers, 12, 0.5)}
    assert {name: group.layers for name, group in found.items()} == {
        "early": 2,
        "middle": 2,
        "late": 2,
        "outside": 1,
    }
    assert found["early"].norm == pytest.approx(math.sqrt(8))
    assert found["early"].share == pytest.approx(8 / 25)
    assert found["outside"].parameters == 5
    assert [group.layers for group in bands(layers[:3], 24, 0.5)] == [3]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_dead_adapter_is_said_loudly(tiny_dir: Callable[..., Path], tmp_path: Path, method: str) -> None:
    saved(tiny_dir("llama"), tmp_path / "a", METHODS[method].config_class(**SETTINGS[method]), trained=False)
    found = inspect_adapter(tmp_path / "a", base=tiny_dir("llama"))
    assert found.dead
    assert found.findings[0].level == "alarm"
    assert "THE ADAPTER IS DEAD" in found.findings[0].text
    if method not in ("dora", "vera", "trainable_tokens"):  # whose effect follows from the base
        assert inspect_adapter(tmp_path / "a").dead


def test_advice_is_given_where_figures_bear_it_out(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    graft.attach(base.model, graft.LoraConfig(rank=8))
    noisy(base.model)
    for name, tensor in trained_tensors(base.model).items():
        if "lora_B" in name:
            tensor.data[:, 2:] *= 1e-3  # two directions are left
            if "layers.1.mlp.up_proj" in name:
                tensor.data *= 1e-4
            if "layers.0.mlp.up_proj" in name:
                tensor.data.zero_()
    graft.save_adapter(base.model, tmp_path / "a")
    texts = [finding.text for finding in inspect_adapter(tmp_path / "a").findings]
    assert any(text.startswith("rank 2 would hold 95%") and "8 now" in text for text in texts)
    assert any("nearly untouched" in text and "model.layers.1.mlp.up_proj" in text for text in texts)
    assert any("change nothing at all: model.layers.0.mlp.up_proj" in text for text in texts)
    saved(tiny_dir("llama"), tmp_path / "b", graft.LoraConfig(rank=2))
    assert not inspect_adapter(tmp_path / "b").findings


def test_modules_trained_in_full_are_measured(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    graft.attach(base.model, graft.LoraConfig(rank=2, modules_to_save=("lm_head",)))
    noisy(base.model)
    graft.save_adapter(base.model, tmp_path / "a")
    (item,) = inspect_adapter(tmp_path / "a", base=tiny_dir("llama")).saved
    before = load(tiny_dir("llama")).model.lm_head.weight.detach()
    after = load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert item.name == "lm_head.weight"
    assert item.change_ratio == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    assert inspect_adapter(tmp_path / "a").saved[0].change_ratio is None
    assert not any("still the base" in f.text for f in inspect_adapter(tmp_path / "a").findings)


def test_a_module_that_is_still_the_bases_is_told(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    config = graft.LoraConfig(rank=2, modules_to_save=("lm_head", "norm"))
    saved(tiny_dir("llama"), tmp_path / "a", config, trained=False)
    assert inspect_adapter(tmp_path / "a", base=tiny_dir("llama")).dead
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] += 1
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "graft.json").unlink()
    found = inspect_adapter(tmp_path / "a", base=tiny_dir("llama"))
    assert not found.dead
    (text,) = (finding.text for finding in found.findings if "still the base" in finding.text)
    assert text == "1 of 2 tensors trained in full are still the base's: lm_head.weight"


def test_foreign_directories_and_runs(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(tiny_dir("llama"), run / "adapter", graft.LoraConfig(rank=2))
    record = {
        "config": {"training": {"learning_rate": 0.5, "batch_size": 3}},
        "results": {"best_eval_loss": 1.25},
    }
    (run / "run.json").write_text(json.dumps(record))
    found = inspect_adapter(run)
    assert found.trained == {
        "data": "abc",
        "steps": 7,
        "learning_rate": 0.5,
        "batch_size": 3,
        "best_eval_loss": 1.25,
    }
    assert found.base_digest == load(tiny_dir("llama")).fingerprint.short
    assert found.base_name == str(tiny_dir("llama"))
    (run / "adapter" / "graft.json").unlink()
    foreign = inspect_adapter(run / "adapter", base=tiny_dir("llama"))
    assert foreign.base_digest is None
    assert not foreign.base_checked
    assert any("no graft.json" in finding.text for finding in foreign.findings)


def test_experts_of_a_stack_need_the_base(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT's file of whole stacks: experts apart with the base, refused without."""
    directory = tiny_dir("mixtral", num_local_experts=3, num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(2):
        name = f"base_model.model.model.layers.{block}.mlp.experts.lora"
        tensors[f"{name}_A.weight"] = torch.randn(3 * 2, 64, generator=generator)
        tensors[f"{name}_B.weight"] = torch.randn(32, 2 * 3, generator=generator)
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "peft_version": "0.21.2", "target_modules": []}
    config |= {"target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="stacks of experts"):
        inspect_adapter(tmp_path / "a")
    found = inspect_adapter(tmp_path / "a", base=directory)
    assert len(found.layers) == 6
    number = 1
    a = tensors["base_model.model.model.layers.1.mlp.experts.lora_A.weight"].view(3, 2, 64)[number]
    b = tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].view(32, 2, 3)[:, :, number]
    (layer,) = (layer for layer in found.layers if layer.path.startswith("model.layers.1.mlp.experts.1."))
    assert layer.norm == pytest.approx(float(3 * torch.linalg.norm(b.double() @ a.double())), rel=1e-6)


class TestBadFiles:
    """What is wrong is told with the file and the tensor, and nothing else is told."""

    @pytest.fixture
    def place(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> Path:
        saved(tiny_dir("llama"), tmp_path / "a", graft.LoraConfig(rank=4))
        (tmp_path / "a" / "graft.json").unlink()
        return tmp_path / "a"

    def change(self, place: Path, act: Callable[[dict[str, torch.Tensor]], Any]) -> str:
        file = place / "adapter_model.safetensors"
        tensors = load_file(file)
        name = sorted(tensors)[0]
        act(tensors)
        save_file(tensors, file)
        return name

    def test_not_finite(self, place: Path) -> None:
        name = self.change(place, lambda t: t[sorted(t)[0]].view(-1)[3].fill_(math.nan))
        with pytest.raises(AdapterError, match="NaN or infinite") as caught:
            inspect_adapter(place)
        assert name in caught.value.where

    def test_a_factor_is_missing(self, place: Path) -> None:
        name = self.change(place, lambda t: t.pop(sorted(t)[0]))
        with pytest.raises(AdapterError, match="has lora_B.weight and no lora_A.weight"):
            inspect_adapter(place)
        assert "lora_A" in name

    def test_another_rank_than_the_settings_say(self, place: Path) -> None:
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
        with pytest.raises(AdapterError, match=r"the shape of lora_A.weight is \[4, 32\], .* \[8, 32\]"):
            inspect_adapter(place)

    def test_another_base(self, tiny_dir: Callable[..., Path], place: Path, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="shape of lora_"):
            inspect_adapter(place, base=tiny_dir("llama", hidden_size=64))
        with pytest.raises(AdapterError, match="has no layer 'model.layers"):
            inspect_adapter(place, base=tiny_dir("gpt2"))
        saved(tiny_dir("llama"), tmp_path / "b", graft.LoraConfig(rank=4))
        other = tiny_dir("llama", rms_norm_eps=0.01)
        load(other)
        changed = load_file(other / "model.safetensors")
        copy = tmp_path / "other"
        copy.mkdir()
        for file in other.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        changed["lm_head.weight"] += 1
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FingerprintError, match="not those that the adapter was trained on"):
            inspect_adapter(tmp_path / "b", base=copy)
        forced = inspect_adapter(tmp_path / "b", base=copy, force_base=True)
        assert any("is not the base" in finding.text for finding in forced.findings)

    def test_no_adapter_at_all(self, place: Path, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="cannot be read"):
            inspect_adapter(tmp_path / "nothing")
        (place / "adapter_model.safetensors").write_bytes(b"\0" * 7)
        with pytest.raises(AdapterError, match="not a whole safetensors file"):
            inspect_adapter(place)

    def test_arguments(self, place: Path, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="cannot be counted"):
            inspect_adapter(place, directions=-1)
        with pytest.raises(AdapterError, match="cannot be counted"):
            inspect_adapter(place, threshold=0.0)
        with pytest.raises(ModelError, match="no such model directory"):
            inspect_adapter(place, base=tmp_path / "none")
