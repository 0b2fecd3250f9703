"""The losses of preferences against the formulas, written out with whole logits and a second model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft.models.load as models
from graft.adapters.attach import adapter_tensors, attach
from graft.adapters.lora import LoraConfig
from graft.data.loader import Loader
from graft.data.samples import IGNORED, Sample
from graft.evaluate.preferences import PreferenceLoss, Tally, answer_tokens, evaluate_preferences, log_ratios


def pairs(count: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        prompt = torch.randint(3, 259, (length,), generator=generator).tolist()
        for _ in range(2):
            size = int(torch.randint(1, 12, (1,), generator=generator))
            answer = torch.randint(3, 259, (size,), generator=generator).tolist()
            found.append(Sample([*prompt, *answer], [IGNORED] * len(prompt) + answer))
    return found


def adapted(directory: Path) -> Any:
    model = models.load(directory, dtype="float32").model
    attach(model, LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def log_probability(model: Any, sample: Sample, *, mean: bool) -> torch.Tensor:
    """Of the labelled tokens of one row without padding: from all logits, in float64."""
    logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1].double()
    targets = torch.tensor(sample.labels[1:])
    kept = targets != IGNORED
    chosen = logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None])
    return chosen.mean() if mean else chosen.sum()


def by_formula(model: Any, reference: Any, samples: list[Sample], loss: PreferenceLoss) -> torch.Tensor:
    """trl's formulas: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), and (h - 1 / (2 beta))^2."""
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in zip(samples[0::2], samples[1::2], strict=True):
        mean = loss.kind == "ipo"
        with torch.no_grad():
            before = [log_probability(reference, sample, mean=mean) for sample in (chosen, rejected)]
        now = [log_probability(model, sample, mean=mean) for sample in (chosen, rejected)]
        h = (now[0] - now[1]) - (before[0] - before[1])
        if mean:
            total = total + (h - 1 / (2 * loss.beta)) ** 2
        else:
            wrong = loss.label_smoothing
            right = torch.sigmoid(loss.beta * h)
            total = total - (1 - wrong) * right.log() - wrong * (1 - right).log()
    return total / (len(samples) // 2)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = adapter_tensors(model)
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


LOSSES = [
    PreferenceLoss(),
    PreferenceLoss(beta=0.7, label_smoothing=0.2),
    PreferenceLoss(kind="ipo", beta=0.3),
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=["dpo", "smoothed", "ipo"])
def test_loss_and_gradients_are_those_of_the_formula(
    loss: PreferenceLoss, packing: bool, tiny_dir: Callable[..., Path]
) -> None:
    directory = tiny_dir("llama")
    model, samples = adapted(directory), pairs()
    reference = models.load(directory, dtype="float32").model
    expected = by_formula(model, reference, samples, loss)
    wanted = gradients(model, expected)
    found = torch.zeros(())
    for batch in Loader(samples, 2, 40, packing, seed=3, kind="pair").epoch(0):
        found = found + loss.losses(log_ratios(model, batch)).sum()
    found = found / 5
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-6)
    # What fp32 leaves of a whole gradient, on processors that add in different orders; ipo's is large where
    # the margin is far from 1 / (2 beta).
    difference = {name: gradient - wanted[name] for name, gradient in gradients(model, found).items()}
    assert norm(difference) <= 4e-6 * max(1.0, norm(wanted))


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors.values()])))


def test_an_untrained_adapter_loses_log_two(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama"), dtype="float32").model
    attach(model, LoraConfig(rank=4))
    batches = list(Loader(pairs(), 2, 40, packing=False, kind="pair").epoch(0))
    tally = evaluate_preferences(model, batches, PreferenceLoss())
    assert tally.mean_loss == pytest.approx(math.log(2), abs=1e-7)
    figures = tally.figures("eval_")
    assert figures["eval_reward_margin"] == 0.0
    assert figures["eval_preference_accuracy"] == 0.0, "a tie is no preference"


def test_the_base_is_asked_without_dropout(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("gpt2", resid_pdrop=0.5), dtype="float32").model
    attach(model, LoraConfig(rank=4))
    (batch,) = Loader(pairs(1), 1, 40, packing=False, kind="pair").epoch(0)
    plain = log_ratios(model, batch).ratios
    # With and without gradients other operations make the same sums: float32 rounds them apart.
    assert float(plain.detach().abs().max()) < 2e-6
    model.train()
    seen = [log_ratios(model, batch).ratios.detach() for _ in range(2)]
    assert model.training
    assert not torch.equal(seen[0], seen[1]), "dropout acts on the model that trains"


def test_counts_of_packed_and_padded_rows() -> None:
    samples = pairs()
    wanted = [sum(label != IGNORED for label in sample.labels) for sample in samples]
    for packing in (False, True):
        for batch in Loader(samples, 2, 40, packing, kind="pair").epoch(0):
            order = [index for row in batch.sample_ids for index in row]
            assert answer_tokens(batch) == [wanted[index] for index in order]


def test_figures_are_means_over_pairs() -> None:
    tally = Tally()
    tally.add(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.25, 2.0]))
    tally.add(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([-3.0]))
    assert tally.mean_loss == 2.0
    assert tally.figures() == {
        "reward_chosen": 0.5,
        "reward_rejected": pytest.approx(-0.25),
        "reward_margin": pytest.approx(0.75),
        "preference_accuracy": pytest.approx(2 / 3),
    }
    tally.add(torch.tensor([1.0]), torch.tensor([math.inf]), torch.tensor([0.0]))
    assert tally.figures() == {}
