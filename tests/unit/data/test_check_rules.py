"""The rules of a data check: each finds its own fault in facts that have it, none in clean facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from graft.data.check.bins import bins, width_of
from graft.data.check.facts import Facts, Packed, Place, quantile
from graft.data.check.faults import ROUND, needed_length
from graft.data.check.rules import LEVELS, RULES, find
from graft.data.config import DataConfig

PACKED = Packed(num_rows=40, num_steps=5, utilisation=0.95, packing=True, first=((0, 1),), row_tokens=256)


def counted(*values: int) -> Any:
    return np.bincount(np.asarray(values))


CLEAN = Facts(
    split="training",
    path="rows.jsonl",
    format="messages",
    template="the tokenizer's own",
    has_template=True,
    max_length=256,
    asked_max_length=256,
    context=2048,
    num_rows=100,
    num_used=100,
    num_samples=100,
    num_tokens=10_000,
    num_labelled=4_000,
    lengths=counted(*range(51, 151)),
    labelled=counted(*([40] * 100)),
    num_looked_at=100,
    packed=PACKED,
)
PLAIN = {"format": "prompt_completion", "template": "", "has_template": False}
CLASS = {"kind": "class", "format": "classification", "num_labelled": 100, "labelled": counted(*([1] * 100))}

FAULTS: dict[str, dict[str, Any]] = {
    "stops": {"error": "rows.jsonl:7: not JSON"},
    "templated": {"num_templated": 21, "num_control_text": 21},
    "begin_twice": {"num_bos_twice": 1},
    "no_begin": {"num_bos_missing": 2},
    "no_end": {"num_without_end": 2},
    "overlap": {"num_overlap": 1},
    "little_learned": {"num_labelled": 99},
    "all_learned": {"num_labelled": 9_801},
    "truncated": {"num_truncated": 6, "num_without_end": 6, "num_cut_ends": 6},
    "class_cut": {**CLASS, "num_truncated": 6},
    "dropped": {"num_dropped": 2, "num_rejected": 2},
    "rejected": {"num_rejected": 1, "places": {"rejected": (Place("rows.jsonl:3", "the text is empty"),)}},
    "duplicates": {"num_duplicates": 2},
    "near_duplicates": {"num_near": 6},
    "unknown": {"num_unknown": 1},
    "odd": {"odd": (("blank_answer", 2), ("mojibake", 1))},
    "short_answers": {"labelled": counted(*([3] * 51), *([9] * 49))},
    "plain_rows": {"format": "prompt_completion", "template": ""},
    "no_template": {"format": "alpaca", "template": "", "has_template": False},
    "unused": {"unused": ("id",)},
    "padding": {"packed": replace(PACKED, packing=False, utilisation=0.5)},
    "far_too_long": {"max_length": 1200, "asked_max_length": 1200},
    "context": {"asked_max_length": 300},
    "rare_class": {**CLASS, "classes": (("a", 21), ("b", 1))},
    "control_text": {"num_control_text": 1},
    "length_bias": {"kind": "pair", "format": "preference_chat", "preferred": (60, 40)},
}
"""Of each rule the least change that makes its fault."""


def names(*splits: Facts) -> list[str]:
    return [finding.rule for finding in find(splits)]


def test_clean_facts_have_no_finding() -> None:
    assert names(CLEAN) == []
    assert names(replace(CLEAN, **PLAIN)) == []
    assert names(replace(CLEAN, **CLASS, classes=(("a", 20), ("b", 1)))) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_finds_its_fault_and_no_other_does(rule: Any) -> None:
    (finding,) = find([replace(CLEAN, **FAULTS[rule.name])])
    assert (finding.rule, finding.level, finding.split) == (rule.name, rule.level, "training")
    assert finding.what
    assert finding.why
    assert finding.fix


@pytest.mark.parametrize(
    ("rule", "below"),
    {
        "templated": {"num_templated": 20},
        "no_end": {"num_without_end": 1},
        "little_learned": {"num_labelled": 100},
        "all_learned": {"num_labelled": 9_800},
        "truncated": {"num_truncated": 5, "num_without_end": 5, "num_cut_ends": 5},
        "class_cut": {**CLASS, "num_truncated": 5},
        "dropped": {"num_dropped": 1, "num_rejected": 1},
        "duplicates": {"num_duplicates": 1},
        "near_duplicates": {"num_near": 5},
        "odd": {"odd": (("blank_answer", 1),)},
        "short_answers": {"labelled": counted(*([3] * 49), *([9] * 51))},
        "padding": {"packed": replace(PACKED, packing=False, utilisation=0.6)},
        "far_too_long": {"max_length": 1199, "asked_max_length": 1199},
        "length_bias": {"kind": "pair", "format": "preference_chat", "preferred": (59, 40)},
        "no_begin": {"num_bos_missing": 1},
    }.items(),
)
def test_at_its_threshold_a_rule_is_silent(rule: str, below: dict[str, Any]) -> None:
    assert rule not in names(replace(CLEAN, **below))


def test_the_worst_comes_first_and_both_splits_are_told_once() -> None:
    many = replace(CLEAN, unused=("id",), num_duplicates=9, num_bos_twice=3, error="x")
    found = find([many, replace(many, split="evaluation", error="")])
    levels = [LEVELS.index(finding.level) for finding in found]
    assert levels == sorted(levels)
    assert [finding.rule for finding in found] == ["stops", "begin_twice", "duplicates", "unused"]
    other = replace(many, split="evaluation", error="", num_duplicates=8)
    assert [f.split for f in find([many, other]) if f.rule == "duplicates"] == ["training", "evaluation"]


def test_a_length_that_the_user_did_not_set_is_not_told() -> None:
    assert names(replace(CLEAN, asked_max_length=DataConfig.max_length)) == []


def test_the_advised_length_keeps_99_percent_of_the_rows() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(50, 1500, size=2000)
    cut = np.minimum(true, 256)
    facts = replace(
        CLEAN,
        num_rows=2000,
        num_used=2000,
        num_samples=2000,
        lengths=np.bincount(cut),
        num_truncated=int((true > 256).sum()),
        needed=tuple(int(length) for length in true[true > 256]),
    )
    assert needed_length(facts) == int(np.sort(true)[int(np.ceil(0.99 * 2000)) - 1])
    (finding,) = find([facts])
    advised = -(-needed_length(facts) // ROUND) * ROUND
    assert f"data.max_length {advised} would keep 99 %" in finding.fix
    assert "shorten the rows" in find([replace(facts, context=512)])[0].fix
    # A part of the long rows stands for all of them.
    part = tuple(facts.needed[:400])
    assert abs(needed_length(replace(facts, needed=part)) - needed_length(facts)) < 60


def test_quantiles_are_those_of_sorted_values() -> None:
    values = np.random.default_rng(1).integers(0, 90, size=333)
    for share in (0.001, 0.5, 0.9, 0.99, 1.0):
        rank = max(int(np.ceil(share * len(values))), 1)
        assert quantile(np.bincount(values), share) == np.sort(values)[rank - 1]
    assert quantile(np.zeros(3, dtype=int), 0.5) == 0


def test_bins_have_all_values_and_round_widths() -> None:
    values = np.random.default_rng(2).integers(0, 777, size=500)
    counts = np.bincount(values)
    for most in (1, 7, 12, 40):
        width = width_of(int(values.max()), most)
        assert str(width).rstrip("0") in ("1", "2", "5")
        found = bins(counts, width, int(values.max()))
        assert len(found) <= most
        assert [item.count for item in found] == [
            int(((values >= item.begin) & (values <= item.last)).sum()) for item in found
        ]
        assert sum(item.count for item in found) == 500
