"""The losses of preferences against the formulas, written out with whole logits and a second model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft.models.load as models
from graft.adapters.attach import adapter_tensors, attach
from graft.adapters.lora import LoraConfig
from graft.config import build, read_assignments
from graft.data.config import DataConfig
from graft.data.loader import Loader
from graft.data.preferences import prepare_pairs
from graft.data.samples import IGNORED, Sample
from graft.evaluate.loss import labelled_losses
from graft.evaluate.preferences import (
    METRICS,
    PreferenceLoss,
    Tally,
    answer_tokens,
    evaluate_preference_file,
    evaluate_preferences,
    log_ratios,
)
from graft.training.choices import objective
from graft.training.config import RunConfig
from graft.training.objectives import Preferences


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


def adapted(directory: Path, dropout: float = 0.0) -> Any:
    model = models.load(directory, dtype="float32").model
    attach(model, LoraConfig(rank=4, dropout=dropout))
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


def rewards_by_formula(
    model: Any, reference: Any, samples: list[Sample], loss: PreferenceLoss
) -> list[float]:
    """beta (log p - log p_base) of each answer, per token where the loss is ipo's."""
    mean = loss.kind == "ipo"
    with torch.no_grad():
        return [
            loss.beta
            * float(log_probability(model, each, mean=mean) - log_probability(reference, each, mean=mean))
            for each in samples
        ]


def figures_by_formula(rewards: list[float], prefix: str = "") -> dict[str, Any]:
    chosen, rejected = rewards[0::2], rewards[1::2]
    means = [sum(each) / len(each) for each in (chosen, rejected)]
    won = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    return {
        f"{prefix}reward_chosen": pytest.approx(means[0], rel=1e-5, abs=1e-6),
        f"{prefix}reward_rejected": pytest.approx(means[1], rel=1e-5, abs=1e-6),
        f"{prefix}reward_margin": pytest.approx(means[0] - means[1], rel=1e-5, abs=1e-6),
        f"{prefix}preference_accuracy": won / len(chosen),
    }


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=["dpo", "smoothed", "ipo"])
def test_training_and_evaluation_tell_what_the_formula_says(
    loss: PreferenceLoss, packing: bool, tiny_dir: Callable[..., Path]
) -> None:
    directory = tiny_dir("llama")
    model, samples = adapted(directory), pairs()
    reference = models.load(directory, dtype="float32").model
    expected = float(by_formula(model, reference, samples, loss).detach())
    rewards = rewards_by_formula(model, reference, samples, loss)
    learned = Preferences(loss)
    batches = list(Loader(samples, 2, 40, packing, kind="pair").epoch(0))
    assert sum(map(learned.weight, batches)) == 5
    found, figures = learned.evaluate(model, batches)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert figures == figures_by_formula(rewards, "eval_")
    assert 0 < figures["eval_preference_accuracy"] < 1, "answers of both kinds gained"
    model.eval()
    total = sum(float(learned.loss(model, batch).detach()) for batch in batches)
    assert total / 5 == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert learned.figures() == figures_by_formula(rewards)
    assert learned.figures() == {}


