from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.data.config import DataConfig
from graft.data.formats import Conversation, Pair, Text
from graft.data.loader import Loader
from graft.data.masking import Encoder
from graft.errors import ConfigError, DataError, ModelError
from graft.evaluate.generate import GenerationConfig, generate
from graft.evaluate.loss import evaluate_loss
from graft.evaluate.passes import MAX_CHOICES
from graft.evaluate.tasks import evaluate, evaluate_file, write_predictions
from graft.models.load import load

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tiny(tiny_dir: Callable[..., Path]) -> tuple[Any, Any]:
    base = load(tiny_dir("llama"))
    return base.model, base.tokenizer


def _pairs() -> list[Pair]:
    rows = [("Is it red?", " yes"), ("Is it a number?", " not so"), ("Is it?", " yes"), ("What?", " maybe")]
    return [
        Pair(prompt, completion, f"rows.jsonl:{line}") for line, (prompt, completion) in enumerate(rows, 1)
    ]


def _chat(*turns: str, where: str = "chat.jsonl:1") -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]
    return Conversation(messages, where)


def _log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        chances = torch.log_softmax(model(torch.tensor([[*prompt, *answer]])).logits[0].double(), -1)
    return sum(float(chances[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))


def _ended(tokenizer: Any, answer: str) -> list[int]:
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_loss_is_the_loss_of_training(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    found = evaluate(model, tokenizer, _pairs(), ["loss", "perplexity"], batch_size=3)
    samples = [sample for row in Encoder(tokenizer).encode(_pairs(), 1024) for sample in row]
    expected = evaluate_loss(model, Loader(samples, 2, 200, packing=True).epoch(0))
    assert found.metrics["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    for pair, row in zip(_pairs(), found.predictions, strict=True):
        assert row.where == pair.where
        prompt = Encoder(tokenizer).prompt(pair.prompt)
        alone = -_log_likelihood(model, prompt, _ended(tokenizer, pair.completion))
        assert row.loss == pytest.approx(alone, rel=1e-4)
    assert sum(row.num_labelled_tokens for row in found.predictions) == expected.num_tokens


def test_bits_per_character_counts_the_characters_of_the_labelled_text(tiny: tuple[Any, Any]) -> None:
    found = evaluate(*tiny, _pairs(), ["loss", "bits_per_character"])
    num_characters = sum(len(pair.completion) for pair in _pairs())
    num_tokens = sum(row.num_labelled_tokens for row in found.predictions)
    nats = found.metrics["loss"] * num_tokens
    assert found.metrics["bits_per_character"] == pytest.approx(nats / math.log(2) / num_characters)


def test_a_long_text_counts_all_its_pieces(tiny: tuple[Any, Any]) -> None:
    text = Text("abcdefghij" * 12, "book.txt:1")
    found = evaluate(*tiny, [text], ["loss"], data=DataConfig(max_length=50))
    row = found.predictions[0]
    pieces = next(iter(Encoder(tiny[1]).encode([text], 50)))
    assert len(pieces) > 2
    assert row.num_labelled_tokens == sum(label != -100 for piece in pieces for label in piece.labels)


def test_answers_are_compared_with_what_the_model_writes(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = [pair.prompt for pair in _pairs()]
    config = GenerationConfig(max_new_tokens=12)
    encoder = Encoder(tokenizer)
    written = generate(model, tokenizer, [encoder.prompt(prompt) for prompt in prompts], config)
    rows = [
        Pair(p, w if at != 1 else "wrong", "") for at, (p, w) in enumerate(zip(prompts, written, strict=True))
    ]
    found = evaluate(model, tokenizer, rows, ["exact_match", "rouge_l"], generation=config, batch_size=2)
    assert found.metrics["exact_match"] == 3 / 4
    assert 0 <= found.metrics["rouge_l"] <= 1
    assert [row.prediction for row in found.predictions] == written
    assert [row.reference for row in found.predictions] == [row.completion for row in rows]


def test_a_conversation_is_asked_up_to_its_last_answer(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    tokenizer.chat_template = TEMPLATE
    chats = [_chat("Hi", "Hello!", "And?", "Bye"), _chat("One", "Two", "Three", where="chat.jsonl:2")]
    config = GenerationConfig(max_new_tokens=6)
    found = evaluate(model, tokenizer, chats, ["exact_match", "loss"], generation=config)
    encoder = Encoder(tokenizer)
    asked = [encoder.prompt(chats[0].messages[:3]), encoder.prompt(chats[1].messages[:1])]
    assert [row.prompt for row in found.predictions] == [tokenizer.decode(ids) for ids in asked]
    assert [row.reference for row in found.predictions] == ["Bye", "Two"]
    assert [row.prediction for row in found.predictions] == generate(model, tokenizer, asked, config)
    template = tmp_path / "other.jinja"
    template.write_text(
        TEMPLATE.replace("<{{ m.role }}>", "[{{ m.role }}]").replace("<assistant>", "[assistant]")
    )
    other = evaluate(model, tokenizer, chats, ["exact_match"], data=DataConfig(chat_template=str(template)))
    assert other.predictions[0].prompt.endswith("[assistant]")


def test_accuracy_takes_the_likeliest_of_the_answers(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    encoder = Encoder(tokenizer)
    found = evaluate(model, tokenizer, _pairs(), ["accuracy", "accuracy_per_token"], batch_size=4)
    choices = sorted({pair.completion for pair in _pairs()})
    right, right_per_token = 0, 0
    for pair, row in zip(_pairs(), found.predictions, strict=True):
        prompt = encoder.prompt(pair.prompt)
        ids = {choice: tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices}
        expected = {choice: _log_likelihood(model, prompt, ids[choice]) for choice in choices}
        assert row.choice_scores == pytest.approx(expected, abs=2e-4)
        right += max(choices, key=expected.__getitem__) == pair.completion
        right_per_token += max(choices, key=lambda c: expected[c] / len(ids[c])) == pair.completion
    assert found.metrics == {"accuracy": right / 4, "accuracy_per_token": right_per_token / 4}


def test_the_end_counts_where_one_choice_begins_another(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    row, choices = Pair("Is it?", " not", "rows.jsonl:1"), (" not", " not so")
    found = evaluate(model, tokenizer, [row], ["accuracy"], choices=choices)
    prompt = Encoder(tokenizer).prompt(row.prompt)
    expected = {choice: _log_likelihood(model, prompt, _ended(tokenizer, choice)) for choice in choices}
    assert found.predictions[0].choice_scores == pytest.approx(expected, abs=2e-4)


def test_conversations_choose_among_answers_too(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    tokenizer.chat_template = TEMPLATE
    chat = _chat("Hi", "Hello!", "Yes or no?", "no")
    found = evaluate(model, tokenizer, [chat], ["accuracy"], choices=("yes", "no"))
    prompt = Encoder(tokenizer).prompt(chat.messages[:3])
    expected = {
        choice: _log_likelihood(model, prompt, tokenizer(choice, add_special_tokens=False)["input_ids"])
        for choice in ("yes", "no")
    }
    assert found.predictions[0].choice_scores == pytest.approx(expected, abs=2e-4)


def test_rows_that_cannot_be_used_count_nowhere_and_are_listed(tiny: tuple[Any, Any]) -> None:
    rows = [*_pairs(), Pair("x" * 200, " yes", "rows.jsonl:5"), Pair("Empty?", "", "rows.jsonl:6")]
    found = evaluate(*tiny, rows, ["loss", "exact_match"], generation=GenerationConfig(max_new_tokens=2))
    assert found.num_rows == len(found.predictions) == 4
    assert [where for where, _ in found.rejected] == ["rows.jsonl:5", "rows.jsonl:6"]
    with pytest.raises(DataError, match="no row can be evaluated"):
        evaluate(*tiny, rows[4:], ["loss", "exact_match"])


def test_plain_text_has_no_answer(tiny: tuple[Any, Any]) -> None:
    for metric in ("exact_match", "accuracy"):
        with pytest.raises(ConfigError) as error:
            evaluate(*tiny, [Text("one", "a.txt:1")], [metric], choices=("a", "b"))
        assert error.value.where == "a.txt:1"


def test_an_answer_outside_the_choices_is_told_with_the_closest(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="' not so' is not among") as error:
        evaluate(*tiny, _pairs(), ["accuracy"], choices=(" yes", "not so"))
    assert "'not so'" in error.value.fix


def test_too_few_or_too_many_answers_are_no_choices(tiny: tuple[Any, Any]) -> None:
    for num in (1, MAX_CHOICES + 1):
        rows = [Pair("?", f" {number}", "") for number in range(num)]
        with pytest.raises(ConfigError, match=f"which are {num}"):
            evaluate(*tiny, rows, ["accuracy"])


def test_an_unknown_metric_is_refused_before_anything_else(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="no metric 'los'") as error:
        evaluate_file(*tiny, "nowhere.jsonl", ["los"])
    assert "loss" in error.value.fix


def test_a_loss_that_is_no_number_is_refused(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="the loss is nan") as error:
        evaluate(model, tokenizer, _pairs(), ["loss"])
    assert error.value.where.startswith("rows.jsonl:")


def test_a_file_is_read_by_the_data_settings(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    lines = [json.dumps({"question": pair.prompt, "answer": pair.completion}) for pair in _pairs()]
    file.write_text("\n".join([*lines[:2], '{"question": 3', *lines[2:]]))
    with pytest.raises(DataError, match="not JSON"):
        evaluate_file(*tiny, file, ["loss"])
    found = evaluate_file(
        *tiny, tmp_path, ["loss"], data=DataConfig(skip_invalid=True, limit=3), batch_size=2
    )
    assert found.metrics["loss"] == pytest.approx(evaluate(*tiny, _pairs()[:3], ["loss"]).metrics["loss"])
    assert found.num_rows == 3
    assert [where.rsplit(":", 2)[1] for where, _ in found.rejected] == ["3"]


def test_predictions_are_written_as_json_lines(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    config = GenerationConfig(max_new_tokens=4)
    found = evaluate(*tiny, _pairs(), ["loss", "exact_match", "accuracy"], generation=config)
    write_predictions(tmp_path / "out.jsonl", found.predictions)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines] == [pair.completion for pair in _pairs()]
    assert lines[0].keys() >= {"where", "prompt", "prediction", "loss", "choice", "choice_scores"}
    only_loss = evaluate(*tiny, _pairs(), ["loss"]).predictions[0].to_dict()
    assert "prediction" not in only_loss
