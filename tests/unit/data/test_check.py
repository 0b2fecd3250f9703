"""The facts of a data check, of files that have one fault each, counted against the samples themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.config import Settings, build
from graft.data.check.rows import row_of, template_marks
from graft.data.check.samples import CONTROL, END, LEARNED, show
from graft.data.filters import cleaning
from graft.data.masking import Encoder
from graft.data.samples import IGNORED, Sample
from graft.training.config import RunConfig
from graft.training.data_check import Checked, check_data

BEGINS = ("be", "ca", "di", "fo", "gu", "la", "me", "ni", "po", "ru")
WORDS = [begin + end for begin in BEGINS for end in ("ran", "sel", "tim", "von", "lus")]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(number: int, words: int = 12) -> str:
    generator = random.Random(number)
    return " ".join(generator.choice(WORDS) for _ in range(words))


def chat(number: int, user: str = "", answer: str = "") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": user or said(number)},
            {"role": "assistant", "content": answer or said(number + 1000)},
        ]
    }


CLEAN = [chat(number) for number in range(60)]


@pytest.fixture
def check(tmp_path: Path) -> Any:
    def run(rows: list[Any], held_out: list[Any] | None = None, **settings: Any) -> Checked:
        values = {"data.max_length": 256, **settings}
        for name, lines in (("train", rows), ("eval", held_out)):
            if lines is not None:
                path = tmp_path / f"{name}.jsonl"
                texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
                path.write_text("\n".join(texts), encoding="utf-8")
                values[f"data.{name}"] = str(path)
        given = Settings()
        for name, value in values.items():
            given.put(name, value, "the test")
        return check_data(build(RunConfig, given))

    return run


def rules(found: Checked) -> list[str]:
    return [finding.rule for finding in found.findings]


def test_a_clean_file_has_no_finding(check: Any) -> None:
    found = check(CLEAN, [chat(number) for number in range(2000, 2010)])
    assert found.findings == ()
    assert found.trainable


def template(tmp_path: Path, source: str) -> dict[str, str]:
    path = tmp_path / "template.jinja"
    path.write_text(source)
    return {"data.chat_template": str(path)}


def test_rows_that_were_rendered_before(check: Any) -> None:
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    rows = [chat(n, user=text.format(said(n)), answer=said(n + 1000) + "<|im_end|>") for n in range(60)]
    found = check(rows)
    assert rules(found) == ["templated"]
    facts = found.facts[0]
    assert (facts.num_templated, facts.num_looked_at, facts.num_control_text) == (60, 60, 60)
    plain = [{"prompt": text.format(said(n)), "completion": said(n) + "<|im_end|>"} for n in range(60)]
    assert rules(check(plain)) == ["templated", "plain_rows"]


def test_one_row_that_spells_a_control_token_is_only_noted(check: Any) -> None:
    found = check([*CLEAN, chat(99, user="what does <|im_end|> mean?")])
    assert rules(found) == ["control_text"]
    assert [place.where.rpartition(":")[2] for place in found.facts[0].places["control text"]] == ["61"]


def test_marks_of_a_template_are_lines_with_brackets(tmp_path: Path) -> None:
    from graft.models.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer("builtin"), chat_template=CHATML)
    assert "<|im_start|>assistant" in template_marks(encoder)
    assert all(len(mark) >= 4 for mark in template_marks(encoder))


def test_two_begin_tokens_and_none(check: Any, tmp_path: Path) -> None:
    found = check(CLEAN, **template(tmp_path, "{{ bos_token }}" + CHATML))
    assert rules(found) == ["begin_twice"]
    assert found.facts[0].num_bos_twice == 60
    found = check(CLEAN, **template(tmp_path, CHATML.replace("{{ bos_token }}", "")))
    assert rules(found) == ["no_begin"]
    assert found.facts[0].num_bos_missing == 60


def test_answers_without_a_learned_end(check: Any, tmp_path: Path) -> None:
    found = check([*CLEAN[:59], chat(70, answer=said(70 + 3000, 500))])
    facts = found.facts[0]
    assert (facts.num_truncated, facts.num_without_end, facts.num_cut_ends) == (1, 1, 1)
    assert rules(found) == []  # one in sixty is below the threshold
    assert facts.places["no end"][0].told == "cut away"


def test_truncated_rows_and_the_length_that_keeps_them(check: Any) -> None:
    rows = [*CLEAN, *(chat(n, answer=said(n + 3000, 2 * (n - 60))) for n in range(80, 120))]
    found = check(rows, **{"data.max_length": 128})
    assert rules(found) == ["truncated"]
    fix = found.findings[0].fix
    advised = int(fix.split()[1])
    again = check(rows, **{"data.max_length": advised})
    assert again.facts[0].num_truncated <= 1
    below = check(rows, **{"data.max_length": advised - 128})
    assert below.facts[0].num_truncated > 1


def test_rows_left_out_for_their_length(check: Any) -> None:
    rows = [*CLEAN, *(chat(n, answer=said(n + 3000, 300)) for n in range(5))]
    found = check(rows, **{"data.on_overlong": "drop"})
    assert rules(found) == ["dropped"]
    facts = found.facts[0]
    assert (facts.num_rows, facts.num_used, facts.num_rejected, facts.num_dropped) == (65, 60, 5, 5)
    stopped = check(rows, **{"data.on_overlong": "error"})
    assert not stopped.trainable
    assert rules(stopped)[0] == "stops"


def test_duplicates_and_overlap_name_both_places(check: Any) -> None:
    found = check([*CLEAN, CLEAN[3], CLEAN[4]])
    assert rules(found) == ["duplicates"]
    told = [
        (place.where.rpartition(":")[2], place.told.rpartition(":")[2])
        for place in found.facts[0].places["duplicate"]
    ]
    assert told == [("61", "4"), ("62", "5")]
    found = check(CLEAN, [chat(5000), CLEAN[7]])
    assert rules(found) == ["overlap"]
    (place,) = found.facts[1].places["overlap"]
    assert place.where.endswith("eval.jsonl:2")
    assert place.told.endswith("train.jsonl:8")


def test_all_rows_are_looked_at_also_of_a_large_file(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run looks at the first rows only and says that the check looks at all."""
    monkeypatch.setattr(cleaning, "LOOKED_AT", 10)
    found = check([*map(chat, range(20)), chat(30, answer="N/A")])
    assert "placeholder" in found.datasets[0].report.places
    assert not [note for note in found.datasets[0].report.notes if "were looked at" in note]


