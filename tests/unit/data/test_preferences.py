"""Preferences: what the columns may look like, what is learned, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.data.config import DataConfig
from graft.data.loader import Batch, Loader
from graft.data.masking import IGNORED
from graft.data.preferences import prepare_pairs
from graft.data.prepare import Dataset, prepare
from graft.data.splits import prepare_splits
from graft.errors import DataError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_dir: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_dir("llama"))


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Any) -> Callable[..., Dataset]:
    def make(*rows: Any, template: str | None = None, **config: Any) -> Dataset:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer.chat_template = template
        return prepare_pairs(str(path), tokenizer, DataConfig(train=str(path), **config))

    return make


def halves(data: Dataset, tokenizer: Any) -> list[tuple[str, str]]:
    """Of each sample the text before what is learned, and what is learned."""
    found = []
    for sample in data.samples:
        learned = [id for id in sample.labels if id != IGNORED]
        rest = sample.input_ids[: len(sample.input_ids) - len(learned)]
        found.append((tokenizer.decode(rest), tokenizer.decode(learned)))
    return found


USER = {"role": "user", "content": "why?"}
GOOD, BAD = {"role": "assistant", "content": "so"}, {"role": "assistant", "content": "no"}
CHAT = [("<|user|>why?</s><|assistant|>", "so</s>"), ("<|user|>why?</s><|assistant|>", "no</s>")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": "so", "rejected": "no"},
        {"prompt": "why?", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"instruction": "why?", "chosen": "so", "rejected": "no"},
        {
            "conversations": [{"from": "human", "value": "why?"}],
            "chosen": {"from": "gpt", "value": "so"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ],
    ids=["messages", "one message", "texts", "prompt text", "common begin", "alpaca", "sharegpt"],
)
def test_every_way_to_write_a_conversation(row: Any, prepared: Any, tokenizer: Any) -> None:
    data = prepared(row, template=CHATML)
    assert halves(data, tokenizer) == CHAT
    assert data.report.format == "preference_chat"


def test_texts_without_a_template(prepared: Any, tokenizer: Any) -> None:
    data = prepared({"prompt": "2+2=", "chosen": "4", "rejected": "5"})
    assert halves(data, tokenizer) == [("2+2=", "4</s>"), ("2+2=", "5</s>")]
    assert data.report.format == "preference"
    named = prepared({"instruction": "why?", "chosen": "so", "rejected": "no"})
    assert halves(named, tokenizer)[0] == ("### Instruction:\nwhy?\n\n### Response:\n", "so</s>")


def test_only_the_answers_are_learned_also_of_a_long_history(prepared: Any, tokenizer: Any) -> None:
    history = [USER, GOOD, USER]
    data = prepared({"prompt": history, "chosen": [GOOD], "rejected": [BAD]}, template=CHATML)
    assert [learned for _, learned in halves(data, tokenizer)] == ["so</s>", "no</s>"]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"prompt": "a", "chosen": "b"}, "'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' must hold"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' must hold"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "'chosen' must hold"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "does not end with an answer"),
        ({"prompt": [{"role": "usr", "content": "a"}], "chosen": [GOOD], "rejected": [BAD]}, "'usr'"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen: nothing to learn"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "both answers are the same"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row: Any, word: str, prepared: Any) -> None:
    with pytest.raises(DataError, match=word) as caught:
        prepared(row, template=CHATML)
    assert "pairs.jsonl" in str(caught.value)


def test_bad_rows_may_be_left_out(prepared: Any) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = prepared(good, {"prompt": "a", "chosen": "b"}, good, skip_invalid=True)
    assert len(data.samples) == 4
    assert data.report.num_duplicates == 1
    assert data.report.rejected[0][0].endswith("pairs.jsonl:2")


def test_what_is_too_long(prepared: Any) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    long = {"prompt": "aaaa", "chosen": "bbbb-one", "rejected": "bbbb-two"}
    cut = prepared(good, long, max_length=12)
    assert [len(sample.input_ids) for sample in cut.samples] == [3, 3, 12, 12]
    assert cut.report.num_truncated == 1
    same = prepared(good, long, max_length=9)
    assert "the same after the cut at max_length 9" in same.report.rejected[0][1]
    assert same.report.rejected[0][0].endswith("pairs.jsonl:2")
    dropped = prepared(good, long, max_length=12, on_overlong="drop")
    assert len(dropped.samples) == 2
    with pytest.raises(DataError, match="chosen: 13 tokens, more than max_length 12"):
        prepared(good, long, max_length=12, on_overlong="error")
    with pytest.raises(DataError, match="answer cut away"):
        prepared(long, max_length=4)


def documents_of(batch: Batch, row: int) -> list[list[int]]:
    """The ids of each document of a row, from the positions; the tokenizer's id of padding is 0."""
    found: list[list[int]] = []
    for position, token in zip(batch.position_ids[row].tolist(), batch.input_ids[row].tolist(), strict=True):
        if position == 0:
            found.append([])
        found[-1].append(token)
    return [part for part in found if any(part)]


