"""From a file to samples: what the report counts, what is cut, left out, held out and shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.data import splits
from graft.data.config import DataConfig
from graft.data.masking import IGNORED, Encoder, Sample
from graft.data.prepare import Dataset, make_encoder, prepare, render_preview
from graft.data.report import shorten_sample, show_sample
from graft.data.splits import prepare_splits, split_eval
from graft.data.tokens import TextEncoder
from graft.errors import ConfigError, DataError

PAIRS = [{"prompt": f"Say the number {number}.", "completion": f" It is {number}"} for number in range(40)]


def prepared(path: str, tokenizer: Any, **config: Any) -> Dataset:
    return prepare(path, tokenizer, DataConfig(train=path, **config))


def test_the_report_counts_what_is_there(write: Any, tokenizer: Any) -> None:
    dataset = prepared(write([*PAIRS, PAIRS[0], {"prompt": "x", "completion": ""}]), tokenizer)
    report = dataset.report
    assert (report.num_rows, report.num_used, report.num_samples) == (42, 41, 41)
    assert report.num_tokens == sum(len(s.input_ids) for s in dataset.samples)
    assert report.num_labelled_tokens == sum(label != IGNORED for s in dataset.samples for label in s.labels)
    assert report.longest_tokens == max(len(s.input_ids) for s in dataset.samples)
    assert report.num_end_tokens == 41
    assert report.num_duplicates == 1
    assert report.rejected == [(f"{report.path}:42", "nothing to learn: the completion is empty")]
    assert report.reason == "the columns 'prompt' and 'completion' are there"
    assert json.loads(json.dumps(report.to_dict()))["num_rows"] == 42


def test_two_rows_are_shown_with_what_is_learned_marked(write: Any, tokenizer: Any) -> None:
    dataset = prepared(write(PAIRS), tokenizer)
    shown = dataset.report.preview
    assert len(shown) == 2
    assert shown[0] == "<|start_story|> Say the number 0.⟦ It is 0<|end_story|>⟧"
    for text, sample in zip(shown, dataset.samples, strict=False):
        assert text.replace("⟦", "").replace("⟧", "") == tokenizer.decode(sample.input_ids)
    assert dataset.samples[1].where in render_preview(dataset, tokenizer)
    assert show_sample(dataset.samples[0], tokenizer) == shown[0]


def test_a_long_text_is_split_and_a_long_answer_cut(write: Any, tokenizer: Any) -> None:
    words = "one two three four five six seven eight nine ten " * 10
    text = prepared(write([{"text": words}]), tokenizer, max_length=32)
    ids = [*tokenizer(words)["input_ids"], tokenizer.eos_token_id]
    assert [id for sample in text.samples for id in sample.input_ids] == ids
    assert (text.report.num_split, text.report.num_truncated, text.report.num_used) == (1, 0, 1)
    assert any("split into consecutive samples" in note for note in text.report.notes)
    path = write([{"prompt": "a", "completion": words}])
    cut = prepared(path, tokenizer, max_length=32)
    assert (len(cut.samples[0].input_ids), cut.report.num_truncated, cut.report.num_end_tokens) == (32, 1, 0)
    with pytest.raises(DataError, match="more than max_length 32") as caught:
        prepared(path, tokenizer, max_length=32, on_overlong="error")
    assert caught.value.where == f"{path}:1"
    both = write([{"prompt": "a", "completion": words}, PAIRS[0]])
    dropped = prepared(both, tokenizer, max_length=32, on_overlong="drop")
    assert [sample.where for sample in dropped.samples] == [f"{both}:2"]
    assert "more than max_length" in dropped.report.rejected[0][1]


def test_loss_on_all_learns_the_prompt_too(write: Any, tokenizer: Any) -> None:
    (sample, *_) = prepared(write(PAIRS), tokenizer, loss_on="all").samples
    assert sample.labels == [IGNORED, *sample.input_ids[1:]]
    with pytest.raises(DataError, match="no completion"):
        prepared(write([{"text": "x"}]), tokenizer, loss_on="completion")


def test_the_digest_is_of_the_rows_not_of_the_bytes(write: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = write(PAIRS)
    other = tmp_path / "other.json"
    other.write_text("\ufeff" + json.dumps(PAIRS, indent=3).replace("\n", "\r\n"), newline="")
    digest = prepared(path, tokenizer).digest
    assert prepared(str(other), tokenizer).digest == digest
    assert prepared(write([*PAIRS[:-1], PAIRS[0]], "changed.jsonl"), tokenizer).digest != digest
    assert prepared(write(PAIRS[::-1], "turned.jsonl"), tokenizer).digest != digest
    assert prepared(write(PAIRS, "more.jsonl"), tokenizer, limit=39).digest != digest


def test_a_limit_takes_the_first_rows(write: Any, tokenizer: Any) -> None:
    dataset = prepared(write(PAIRS), tokenizer, limit=3)
    assert [sample.where.rsplit(":", 1)[1] for sample in dataset.samples] == ["1", "2", "3"]


def test_overlap_between_training_and_evaluation_is_told(write: Any, tokenizer: Any) -> None:
    train, held_out = write(PAIRS[:30]), write(PAIRS[25:], "eval.jsonl")
    _, evaluation = prepare_splits(tokenizer, DataConfig(train=train, eval=held_out))
    assert evaluation is not None
    assert evaluation.report.num_overlap == 5
    assert "5 of 15 rows are also in the training data" in evaluation.report.notes


def test_a_share_is_held_out_by_content(write: Any, tokenizer: Any) -> None:
    config = DataConfig(train=write([*PAIRS, *PAIRS[:10]]), eval_fraction=0.2)
    train, held_out = prepare_splits(tokenizer, config, seed=1)
    assert held_out is not None
    assert len(train.samples) + len(held_out.samples) == 50
    assert 10 <= len(held_out.samples) <= 12
    kept, held = ({tuple(s.input_ids) for s in part.samples} for part in (train, held_out))
    assert not kept & held
    assert held_out.report.num_samples == len(held_out.samples)
    again = prepare_splits(tokenizer, config, seed=1)[1]
    other = prepare_splits(tokenizer, config, seed=2)[1]
    assert again is not None
    assert other is not None
    assert [s.where for s in again.samples] == [s.where for s in held_out.samples]
    assert {tuple(s.input_ids) for s in other.samples} != held


def test_only_length_is_an_error_where_length_is_one(write: Any, tokenizer: Any) -> None:
    found = prepared(write([*PAIRS, {"prompt": "a", "completion": ""}]), tokenizer, on_overlong="error")
    assert found.report.num_rejected == 1
    assert found.report.num_used == len(PAIRS)


def test_other_weights_are_another_data_set(write: Any, tokenizer: Any, tmp_path: Path) -> None:
    """By the digest alone a run that goes on knows: paths and weights of a mixture stand in one field."""
    one, two = write(PAIRS), str(tmp_path / "two.jsonl")
    Path(two).write_text(Path(one).read_text())
    digests = {
        prepare_splits(tokenizer, DataConfig(mix={one: 1.0, two: weight}))[0].digest
        for weight in (1.0, 2.0, 2.0)
    }
    assert len(digests) == 2


def test_equal_rows_cannot_be_split(write: Any, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    dataset = prepared(write([PAIRS[0]] * 9), tokenizer)
    with pytest.raises(DataError, match="1 different samples"):
        split_eval(dataset, 0.1, 0, encoder)


def test_a_directory_gives_its_splits(tmp_path: Path, write: Any, tokenizer: Any) -> None:
    write(PAIRS[:30], "train.jsonl")
    write(PAIRS[30:], "valid.jsonl")
    train, held_out = prepare_splits(tokenizer, DataConfig(train=str(tmp_path), eval=str(tmp_path)))
    assert held_out is not None
    assert (len(train.samples), len(held_out.samples)) == (30, 10)


def test_a_place_is_what_it_is_however_the_source_was_written(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"prompt": "a", "completion": " b"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    (texts / name).write_text("a b")
    sources: dict[str, Any] = {"row 1": [row], f"texts/{name}:1": "./texts"}
    sources |= {"train.jsonl:1": "./train.jsonl", f"{tmp_path}/train.jsonl:1": f"{tmp_path}//train.jsonl"}
    for where, source in sources.items():
        assert [sample.where for sample in prepare(source, tokenizer, DataConfig()).samples] == [where]
    assert prepare(".", tokenizer, DataConfig()).samples[0].where == "train.jsonl:1"


def test_a_directory_of_texts_is_a_document_each(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"story {name}")
    dataset = prepared(str(tmp_path), tokenizer)
    assert [Path(sample.where).name for sample in dataset.samples] == ["a.txt:1", "b.txt:1"]


def test_what_a_tokenizer_cannot_spell_is_told(write: Any, tokenizer: Any) -> None:
    notes = prepared(write([{"prompt": "a # b", "completion": "c"}]), tokenizer).report.notes
    assert notes == ["characters that the tokenizer does not know: #"]
    assert tokenizer.decode(tokenizer("#", add_special_tokens=False)["input_ids"]).strip() == ""


def test_a_spelled_control_token_and_an_added_end_are_told(
    write: Any, tokenizer: Any, tmp_path: Path
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + ' | ' }}{% endfor %}")
    chat = [{"role": "user", "content": "<|end_story|>"}, {"role": "assistant", "content": "b"}]
    path = write([{"messages": chat}])
    dataset = prepared(path, tokenizer, chat_template=str(template))
    assert dataset.samples[0].input_ids.count(tokenizer.eos_token_id) == 1
    assert dataset.samples[0].labels[-1] == tokenizer.eos_token_id
    assert any("spelling a control token" in note for note in dataset.report.notes)
    assert any("ended with the end-of-text token" in note for note in dataset.report.notes)


def test_a_tokenizer_without_an_end_is_refused(shared: Path, write: Any) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    assert bare.eos_token is None
    with pytest.raises(DataError, match="no end-of-text token"):
        prepared(write(PAIRS), bare)


def test_pad_may_be_the_end(write: Any, tokenizer: Any) -> None:
    # Masking every label that equals the padding id once taught models never to stop.
    from transformers import AutoTokenizer

    same = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    same.pad_token = same.eos_token
    assert prepared(write(PAIRS), same).report.num_end_tokens == len(PAIRS)


@pytest.mark.parametrize("name", ["models/tinystories-656k", "models/stories260k-hf", "tokenizers/gpt2"])
def test_the_copied_tokenizer_gives_the_same_ids(shared: Path, name: str) -> None:
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(shared / name)
    encoder = TextEncoder(original)
    text = (shared / "datasets" / "books" / "black-beauty.txt").read_text()[:40_000]
    lines = [text, *text.split("\n"), "", " ", "  two", "é👍🏽\u200b", "a</s>b<|endoftext|> <|end_story|>"]
    expected = original(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [encoding.ids for encoding in encoder.encode(lines)] == expected
    assert encoder.bos_ids == ([original.bos_token_id] if original.bos_token_id is not None else [])


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"max_length": 1}, "data.max_length"),
        ({"eval_fraction": 1.0}, "data.eval_fraction"),
        ({"eval_fraction": 0.1, "eval": "x"}, "data.eval_fraction"),
        ({"limit": 0}, "data.limit"),
        ({"train": ""}, "data.train"),
        ({"eval": ""}, "data.eval"),
        ({"cache": ""}, "data.cache"),
        ({"cache": "False"}, "data.cache"),
    ],
)
def test_a_setting_out_of_range_is_refused(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**fields)
    assert caught.value.where == where


def test_a_template_of_the_user_is_used_for_prompts_as_well(tmp_path: Path, tokenizer: Any) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    encoder = make_encoder(tokenizer, DataConfig(chat_template=str(template)))
    ids = encoder.prompt([{"role": "user", "content": "hello"}])
    assert ids == tokenizer("hello<|end_story|>", add_special_tokens=False)["input_ids"]
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="not a template") as caught:
        make_encoder(tokenizer, DataConfig(chat_template=str(tmp_path / "bad.jinja")))
    assert caught.value.where.endswith("bad.jinja:1")


def test_a_shown_sample_is_shortened_so_that_what_is_learned_stays() -> None:
    long = "ask " * 500
    shown = f"{long}\nthen⟦ first{long}<end>⟧\nagain⟦ second<end>⟧"
    short = shorten_sample(shown)
    assert "\n" not in short
    assert len(short) <= 600
    assert short.startswith("ask ask")
    assert "⏎then⟦ first" in short
    assert short.endswith("<end>⟧⏎again⟦ second<end>⟧")
    assert shorten_sample("a\n⟦ b⟧") == "a⏎⟦ b⟧"
    assert len(shorten_sample("a⟦b⟧" * 1000)) == 600


def test_equal_halves_of_a_digest_are_no_overlap(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the evaluation samples one shares 64 bits of its digest with a training sample, one all 128."""
    keys = {1: [(5, 6), (7, 8)], 2: [(5, 9), (7, 8), (4, 6)]}

    def figures(given: list[Any], control_ids: Any) -> Any:
        return np.array([(key,) for key in keys[len(given)]], dtype=[("key", np.uint64, 2)])

    monkeypatch.setattr(splits, "figures_of", figures)
    train, held_out = [Sample([1], [1])], [Sample([1], [1])] * 2
    assert splits.count_overlap(train, held_out, Encoder(tokenizer)) == 1