def test_rows_that_stop_a_run_are_shown_beside_the_rest(check: Any) -> None:
    rows = [*CLEAN, '{"messages": [broken', {"messages": []}, {"other": 1}]
    found = check(rows)
    assert rules(found) == ["stops"]
    assert not found.trainable
    assert found.error is not None
    assert found.error.where.endswith("train.jsonl:61:15")
    facts = found.facts[0]
    assert (facts.num_rows, facts.num_used, facts.num_rejected) == (63, 60, 3)
    assert "2 more rows" in found.findings[0].what
    assert facts.raw[f"{facts.path}:63"] == '{"other": 1}'
    lenient = check(rows, **{"data.skip_invalid": True})
    assert lenient.trainable
    assert rules(lenient) == ["rejected"]


def test_learned_shares(check: Any) -> None:
    assert rules(check(CLEAN, **{"data.loss_on": "all"})) == ["all_learned"]
    long = [chat(n, user=said(n, 120), answer="x") for n in range(30)]
    assert rules(check(long, **{"data.max_length": 512})) == ["little_learned", "short_answers"]
    short = [
        {"messages": chat(n)["messages"][:1] + [{"role": "assistant", "content": "x"}]} for n in range(60)
    ]
    assert rules(check(short, **{"data.max_length": 128})) == ["short_answers"]


def test_columns_that_nothing_reads(check: Any) -> None:
    found = check([{**row, "id": 1, "other": 2} for row in CLEAN])
    assert rules(found) == ["unused"]
    assert found.facts[0].unused == ("id", "other")


