"""Paged state: the same bits under every budget, in few frames, on a lost disk, on a device of pretence."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.errors import ConfigError, StorageError
from graft.training import paging
from graft.training.config import TrainingConfig
from graft.training.groups import Treatment
from graft.training.optim import Optimizer
from graft.training.spill import HostPages, SpillFile
from graft.training.store import Lane, Pager

SHAPES = {
    "a": (64, 300),
    "b": (7, 611),
    "c": (100, 77),
    "d": (41, 100),
    "e": (13,),
    "f": (9000,),
    "g": (50, 99),
}
"""Over several pages, under one, of odd sizes; a vector; some under what goes into 8 bits."""

CONFIGS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "adamw_8bit": {"weight_decay": 0.1},
    "sgd": {"learning_rate": 1.0, "sgd_momentum": 0.9, "weight_decay": 0.1},
    "lion": {"learning_rate": 1.0, "weight_decay": 0.1},
}

BYTES = {"adamw": 8.0, "adamw_8bit": 2.03125, "sgd": 4.0, "lion": 4.0}
"""Of state for each number, by the formats' definitions."""


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


TREATMENTS = {
    name: Treatment(rate=4.0 if name in "bf" else 1.0, decays=name != "e", float32_state=name == "c")
    for name in SHAPES
}


def steps(
    optimizer: Optimizer,
    params: dict[str, nn.Parameter],
    seeds: range,
    without: Mapping[int, str] | None = None,
) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in params.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if name in (without or {}).get(seed, "") else gradient
        optimizer.step(1e-2, optimizer.gradient_norm())


def make(name: str, directory: Path, **memory: Any) -> tuple[dict[str, nn.Parameter], Optimizer]:
    params = parameters()
    config = TrainingConfig(optimizer=name, **CONFIGS[name], **memory)  # type: ignore[arg-type]
    return params, Optimizer(params, config, TREATMENTS, directory)


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


SKIPS = {1: "d", 2: "ac", 4: "abcdefg"[1:]}
"""Tensors without a gradient, by step, so that counts differ and pages are left out."""


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0, 4.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_bit_is_the_unpaged_one(name: str, share: float, tmp_path: Path) -> None:
    plain, whole = make(name, tmp_path)
    num_bytes = int(BYTES[name] * sum(p.numel() for p in plain.values()) * share)
    budget = max(num_bytes, 8 * 4096)  # one page, of the widest kind
    params, paged = make(name, tmp_path, optimizer_memory=budget)
    for optimizer, given in ((whole, plain), (paged, params)):
        steps(optimizer, given, range(6), SKIPS)
    assert equal(plain, params)
    assert equal(whole.state(), paged.state())
    if share < 0.5:
        assert isinstance(paged._store, Pager)
        assert paged._store.num_reads > 0
        assert paged._store.num_writes > 0
        held = sum(frame.memory.numel() for frame in [*paged._store._held.values(), *paged._store._free])
        assert held <= budget
    paged.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_goes_from_paged_to_unpaged_and_back(name: str, tmp_path: Path) -> None:
    plain, whole = make(name, tmp_path)
    steps(whole, plain, range(8), SKIPS)
    budgets: list[dict[str, Any]] = [{"optimizer_memory": "40KB"}, {}, {"optimizer_memory": "60KB"}]
    values, state = {n: p.detach() for n, p in parameters().items()}, {}
    for turn, memory in enumerate([*budgets, {"optimizer_memory": "33KB"}]):
        params, optimizer = make(name, tmp_path, **memory)
        for key, value in values.items():
            params[key].data.copy_(value)
        optimizer.load_state(state)
        steps(optimizer, params, range(2 * turn, 2 * turn + 2), SKIPS)
        values, state = {n: p.detach().clone() for n, p in params.items()}, dict(optimizer.state())
        optimizer.close()
    assert equal(plain, values)
    assert equal(whole.state(), state)


def test_unpaged_adamw_is_torchs_fused_to_the_bit(tmp_path: Path) -> None:
    params, optimizer = make("adamw", tmp_path, optimizer_memory="100KB")
    peers = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    groups = [
        {"params": [peers[n]], "lr": 1e-2 * t.rate, "weight_decay": 0.1 if t.decays else 0.0}
        for n, t in TREATMENTS.items()
    ]
    peer = torch.optim.AdamW(groups, fused=True)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for name, p in params.items():
            p.grad = torch.randn(p.shape, generator=generator) / 1000
            peers[name].grad = p.grad.clone()
        optimizer.step(1e-2, 0.5)
        peer.step()
    assert equal(params, peers)
    for name, p in peers.items():
        assert torch.equal(optimizer.state()[f"{name}|exp_avg_sq"], peer.state[p]["exp_avg_sq"])


