"""Activations that leave memory: the same bits come back, little stays, and a disk that fails is told."""

from __future__ import annotations

import errno
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.config import build, read_assignments
from graft.data.loader import Batch, Loader
from graft.data.masking import Sample
from graft.errors import ConfigError, StorageError
from graft.evaluate.loss import token_losses
from graft.models.lean import lean
from graft.models.load import load
from graft.models.recipes import Kept, Recipes
from graft.runs import read_lines
from graft.training import offload
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig
from graft.training.offload import FilePlace, Offloaded
from graft.training.recompute import recomputed


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (30, 9, 20, 31)]
    return next(Loader([Sample(row, [-100, *row[1:]]) for row in ids], 4, 40, True, shuffle=False).epoch(0))


def model_of(directory: Path, kind: str) -> tuple[Any, dict[str, nn.Parameter]]:
    dtype = "float32" if kind == "full" else "bfloat16"
    base = load(directory, dtype=dtype, quantization="nf4" if kind == "qlora" else None)
    if kind == "full":
        base.model.requires_grad_(True)
        return base.model.train(), dict(base.model.named_parameters())
    attach(base.model, LoraConfig(rank=4, dropout=0.2), seed=1)
    for parameter in adapter_tensors(base.model).values():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    return base.model.train(), adapter_tensors(base.model)


def gradients(
    model: Any, parameters: dict[str, nn.Parameter], store: Kept, every: int = 0
) -> list[torch.Tensor]:
    recipes = Recipes(store)
    with lean(model, recipes), recomputed(model, every, store):
        torch.manual_seed(5)
        with recipes.hooks():
            loss, _ = token_losses(model, make_batch())
        loss.backward()
        recipes.finish()
    found = [loss.detach(), *(p.grad.clone() for p in parameters.values() if p.grad is not None)]
    model.zero_grad()
    return found