def test_no_packing_pads(check: Any) -> None:
    rows = [chat(n, answer=said(n + 3000, 5 if n % 8 else 60)) for n in range(64)]
    found = check(rows, **{"data.packing": False})
    assert rules(found) == ["padding"]


def test_classification_and_preferences_are_checked_as_their_runs_see_them(check: Any) -> None:
    texts = [{"text": said(n), "label": "odd" if n % 2 else "even"} for n in range(60)]
    found = check(texts, task="classification", **{"data.max_length": 64})
    assert found.facts[0].kind == "class"
    assert found.facts[0].classes == (("even", 30), ("odd", 30))
    assert found.facts[0].places == {}
    assert rules(found) == []
    rare = [{**row, "label": "odd" if n == 5 else "even"} for n, row in enumerate(texts)]
    assert rules(check(rare, task="classification", **{"data.max_length": 64})) == ["rare_class"]
    pairs = [
        {"prompt": chat(n)["messages"][:1], "chosen": said(n + 50, 14), "rejected": said(n + 90, 12)}
        for n in range(40)
    ]
    for row in pairs:
        row["chosen"], row["rejected"] = (
            {"role": "assistant", "content": row[name]} for name in ("chosen", "rejected")
        )
    found = check([*pairs, pairs[1]], **{"training.loss": "dpo", "adapter.method": "lora"})
    facts = found.facts[0]
    assert (facts.kind, facts.num_samples, facts.num_units, facts.num_duplicates) == ("pair", 82, 41, 1)
    assert rules(found) == ["duplicates"]
    assert [place.where.rpartition(":")[2] for place in facts.places["duplicate"]] == ["41"]


def test_counts_are_those_of_the_samples(check: Any) -> None:
    rows = [chat(n, answer=said(n + 3000, 1 + n)) for n in range(90)]
    found = check(rows)
    facts, samples = found.facts[0], found.datasets[0].samples
    lengths = [len(sample.input_ids) for sample in samples]
    learned = [sum(label != IGNORED for label in sample.labels) for sample in samples]
    assert facts.lengths.tolist() == np.bincount(lengths).tolist()
    assert facts.labelled.tolist() == np.bincount(learned).tolist()
    assert facts.labelled_by_length.tolist() == np.bincount(lengths, weights=learned).tolist()
    assert (facts.num_tokens, facts.num_labelled, facts.longest) == (sum(lengths), sum(learned), max(lengths))
    shares = [number / length for number, length in zip(learned, lengths, strict=True)]
    assert list(facts.chosen["longest"]) == sorted(range(90), key=lambda i: (-lengths[i], i))[:20]
    assert list(facts.chosen["shortest"]) == sorted(range(90), key=lambda i: (lengths[i], i))[:20]
    assert list(facts.chosen["least labelled"]) == sorted(range(90), key=lambda i: (shares[i], i))[:20]
    drawn = facts.chosen["random"]
    assert drawn[:2] == (0, 1)
    assert len(set(drawn)) == 20
    assert json.loads(json.dumps(facts.to_dict()))["labelled_share"] == sum(learned) / sum(lengths)
    assert sum(item["samples"] for item in facts.to_dict()["histogram"]) == 90


