from __future__ import annotations

import builtins
import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import ConfigError
from graft.evaluate.metrics import (
    METRICS,
    Metric,
    Prediction,
    find_metrics,
    longest_common_subsequence,
    register_metric,
    rouge_l,
)


def _rows(*pairs: tuple[str, str]) -> list[Prediction]:
    return [Prediction(where="", prediction=text, reference=reference) for text, reference in pairs]


def _lcs(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    @cache
    def best(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + best(i + 1, j + 1)
        return max(best(i + 1, j), best(i, j + 1))

    return best(0, 0)


@given(st.lists(st.sampled_from("abcd"), max_size=20), st.lists(st.sampled_from("abcd"), max_size=20))
def test_longest_common_subsequence_is_its_recurrence(first: list[str], second: list[str]) -> None:
    assert longest_common_subsequence(first, second) == _lcs(tuple(first), tuple(second))


def test_rouge_l_is_the_harmonic_mean_of_recall_and_precision() -> None:
    # "police the gunman": two of three words in order, of a reference of four (Lin 2004, section 3.1, S3).
    precision, recall = 2 / 3, 2 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("The gunman POLICE!", "police killed the gunman") == pytest.approx(expected)
    assert rouge_l("", "something") == rouge_l("...", "") == 0.0
    assert rouge_l("Ünïcode wörds", "ünïcode wörds?") == 1.0


def test_exact_match_ignores_only_white_space_at_the_ends() -> None:
    rows = _rows((" LOC\n", "LOC"), ("loc", "LOC"), ("LOC .", "LOC"), ("LOC", " LOC"))
    assert METRICS["exact_match"].compute(rows) == 2 / 4


def test_bleu_is_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rows = _rows(
        ("the cat sat on a mat today", "the cat sat on the mat today"), ("a dog ran home", "the dog ran home")
    )
    expected = sacrebleu.corpus_bleu(
        [row.prediction for row in rows], [[row.reference for row in rows]]
    ).score
    assert METRICS["bleu"].compute(rows) == expected


def test_bleu_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sacrebleu":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError) as error:
        METRICS["bleu"].compute(_rows(("a", "a")))
    assert error.value.fix == "pip install sacrebleu"


def test_loss_metrics_weigh_tokens_and_characters() -> None:
    rows = [
        Prediction(where="", loss=6.0, num_labelled_tokens=2, num_labelled_characters=10),
        Prediction(where="", loss=1.0, num_labelled_tokens=5, num_labelled_characters=4),
    ]
    assert METRICS["loss"].compute(rows) == 7 / 7
    assert METRICS["perplexity"].compute(rows) == math.e
    assert METRICS["bits_per_character"].compute(rows) == pytest.approx(7 / math.log(2) / 14)


def test_accuracy_per_token_does_not_put_long_choices_back() -> None:
    row = Prediction(
        where="",
        reference="long one",
        choice="short",
        choice_scores={"short": -2.0, "long one": -3.0},
        choice_tokens={"short": 1, "long one": 3},
    )
    assert METRICS["accuracy"].compute([row]) == 0.0
    assert METRICS["accuracy_per_token"].compute([row]) == 1.0


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="no metric 'exact-match'") as error:
        find_metrics(["loss", "exact-match"])
    assert "exact_match" in error.value.fix
    with pytest.raises(ConfigError, match="no metric was named"):
        find_metrics([])


def test_a_metric_of_ones_own_is_found_and_no_name_is_taken_twice() -> None:
    metric = Metric(name="num_words", doc="", need="text", better="max", compute=len)
    try:
        register_metric(metric)
        assert find_metrics(["num_words", "loss", "num_words"]) == [metric, METRICS["loss"]]
        with pytest.raises(ConfigError, match="exists already"):
            register_metric(metric)
    finally:
        METRICS.pop("num_words", None)