def test_tensors_that_moved_or_lie_across_are_updated(tmp_path: Path) -> None:
    plain, whole = make("adamw", tmp_path)
    params, optimizer = make("adamw", tmp_path)
    steps(whole, plain, range(2))
    params["b"].data = params["b"].data.t().contiguous().t()
    steps(optimizer, params, range(1))
    params["a"].data = params["a"].data.clone()
    params["c"].data = params["c"].data.t().contiguous().t()
    steps(optimizer, params, range(1, 2))
    assert equal(plain, params)


def test_small_tensors_are_paged_too(tmp_path: Path) -> None:
    """Those of LoRA at rank 8 are under the 100,000 numbers from which on bitsandbytes pages."""
    params = {f"{i}.lora_A": nn.Parameter(torch.randn(8, 576)) for i in range(40)}
    config = TrainingConfig(optimizer_memory="64KiB")
    optimizer = Optimizer(params, config, run_directory=tmp_path)
    steps(optimizer, params, range(3))
    assert isinstance(optimizer._store, Pager)
    whole, page = 40 * 8 * 576 * 8, 4096 * 8
    # After the first step each one changes what is not in the two frames: about all pages but two.
    assert optimizer._store.num_reads >= 2 * (whole // page - 2)
    assert optimizer._store.num_reads <= 2 * (-(-whole // page) + 1 - 2)


def test_the_order_turns_round_so_that_what_is_held_is_used(tmp_path: Path) -> None:
    frames = [torch.empty(64, dtype=torch.uint8) for _ in range(4)]
    pager = Pager([64] * 10, lambda _, buffer: None, frames, SpillFile(tmp_path, [64] * 10), Lane())
    first = [index for index, _ in pager.visit(range(10))]
    assert pager.num_reads == 0, "nothing is below yet"
    second = [index for index, _ in pager.visit(range(10))]
    assert first == list(range(10))
    assert second == list(range(10))[::-1]
    assert pager.num_reads == 6
    pager.close()


def test_pages_come_back_as_they_were(tmp_path: Path) -> None:
    sizes = [64, 100, 1, 64, 4097]
    frames = [torch.empty(4097, dtype=torch.uint8) for _ in range(2)]
    pager = Pager(
        sizes, lambda index, buffer: buffer.fill_(index), frames, SpillFile(tmp_path, sizes), Lane()
    )
    for number in range(5):
        for index, buffer in pager.visit(range(5)):
            assert buffer.tolist() == [index + number] * sizes[index]
            buffer += 1
    assert pager.page(3, change=False).tolist() == [8] * 64
    pager.page(1, change=True).fill_(77)
    for index in (0, 2, 3, 4):
        pager.page(index, change=False)
    assert set(pager.page(1, change=False).tolist()) == {77}
    pager.close()


def test_nothing_is_left_in_the_directory(tmp_path: Path) -> None:
    params, optimizer = make("adamw", tmp_path, optimizer_memory="40KB")
    steps(optimizer, params, range(2))
    assert list(tmp_path.iterdir()) == []
    handle = optimizer._store._below._handle  # type: ignore[attr-defined]
    assert os.fstat(handle).st_nlink == 0
    assert os.fstat(handle).st_size >= 8 * sum(p.numel() for p in params.values())
    optimizer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)
    with pytest.raises(StorageError, match="closed"):
        steps(optimizer, params, range(1))


# What cannot work.


@pytest.mark.parametrize("size", ["0", "-1", "64 parsecs", "MB", "nan", "1e99GB", 0, True, "0.5"])
def test_no_amount_of_memory(size: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(optimizer_memory=size)
    assert caught.value.where == "training.optimizer_memory"


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("64MB", 64_000_000),
        ("64mb", 64_000_000),
        ("1.5 GiB", 3 << 29),
        (4096, 4096),
        ("1e6", 10**6),
        ("2k", 0),
    ],
)
def test_amounts(size: Any, num_bytes: int) -> None:
    from graft.training.sizes import num_bytes as read

    if num_bytes:
        assert read(size, "here") == num_bytes
    else:
        with pytest.raises(ConfigError, match="no amount"):
            read(size, "here")


def test_a_budget_under_a_page_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"10,000 bytes, and the smallest page takes 32,768") as caught:
        make("adamw", tmp_path, optimizer_memory="10KB")
    assert "32,768 bytes or more" in caught.value.fix
    make("adamw", tmp_path, optimizer_memory=32_768)[1].close()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"optimizer_memory": "1MB", "optimizer_host_memory": "1GB"}, "optimizer_host_memory"),
        ({"optimizer_memory": "1MB", "optimizer": "sgd", "learning_rate": 1.0}, "optimizer_memory"),
    ],
)
def test_what_acts_on_nothing_is_refused(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="acts on nothing") as caught:
        Optimizer(parameters(), TrainingConfig(**settings), TREATMENTS, tmp_path)
    assert caught.value.where == f"training.{field}"


@pytest.mark.parametrize("field", ["optimizer_host_memory", "optimizer_spill"])
def test_what_needs_a_budget_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=r"without training\.optimizer_memory"):
        TrainingConfig(**{field: "1MB"})