def everything_leaves(directory: Path, model: Any) -> Offloaded:
    return Offloaded(FilePlace(directory), [*model.parameters(), *model.buffers()], smallest=1)


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_same_bits(tiny_dir: Callable[..., Path], tmp_path: Path, kind: str, every: int) -> None:
    model, parameters = model_of(tiny_dir("llama", num_hidden_layers=4), kind)
    plain = gradients(model, parameters, Kept(), every)
    store = everything_leaves(tmp_path, model)
    for _ in range(2):  # the second pass writes over the first one's bytes
        found = gradients(model, parameters, store, every)
        assert store.num_bytes > 0
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_same_bits_on_every_family(tiny_dir: Callable[..., Path], tmp_path: Path, tiny_family: str) -> None:
    model, parameters = model_of(tiny_dir(tiny_family), "lora")
    plain = gradients(model, parameters, Kept())
    found = gradients(model, parameters, everything_leaves(tmp_path, model))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: t.transpose(1, 2),
        lambda t: t[:, :, 1:3],
        lambda t: t[1],
        lambda t: t.view(-1),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.double().permute(2, 0, 1),
    ],
)
def test_any_layout_comes_back(tmp_path: Path, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    store = Offloaded(FilePlace(tmp_path), smallest=1)
    tensor = make(torch.randn(3, 4, 5))
    handle = store.put(tensor)
    expected = tensor.clone()
    tensor.zero_()  # what came first counts
    found = store.get(handle)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    if tensor.is_contiguous() or tensor.dim() == 3:
        assert found.stride() == (tensor.stride() if tensor.numel() == 60 else tensor.contiguous().stride())


def test_one_memory_leaves_once(tmp_path: Path) -> None:
    store = Offloaded(FilePlace(tmp_path), smallest=1)
    tensor = torch.arange(64.0).view(8, 8)
    handles = [
        store.put(tensor),
        store.put(tensor.t()),
        store.put(tensor.view(4, 16)),
        store.put(tensor.detach()),
    ]
    assert len({id(handle[0]) for handle in handles}) == 1
    assert torch.equal(store.get(handles[1]), tensor.t())
    half = store.put(tensor[:4])
    assert half[0] is not handles[0][0]
    tensor.add_(1)  # other numbers now
    later = store.put(tensor)
    assert torch.equal(store.get(later), tensor)
    assert torch.equal(store.get(handles[0]), tensor - 1)


def test_memory_that_another_tensor_has_now_is_not_taken_for_the_first_one(tmp_path: Path) -> None:
    store = Offloaded(FilePlace(tmp_path), smallest=1)
    addresses, handles = set(), []
    for value in range(50):
        tensor = torch.full((512,), float(value))
        addresses.add(tensor.data_ptr())
        handles.append(store.put(tensor))
        del tensor
    assert len(addresses) < 50, "no address came twice: the test shows nothing"
    assert [float(store.get(handle)[0]) for handle in handles] == list(range(50))


def test_what_stays(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    buffer = torch.randn(64, 64)
    store = Offloaded(FilePlace(tmp_path), [weight, buffer], smallest=64)
    alone = nn.Parameter(torch.randn(64, 64))
    spread, numbers, small = torch.zeros(1).expand(64, 64), torch.arange(64), torch.zeros(8)
    for tensor in (weight, weight.t(), buffer.t(), alone, spread, numbers, small):
        found = store.get(store.put(tensor))
        assert found.data_ptr() == tensor.data_ptr()
        assert found.shape == tensor.shape
    assert store.get(store.put(torch.zeros(16))).numel() == 16
    store.close()
    assert store.num_bytes == 64


def test_memory_is_given_back_during_the_forward_pass(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}
    model, _ = model_of(tiny_dir("llama", **sizes), "lora")

    def held(store: Kept) -> int:
        recipes = Recipes(store)
        before = bytes_held()
        with lean(model, recipes), recipes.hooks():
            loss, _ = token_losses(model, make_batch())
            grown = bytes_held() - before
        loss.backward()
        recipes.finish()
        model.zero_grad()
        return grown

    plain, less = held(Kept()), held(everything_leaves(tmp_path, model))
    assert less < 0.15 * plain


def bytes_held() -> int:
    gc.collect()
    # Other tests leave tensors without memory and objects that stand for tensors.
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def test_little_is_fetched_ahead_and_what_was_asked_for_stays_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "AHEAD_BYTES", 3 * 64)
    place = FilePlace(tmp_path)
    told: list[Any] = []
    read: list[Any] = []
    real = place.read
    monkeypatch.setattr(place, "ahead", told.append)
    monkeypatch.setattr(place, "read", lambda where: read.append(where) or real(where))
    store = Offloaded(place, smallest=1)
    handles = [store.put(torch.full((16,), float(value))) for value in range(8)]
    store.get(handles[7])
    assert [begin for begin, _ in told] == [6 * 64, 5 * 64, 4 * 64]
    for index in (7, 6, 5, 7):
        store.get(handles[index])
    assert len(read) == 3
    store.get(handles[4])
    store.get(handles[6])  # the one whose use was longest ago had to go
    assert [begin // 64 for begin, _ in read] == [7, 6, 5, 4, 6]


def test_the_file_has_no_name_and_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "GROWTH_BYTES", 4096)
    place = FilePlace(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store = Offloaded(place, smallest=1)
    for value in range(3):
        handle = store.put(torch.full((1000,), float(value)))
        assert float(store.get(handle)[7]) == value
        store.close()
    assert store.num_bytes == 4000
    assert place._handle is not None
    assert os.fstat(place._handle).st_size == 4096
    store.release()
    again = store.put(torch.ones(10))
    assert float(store.get(again).sum()) == 10


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Offloaded(FilePlace(tmp_path), smallest=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="scratch file") as caught:
        store.put(torch.ones(1000))
    assert "4,000" in str(caught.value) or "4.0" in str(caught.value)


def test_bytes_that_are_gone_are_told(tmp_path: Path) -> None:
    place = FilePlace(tmp_path)
    store = Offloaded(place, smallest=1)
    handle = store.put(torch.ones(1000))
    assert place._handle is not None
    os.ftruncate(place._handle, 100)
    with pytest.raises(StorageError, match="3,900 bytes of activations"):
        store.get(handle)


@pytest.fixture
def settings(tiny_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i}: " + "word " * 20}) + "\n" for i in range(16)))

    def make(out: str, *words: str) -> RunConfig:
        given = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / out}"]
        given += ["adapter.rank=2", "adapter.dropout=0.1", "data.max_length=64", "training.max_steps=4"]
        return build(RunConfig, read_assignments([*given, *words]))

    return make


def test_a_run_with_the_setting_has_the_same_bits(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    made: list[Offloaded] = []
    real = Offloaded.__init__

    def noted(self: Offloaded, place: Any, lasting: Any = ()) -> None:
        made.append(self)
        real(self, place, lasting, 1)

    monkeypatch.setattr(Offloaded, "__init__", noted)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    plain = run_from_config(settings("plain"))
    assert not made
    for name, value in (("own", "true"), ("named", str(elsewhere))):
        found = run_from_config(settings(name, f"training.activation_offload={value}"))
        assert made.pop().num_bytes > 0
        one, other = (run.directory / "adapter" / "adapter_model.safetensors" for run in (found, plain))
        assert one.read_bytes() == other.read_bytes()
        assert list(read_lines(tmp_path / name / "metrics.jsonl")) == list(
            read_lines(tmp_path / "plain" / "metrics.jsonl")
        )
    assert resume(tmp_path / "own").directory == tmp_path / "own"
    assert list(elsewhere.iterdir()) == []


def test_what_cannot_be(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="activation_offload"):
        settings("a", "training.activation_offload=''")
    for name in ("activation_offload", "optimizer_spill"):
        words = (f"training.{name}={tmp_path / 'nowhere'}", "training.optimizer_memory=100KB")
        with pytest.raises(ConfigError, match=f"training.{name} names .*nowhere, which is no directory"):
            run_from_config(settings("b", *words))
        assert not (tmp_path / "b").exists()
    assert build(
        RunConfig, read_assignments(["training.activation_offloading=true"])
    ).training.activation_offload