def test_each_pair_is_that_of_its_row(prepared: Any, tokenizer: Any) -> None:
    rows = [{"prompt": f"p{n}: ", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    data = prepared(*rows)
    wanted = [(row["prompt"], f"{row[name]}</s>") for row in rows for name in ("chosen", "rejected")]
    assert halves(data, tokenizer) == wanted
    assert [s.where.rpartition(":")[2] for s in data.samples] == ["1", "1", "2", "2", "3", "3", "4", "4"]


def test_pairs_stay_together(prepared: Any) -> None:
    rows = [{"prompt": f"{n}: ", "chosen": "a" * (n + 1), "rejected": "b" * (9 - n)} for n in range(8)]
    samples = prepared(*rows).samples
    for packing in (False, True):
        loader = Loader(samples, 3, 24, packing, seed=1, kind="pair")
        batches = list(loader.epoch(0))
        flat = [index for batch in batches for row in batch.sample_ids for index in row]
        assert sorted(flat) == list(range(16))
        assert all(second == first + 1 for first, second in zip(flat[0::2], flat[1::2], strict=True))
        assert flat != sorted(flat)
        for batch in batches:
            held = [index for row in batch.sample_ids for index in row]
            assert loader.places(batch) == [f"pairs.jsonl:{index // 2 + 1}" for index in held]
            documents = [part for row in range(len(batch.sample_ids)) for part in documents_of(batch, row)]
            assert documents == [samples[index].input_ids for index in held]
        if packing:
            assert all(len(row) % 2 == 0 for batch in batches for row in batch.sample_ids)
            assert max(batch.input_ids.shape[1] for batch in batches) <= 48
        else:
            assert [len(batch.sample_ids) for batch in batches] == [6, 6, 4]


def test_holding_out_keeps_pairs_whole(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}: ", "chosen": "good", "rejected": "bad"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), eval_fraction=0.25)
    train, held_out = prepare_splits(tokenizer, config, read=prepare_pairs, kind="pair")
    assert held_out is not None
    assert (len(train.samples), len(held_out.samples)) == (30, 10)
    for data in (train, held_out):
        for chosen, rejected in zip(data.samples[0::2], data.samples[1::2], strict=True):
            assert chosen.where == rejected.where
            assert "good" in tokenizer.decode(chosen.input_ids)


def test_the_demonstration_file_of_another_tool(shared: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    path = shared / "datasets" / "instruct" / "dpo_en_demo.json"
    data = prepare_pairs(str(path), tokenizer, DataConfig(train=str(path), max_length=100_000))
    assert len(data.samples) == 2 * 300


def test_other_losses_point_to_the_right_one(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(DataError, match="preferences") as caught:
        prepare(str(path), tokenizer, DataConfig(train=str(path)))
    assert "training.loss to dpo" in caught.value.fix


@pytest.mark.parametrize("flag", ["train", "weight"])
def test_an_answer_that_is_not_to_be_learned_is_refused(prepared: Callable[..., Dataset], flag: str) -> None:
    row = {"prompt": [USER], "chosen": [{**GOOD, flag: False}], "rejected": [BAD]}
    with pytest.raises(DataError, match=f"a message with '{flag}': False"):
        prepared(row, template=CHATML)
    prepared({**row, "chosen": [{**GOOD, flag: True}]}, template=CHATML)
