from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from graft import kernels
from graft.data.loader import Batch, Loader, rounded_length
from graft.data.masking import IGNORED, Sample
from graft.errors import DataError
from graft.evaluate import loss as loss_module
from graft.evaluate.loss import (
    evaluate_loss,
    labelled_losses,
    perplexity,
    token_losses,
)
from graft.models.load import load


@pytest.fixture
def tiny(tiny_dir: Callable[..., Path], tiny_family: str) -> Any:
    return load(tiny_dir(tiny_family)).model


def _samples(seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in (9, 30, 17, 5, 22):
        ids = torch.randint(3, 264, (length,), generator=generator).tolist()
        labels = [IGNORED, *(token if place % 3 else IGNORED for place, token in enumerate(ids[1:]))]
        samples.append(Sample(ids, labels))
    return samples


def _batch(samples: list[Sample], *, packing: bool) -> Batch:
    return next(Loader(samples, batch_size=8, max_length=64, packing=packing, shuffle=False).epoch(0))


def _expected(model: Any, samples: list[Sample]) -> tuple[float, int]:
    """transformers' own loss of each sample alone, times its number of labelled tokens."""
    total, count = 0.0, 0
    for sample in samples:
        labels = torch.tensor([sample.labels])
        num = int((labels != IGNORED).sum())
        total += float(model(torch.tensor([sample.input_ids]), labels=labels).loss.detach()) * num
        count += num
    return total, count


@pytest.mark.parametrize("packing", [False, True])
def test_the_sum_is_transformers_loss_of_each_sample_alone(tiny: Any, packing: bool) -> None:
    with torch.no_grad():
        total, count = token_losses(tiny, _batch(_samples(), packing=packing))
    expected, num = _expected(tiny, _samples())
    assert count == num
    # fp32 sums of about fifty terms of size five
    assert float(total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_change_neither_the_loss_nor_the_gradients(
    tiny: Any, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _batch(_samples(), packing=True)
    tiny.get_output_embeddings().requires_grad_(not frozen)
    weights = torch.rand(batch.num_labelled_tokens, generator=torch.Generator().manual_seed(1))
    logits = torch.cat([_logits(tiny, sample) for sample in _packed(batch)])
    targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED]
    plain = functional.cross_entropy(logits, targets, reduction="none")
    found = [_gradients(tiny, plain, weights)]
    for chunk in (loss_module.CHUNK_LOGITS, 264 * 7):
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
        losses, _ = labelled_losses(tiny, batch.input_ids, batch.position_ids, batch.labels)
        found.append(_gradients(tiny, losses, weights))
    assert len(found[0]) == len(found[1]) > 5
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def _packed(batch: Batch) -> list[Sample]:
    """The samples in the order in which their tokens stand in the batch."""
    samples = _samples()
    return [samples[index] for row in batch.sample_ids for index in row]


def _logits(model: Any, sample: Sample) -> torch.Tensor:
    """What transformers predicts the labelled tokens of a sample from."""
    labels = torch.tensor(sample.labels)
    logits: torch.Tensor = model(torch.tensor([sample.input_ids])).logits[0, :-1]
    return logits[labels[1:] != IGNORED]


def _gradients(model: Any, losses: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (losses * weights).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_the_loss_is_fp32_and_only_labelled_positions_meet_the_head(tiny: Any) -> None:
    model = tiny.bfloat16()
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _out: seen.append(inputs[0].shape)
    )
    batch = _batch(_samples(), packing=False)
    total, count = token_losses(model, batch)
    assert total.dtype == torch.float32
    assert seen == [(rounded_length(count), model.config.hidden_size)]
    assert count < batch.labels.numel() / 2
    assert count == batch.num_labelled_tokens


def test_the_mean_weighs_tokens_not_batches(tiny: Any) -> None:
    samples = _samples()
    tiny.train()
    report = evaluate_loss(tiny, Loader(samples, 2, 64, packing=False, shuffle=False).epoch(0))
    assert tiny.training
    tiny.eval()
    expected, num = _expected(tiny, samples)
    assert report.num_tokens == num
    assert report.loss == pytest.approx(expected / num, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(expected / num), rel=1e-4)


def test_adapters_get_the_gradients_of_plain_cross_entropy(tiny_dir: Callable[..., Path]) -> None:
    from graft.adapters.attach import attach
    from graft.adapters.attached import adapter_tensors
    from graft.adapters.lora import LoraConfig

    model = load(tiny_dir("llama")).model
    attach(model, LoraConfig(rank=4), seed=1)
    sample = _samples()[1]
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
    tensors = adapter_tensors(model)
    for tensor in tensors.values():
        torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(2))
    logits = model(ids).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
    expected = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    model.zero_grad()
    token_losses(model, _batch([sample], packing=True))[0].backward()
    for name, tensor in tensors.items():
        # Sums of float32: what is near zero is off by the rounding of what is large.
        scale = 1e-6 * float(expected[name].abs().max())
        torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-4, atol=scale, msg=name)


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_losses_and_slope_are_those_of_float64(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 264, generator=generator) * spread
    targets = torch.randint(0, 264, (50,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    before = logits.clone()
    found_slope = torch.empty_like(logits)
    found = kernels.call("cross_entropy", logits, targets, found_slope)
    assert torch.equal(logits, before)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_slope.double(), slope, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the most numbers that one tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_is_as_large_as_the_logits(
    tiny_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    model = load(tiny_dir("llama")).model.train()
    model.get_output_embeddings().requires_grad_(not frozen)
    ids = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(1)).tolist()
    batch = _batch([Sample(row, [IGNORED, *row[1:]]) for row in ids], packing=False)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 264 * 32)
    with Largest() as largest:
        token_losses(model, batch)[0].backward()
    # The widest there is: the chunk itself, 4 x 64 tokens of the MLP's 64, and their attention.
    assert largest.numel <= max(264 * 32, 4 * 64 * 64, 4 * 4 * 64 * 8) < 4 * 63 * 264 / 4


def test_nothing_labelled_is_refused(tiny_dir: Callable[..., Path]) -> None:
    model = load(tiny_dir("llama")).model
    with pytest.raises(DataError, match="no labelled token"):
        evaluate_loss(model, [_batch([Sample([5, 6, 7], [IGNORED] * 3)], packing=False)])


def test_perplexity_at_the_edges() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