def test_the_rows_of_an_epoch_are_the_loaders(check: Any) -> None:
    found = check(CLEAN, **{"training.gradient_accumulation_steps": 2, "training.batch_size": 3})
    packed = found.facts[0].packed
    assert packed is not None
    batches = -(-packed.num_rows // 3)
    assert packed.num_steps == -(-batches // 2)
    assert packed.row_tokens == 256
    assert 0.5 < packed.utilisation <= 1


def test_a_sample_is_shown_token_by_token(check: Any) -> None:
    found = check([chat(1, answer="漢字 🦊 fox"), *CLEAN])
    sample, encoder = found.datasets[0].samples[0], found.encoder
    shown = show(0, sample, encoder)
    assert list(shown.ids) == sample.input_ids
    whole = encoder.tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)
    assert "".join(shown.pieces) == whole
    assert "🦊" in shown.pieces
    assert [bool(flag & LEARNED) for flag in shown.flags] == [label != IGNORED for label in sample.labels]
    assert [bool(flag & CONTROL) for flag in shown.flags] == [
        id in encoder.text.control_ids for id in sample.input_ids
    ]
    ends = [place for place, flag in enumerate(shown.flags) if flag & END]
    assert [shown.pieces[place] for place in ends] == ["<|im_end|>"]
    part = show(0, sample, encoder, most=12)
    assert (len(part.ids), part.gap, part.num_tokens) == (12, 8, len(sample.input_ids))
    assert part.ids == (*sample.input_ids[:8], *sample.input_ids[-4:])


def test_a_place_leads_to_its_row() -> None:
    assert row_of("a/b.jsonl:7") == "a/b.jsonl:7"
    assert row_of("a/b.jsonl:7:15") == "a/b.jsonl:7"
    assert row_of("a/b.jsonl:7, message 2") == "a/b.jsonl:7"
    assert row_of("a/b.json:rows[3]") == "a/b.json:rows[3]"


def test_rows_of_one_line_are_not_mixed_up(check: Any, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps([*CLEAN[:5], CLEAN[0]]))
    given = Settings()
    for name, value in {"data.train": str(path), "data.max_length": 256}.items():
        given.put(name, value, "the test")
    facts = check_data(build(RunConfig, given)).facts[0]
    assert facts.num_duplicates == 1
    assert set(facts.raw.values()) == {"(several rows have this place)"}


def test_split_texts_have_one_end_and_no_finding(check: Any) -> None:
    found = check([{"text": said(n, 400)} for n in range(8)], **{"data.max_length": 128})
    facts = found.facts[0]
    assert facts.num_split == 8
    assert facts.num_samples > 8
    assert facts.num_without_end == 0
    assert found.findings == ()


def test_spaces_of_a_sentencepiece_tokenizer_are_kept(tinystories: Path) -> None:
    from graft.data.formats import Pair
    from graft.data.masking import encode
    from graft.models.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(str(tinystories)))
    sample = encode(Pair("Once upon a time there was", " a little dog  who sat", "f:1"), encoder)
    assert isinstance(sample, Sample)
    whole = encoder.tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)
    assert "".join(show(0, sample, encoder).pieces) == whole


def test_the_raw_text_of_a_broken_row_is_kept(check: Any) -> None:
    facts = check([*CLEAN, '{"messages": [broken']).facts[0]
    assert facts.raw[f"{facts.path}:61"] == '{"messages": [broken'


def test_cleaning_and_mixtures_are_seen(check: Any, tmp_path: Path) -> None:
    rows = [*CLEAN, *CLEAN[:6], *(chat(n, answer="??!") for n in range(500, 504))]
    found = check(rows, **{"data.deduplicate": "exact"})
    facts = found.facts[0]
    assert facts.removed == (("duplicate", 6),)
    assert (facts.num_rows, facts.num_used, facts.num_duplicates) == (70, 64, 0)
    assert [place.where.rpartition(":")[2] for place in facts.places["duplicate"]] == [
        str(n) for n in range(61, 67)
    ]
    assert rules(found) == ["odd"]
    assert facts.odd == (("blank_answer", 4),)
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(map(json.dumps, [chat(n, "", said(n + len(name) * 77)) for n in range(40)]))
        )
    given = Settings()
    mix = {str(tmp_path / "one.jsonl"): 0.5, str(tmp_path / "two.jsonl"): 0.5}
    for name, value in {"data.mix": mix, "data.max_length": 256}.items():
        given.put(name, value, "the test")
    mixed = check_data(build(RunConfig, given)).facts[0]
    assert mixed.num_rows == mixed.num_looked_at == 80


def test_rows_cut_on_the_left_lose_no_end(check: Any) -> None:
    rows = [{"prompt": said(n, 100), "completion": said(n + 3000, 9)} for n in range(20)]
    found = check(rows, **{"data.max_length": 128, "data.on_overlong": "truncate_left"})
    facts = found.facts[0]
    assert (facts.num_truncated, facts.num_without_end) == (20, 0)
    assert len(facts.chosen["truncated"]) == 20
    assert found.findings[0].rule == "truncated"
    assert "begin with is missing" in found.findings[0].why
