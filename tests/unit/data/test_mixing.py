"""Mixtures: the shares that were asked for, every row of a round once, epochs that follow from (seed,
epoch)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from graft.data.held import held
from graft.data.mixing import Joined, Mixture, shares
from graft.data.samples import Sample

SIZES = {"domain": 30, "general": 170}


def lengths(seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {name: generator.integers(2, 50, size).astype(np.int32) for name, size in SIZES.items()}


def flat(found: dict[str, Any]) -> Any:
    return np.concatenate(list(found.values()))


def sources_of(drawn: Any) -> Any:
    return np.searchsorted([SIZES["domain"]], drawn, side="right")


@pytest.mark.parametrize("domain", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_of_examples_are_right_to_one_row(domain: float, shuffle: bool) -> None:
    mixture = Mixture(lengths(), {"domain": domain, "general": 1 - domain}, shuffle=shuffle)
    for epoch in range(4):
        drawn = mixture(epoch)
        assert abs((sources_of(drawn) == 0).sum() - domain * 200) <= 1
        assert abs(drawn.size - 200) <= 1


@pytest.mark.parametrize("domain", [0.05, 0.15, 0.5, 0.9])
def test_shares_of_tokens_are_right_to_one_row(domain: float) -> None:
    found = lengths()
    total, longest = flat(found).sum(), flat(found).max()
    mixture = Mixture(found, {"domain": domain, "general": 1 - domain}, by="tokens")
    for epoch in range(4):
        drawn = mixture(epoch)
        tokens = [flat(found)[drawn[sources_of(drawn) == source]].sum() for source in (0, 1)]
        assert abs(tokens[0] - domain * total) <= longest
        assert abs(tokens[1] - (1 - domain) * total) <= longest


@pytest.mark.parametrize("by", ["examples", "tokens"])
def test_every_row_of_a_source_comes_before_any_comes_again(by: Any) -> None:
    mixture = Mixture(lengths(), {"domain": 0.4, "general": 0.6}, by=by)
    for source, (first, last) in enumerate([(0, 30), (30, 200)]):
        seen: Counter[int] = Counter()
        for epoch in range(5):
            drawn = mixture(epoch)
            for row in drawn[sources_of(drawn) == source].tolist():
                seen[row] += 1
            counts = [seen[row] for row in range(first, last)]
            # Within an epoch rounds are interleaved by their place, so the last round may be in part.
            assert max(counts) - min(counts) <= 1


def test_an_epoch_follows_from_seed_and_number_alone() -> None:
    def make(seed: int) -> Mixture:
        return Mixture(lengths(), {"domain": 0.4, "general": 0.6}, by="tokens", seed=seed)

    one, other = make(1), make(1)
    third = one(3)
    assert [one(epoch).tolist() for epoch in range(5)][3] == other(3).tolist() == third.tolist()
    assert len({tuple(one(epoch).tolist()) for epoch in range(5)}) == 5
    assert one(0).tolist() != make(2)(0).tolist()


def test_sources_take_turns_within_an_epoch() -> None:
    mixture = Mixture(lengths(), {"domain": 0.25, "general": 0.75}, shuffle=False)
    for epoch in (0, 1, 2):
        found = sources_of(mixture(epoch))
        for begin in range(0, 200, 40):
            assert abs((found[begin : begin + 40] == 0).sum() - 10) <= 1


@pytest.mark.parametrize("by", ["examples", "tokens"])
def test_each_round_of_a_source_has_another_order(by: Any) -> None:
    mixture = Mixture(lengths(), {"domain": 0.5, "general": 0.5}, by=by)
    drawn = np.concatenate([mixture(epoch) for epoch in range(2)])
    domain = drawn[drawn < 30]
    first, second = domain[:30].tolist(), domain[30:60].tolist()
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second


def test_without_shuffling_each_source_is_in_its_order() -> None:
    mixture = Mixture(lengths(), {"domain": 0.15, "general": 0.85}, shuffle=False)
    drawn = mixture(0)
    assert drawn[drawn < 30].tolist() == list(range(30))
    assert drawn[drawn >= 30].tolist() == list(range(30, 200))


def test_halves_of_pairs_stay_together() -> None:
    mixture = Mixture(lengths(), {"domain": 0.5, "general": 0.5}, size=2)
    drawn = mixture(1).reshape(-1, 2)
    assert (drawn[:, 0] % 2 == 0).all()
    assert (drawn[:, 1] == drawn[:, 0] + 1).all()
    assert abs((drawn[:, 0] < 30).sum() - 50) <= 1


def test_what_each_source_gives_is_told() -> None:
    domain, general = Mixture(lengths(), {"domain": 0.6, "general": 0.4}).sources()
    assert (domain.wanted, domain.got, domain.rounds) == (0.6, 0.6, 4.0)
    assert general.rounds == pytest.approx(80 / 170)
    assert domain.describe() == "domain: 60.00% wanted, 60.00% got, each row 4.00 times an epoch"
    assert general.describe() == "general: 40.00% wanted, 40.00% got, 47.1% of it an epoch"


def test_temperature_flattens_weights_and_sizes() -> None:
    weights = {"a": 0.8, "b": 0.2}
    sizes = {"a": 900, "b": 100}
    assert shares(weights, sizes, 1.0) == pytest.approx({"a": 0.8, "b": 0.2})
    assert shares(weights, sizes, 2.0) == pytest.approx({"a": 0.8**0.5 / (0.8**0.5 + 0.2**0.5), "b": 1 / 3})
    assert shares(dict.fromkeys(sizes), sizes, 1.0) == pytest.approx({"a": 0.9, "b": 0.1})
    assert shares(dict.fromkeys(sizes), sizes, 2.0) == pytest.approx({"a": 0.75, "b": 0.25})
    assert shares(dict.fromkeys(sizes), sizes, 1e9) == pytest.approx({"a": 0.5, "b": 0.5})
    assert shares({"a": 7.0, "b": 3.0}, sizes, 1.0) == pytest.approx({"a": 0.7, "b": 0.3})


def test_joined_samples_are_those_of_the_parts() -> None:
    parts = [
        [Sample([i] * (i + 1), [i] * (i + 1)) for i in range(begin, end)]
        for begin, end in ((0, 3), (3, 3), (3, 5))
    ]
    joined, plain = Joined([held(part) for part in parts]), [sample for part in parts for sample in part]
    assert len(joined) == 5
    assert list(joined) == plain
    assert [joined[i] for i in range(-5, 5)] == [plain[i] for i in range(-5, 5)]
    assert joined[1:4] == plain[1:4]
    assert joined.lengths.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        joined[5]