def test_predictions_of_a_file_are_those_of_its_rows(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_dir("llama")
    base = models.load(directory, dtype="float32")
    path = tmp_path / "pairs.jsonl"
    answers = [("good"[: 1 + n % 4] + str(n), f"{n}{'bad' * (n % 3)}") for n in range(7)]
    rows = [
        {"prompt": f"{n}: ", "chosen": each[n % 2], "rejected": each[1 - n % 2]}
        for n, each in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = adapted(directory)
    metrics, predictions, left = evaluate_preference_file(
        model, base.tokenizer, str(path), DataConfig(max_length=64), batch_size=3
    )
    assert not left
    plain = PreferenceLoss(beta=1.0)
    samples = [sample for row in rows for sample in as_samples(base.tokenizer, row)]
    ratios = rewards_by_formula(model, base.model, samples, plain)
    assert [each.where.rpartition(":")[2] for each in predictions] == [str(n + 1) for n in range(7)]
    for each, chosen, rejected in zip(predictions, ratios[0::2], ratios[1::2], strict=True):
        wanted = {"chosen": chosen, "rejected": rejected}
        assert each.choice_scores == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert each.choice == max(wanted, key=wanted.__getitem__)
    wanted = figures_by_formula(ratios)
    assert metrics == {name: wanted[name.replace("log_ratio", "reward")] for name in METRICS}
    assert 0 < metrics["preference_accuracy"] < 1, "answers of both kinds gained"


def as_samples(tokenizer: Any, row: dict[str, str]) -> list[Sample]:
    """Chosen and rejected: the prompt, and the answer with the end after it, which are learned."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answers = [
        [*tokenizer(row[name])["input_ids"], tokenizer.eos_token_id] for name in ("chosen", "rejected")
    ]
    return [Sample([*prompt, *answer], [IGNORED] * len(prompt) + answer) for answer in answers]


@pytest.mark.parametrize("loss", LOSSES, ids=["dpo", "smoothed", "ipo"])
def test_the_configuration_reaches_the_loss(
    loss: PreferenceLoss, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "2+2=", "chosen": "4", "rejected": "five"}\n')
    directory = tiny_dir("llama")
    words = [f"model.name={directory}", f"data.train={path}", f"output={tmp_path / 'run'}"]
    words += ["adapter.rank=4", f"training.loss={loss.kind}", f"training.dpo_beta={loss.beta}"]
    words += [f"training.dpo_label_smoothing={loss.label_smoothing}"]
    base = models.load(directory, dtype="float32")
    data = prepare_pairs(str(path), base.tokenizer, DataConfig(train=str(path)))
    made = objective(build(RunConfig, read_assignments(words)), data)
    assert made is not None
    model = adapted(directory)
    (batch,) = Loader(data.samples, 1, 40, packing=False, kind="pair").epoch(0)
    expected = by_formula(model, base.model, list(data.samples), loss)
    assert float(made.loss(model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_an_untrained_adapter_loses_log_two(tiny_dir: Callable[..., Path]) -> None:
    model = models.load(tiny_dir("llama"), dtype="float32").model
    attach(model, LoraConfig(rank=4))
    batches = list(Loader(pairs(), 2, 40, packing=False, kind="pair").epoch(0))
    tally = evaluate_preferences(model, batches, PreferenceLoss())
    assert tally.mean_loss == pytest.approx(math.log(2), abs=1e-7)
    figures = tally.figures("eval_")
    assert figures["eval_reward_margin"] == 0.0
    assert figures["eval_preference_accuracy"] == 0.0, "a tie is no preference"


def test_the_base_is_asked_without_dropout_and_without_the_adapter(tiny_dir: Callable[..., Path]) -> None:
    directory = tiny_dir("gpt2", resid_pdrop=0.5)
    model = adapted(directory, dropout=0.5).train()
    reference = models.load(directory, dtype="float32").model
    samples = pairs(3)
    (batch,) = Loader(samples, 3, 40, packing=False, shuffle=False, kind="pair").epoch(0)
    with torch.no_grad():
        before = torch.stack([log_probability(reference, sample, mean=False) for sample in samples])
    torch.manual_seed(3)
    losses, rows = labelled_losses(model, batch.input_ids, batch.position_ids, batch.labels)
    now = torch.zeros(6, dtype=torch.float64).index_add(0, rows, -losses.detach().double())
    # A base with dropout would also draw first from the stream that the model's dropout draws from.
    torch.manual_seed(3)
    found = log_ratios(model, batch).ratios.detach().double()
    torch.testing.assert_close(found, now - before, rtol=1e-5, atol=1e-4)
    assert model.training
    assert not torch.equal(found, log_ratios(model, batch).ratios.double()), "dropout acts on what trains"


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