def test_a_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, begin: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        StorageError, match=r"No space left on device; [\d,]+ bytes were needed; [\d,]+ bytes"
    ):
        make("adamw", tmp_path, optimizer_memory="40KB")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_not_there_or_not_writable(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"No such file or directory; [\d,]+ bytes were needed"):
        make("adamw", tmp_path, optimizer_memory="40KB", optimizer_spill=str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="bytes were needed"):
        make("adamw", tmp_path, optimizer_memory="40KB", optimizer_spill=str(tmp_path / "file"))


def test_a_disk_that_fails_in_a_step_ends_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = make("adamw", tmp_path, optimizer_memory="40KB")
    steps(optimizer, params, range(2))
    real, calls = os.pwrite, []

    def fail(handle: int, data: Any, place: int) -> int:
        calls.append(place)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(handle, data, place)

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StorageError, match=r"Input/output error; [\d,]+ bytes were needed"):
        steps(optimizer, params, range(2, 5))
    with pytest.raises(StorageError, match="Input/output error"):  # never as if the page had been empty
        dict(optimizer.state())
    optimizer.close()


def test_short_writes_and_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: pwrite(handle, data[:100], place))
    monkeypatch.setattr(os, "preadv", lambda handle, into, place: preadv(handle, [into[0][:77]], place))
    spill = SpillFile(tmp_path, [1000, 999])
    page = torch.arange(999).to(torch.uint8)
    spill.write(1, page)
    found = torch.zeros(999, dtype=torch.uint8)
    spill.read(1, found)
    assert torch.equal(page, found)
    spill.close()


# A device of pretence: what it is asked to do is done only when somebody waits for it.


class Deferred:
    """Updates of pages are queued, as kernels on a stream are; copies of the worker wait for their mark."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self.lock = threading.Lock()
        self.waited: list[int] = []

    def mark(self) -> int:
        return len(self.queue)

    def run(self, mark: int, job: Callable[[], None]) -> None:
        self.waited.append(mark)
        self.catch_up(mark)
        job()

    def catch_up(self, until: int) -> None:
        with self.lock:
            while self.done < until:
                self.queue[self.done]()
                self.done += 1


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_copies_wait_for_the_updates_of_their_page(num_frames: int) -> None:
    sizes, device = [64] * 8, Deferred()
    frames = [torch.empty(64, dtype=torch.uint8) for _ in range(num_frames)]
    below = HostPages(sizes, pinned=False)
    pager = Pager(sizes, lambda _, buffer: buffer.zero_(), frames, below, device)  # type: ignore[arg-type]
    for _ in range(3):
        for index, buffer in pager.visit(range(8)):
            device.queue.append(lambda buffer=buffer, index=index: buffer.add_(index + 1))  # type: ignore[misc]
    device.catch_up(len(device.queue))
    for index in range(8):
        assert set(pager.page(index, change=False).tolist()) == {3 * (index + 1)}
    assert max(device.waited) > 0
    pager.close()


@pytest.mark.parametrize("host", [None, 3 * 4096 * 8 + 17])
def test_two_tiers_give_the_same_bits(
    host: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames, host memory under them, and a file under that, with the CPU in the device's place."""
    plain, whole = make("adamw", tmp_path)
    tiers: list[Any] = []

    def pager(sizes: Any, clear: Any, device: Any, given: paging.Paging) -> Pager:
        given = paging.Paging(given.memory_bytes, host, tmp_path)
        tiers.append(paging.host_tier(sizes, clear, given, pinned=False))
        frames = [torch.empty(max(sizes), dtype=torch.uint8) for _ in range(2)]
        return Pager(sizes, clear, frames, tiers[0], Lane())

    monkeypatch.setattr(paging, "_pager", pager)
    params, paged = make("adamw", tmp_path, optimizer_memory="70KB")
    for optimizer, given in ((whole, plain), (paged, params)):
        steps(optimizer, given, range(5), SKIPS)
    assert equal(plain, params)
    assert equal(whole.state(), paged.state())
    if host is not None:
        assert tiers[0]._inner.num_writes > 0
    paged.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("host", [None, "140KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_device(name: str, host: str | None, tmp_path: Path) -> None:
    results = []
    for memory in ({}, {"optimizer_memory": "70KB", "optimizer_host_memory": host}):
        params = {key: nn.Parameter(p.detach().cuda()) for key, p in parameters().items()}
        config = TrainingConfig(optimizer=name, **CONFIGS[name], **memory)  # type: ignore[arg-type]
        optimizer = Optimizer(params, config, TREATMENTS, tmp_path)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            for parameter in params.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            optimizer.step(1e-2, optimizer.gradient_norm())
        results.append(({**params}, dict(optimizer.state())))
        optimizer.close()
    assert equal(results[0][0], results[1][0])
    assert equal(results[0][1], results[1][1])
