"""For any data: masks keep every token, packing loses none, and going on equals never having stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.examples import Conversation, Pair, Text
from graft.data.loader import Batch, Loader
from graft.data.masking import IGNORED, Encoder, Rejected, Sample
from graft.data.packing import pack

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONTROLS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
words = st.one_of(st.text(max_size=12), st.sampled_from([*CONTROLS, "\n", "  ", " a", "é", "👍🏽"]))
texts = st.lists(words, max_size=6).map("".join)


@pytest.fixture(scope="module")
def encoder(shared: Path) -> Encoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "additional_special_tokens": CONTROLS[:2]})
    return Encoder(tokenizer, chat_template=CHATML)


def only(encoder: Encoder, example: Any, max_length: int = 100_000) -> list[Sample] | Rejected:
    return next(encoder.encode([example], max_length))


def control_ids(encoder: Encoder) -> list[int]:
    ids: list[int] = encoder.tokenizer.convert_tokens_to_ids(CONTROLS)
    return ids


def plain_ids(encoder: Encoder, text: str) -> list[int]:
    ids: list[int] = encoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@quick
@given(prompt=texts, completion=texts)
def test_a_pair_keeps_every_token_and_learns_the_completion(
    encoder: Encoder, prompt: str, completion: str
) -> None:
    found = only(encoder, Pair(prompt, completion, "row 1"))
    if isinstance(found, Rejected):
        assert not completion.strip() or found.invalid
        return
    (sample,) = found
    before, after = (
        plain_ids(encoder, prompt),
        [*plain_ids(encoder, completion), encoder.tokenizer.eos_token_id],
    )
    assert sample.input_ids == [*before, *after]
    learned = [*[IGNORED] * len(before), *after]
    assert sample.labels == [IGNORED, *learned[1:]]


@quick
@given(text=texts, max_length=st.integers(3, 9))
def test_the_pieces_of_a_text_are_the_text(encoder: Encoder, text: str, max_length: int) -> None:
    found = only(encoder, Text(text, "row 1"), max_length)
    if isinstance(found, Rejected):
        assert not text.strip() or found.invalid
        return
    joined = [id for sample in found for id in sample.input_ids]
    assert joined == [*plain_ids(encoder, text), encoder.tokenizer.eos_token_id]
    for sample in found:
        assert 2 <= len(sample.input_ids) <= max_length
        assert sample.labels == [IGNORED, *sample.input_ids[1:]]


@quick
@given(contents=st.lists(texts, min_size=2, max_size=6))
def test_a_chat_keeps_every_token_and_no_user_becomes_a_control(
    encoder: Encoder, contents: list[str]
) -> None:
    contents = contents[: len(contents) // 2 * 2]
    roles = ["user", "assistant"] * (len(contents) // 2)
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    found = only(encoder, Conversation(chat, "row 1"))
    if isinstance(found, Rejected):
        assert found.invalid or not any(content.strip() for content in contents[1::2])
        return
    (sample,) = found
    start, end, _ = control_ids(encoder)
    controls = [id for id in sample.input_ids if id in control_ids(encoder)]
    assert controls == [start, end] * len(chat)
    assert all(label in (IGNORED, id) for label, id in zip(sample.labels, sample.input_ids, strict=True))
    assert encoder.tokenizer.decode(sample.input_ids) == "".join(
        f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in zip(roles, contents, strict=True)
    )
    position = 0
    for turn in range(1, len(chat), 2):
        prompt = encoder.prompt(chat[:turn])
        assert sample.input_ids[: len(prompt)] == prompt
        assert all(label == IGNORED for label in sample.labels[position : len(prompt)])
        position = sample.input_ids.index(end, len(prompt)) + 1
        learned = sample.labels[len(prompt) : position]
        if contents[turn].strip():
            assert learned == sample.input_ids[len(prompt) : position]
        else:
            assert set(learned) == {IGNORED}
    assert all(label == IGNORED for label in sample.labels[position:])


@quick
@given(prompt=texts, completion=texts, max_length=st.integers(2, 12))
def test_cutting_keeps_the_beginning(encoder: Encoder, prompt: str, completion: str, max_length: int) -> None:
    whole, cut = (
        only(encoder, Pair(prompt, completion, "row 1"), length) for length in (100_000, max_length)
    )
    if isinstance(whole, Rejected):
        assert cut == whole
    elif isinstance(cut, Rejected):
        assert set(whole[0].labels[:max_length]) == {IGNORED}
        assert len(whole[0].labels) > max_length
    else:
        assert cut[0].input_ids == whole[0].input_ids[:max_length]
        assert cut[0].labels == whole[0].labels[:max_length]


@quick
@given(lengths=st.lists(st.integers(1, 20), max_size=60), spare=st.integers(0, 15))
def test_packing_is_first_fit_decreasing(lengths: list[int], spare: int) -> None:
    max_length = max(lengths, default=1) + spare
    rows = pack(lengths, max_length)
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in expected:
            if sum(lengths[i] for i in row) + lengths[index] <= max_length:
                row.append(index)
                break
        else:
            expected.append([index])
    assert list(rows) == expected
    assert rows.sums(np.asarray(lengths, dtype=np.int32)).tolist() == [
        sum(lengths[i] for i in row) for row in expected
    ]
    in_order = sorted(sorted(row) for row in expected)
    assert list(rows.in_order()) == in_order
    assert list(rows.taken(np.arange(len(rows))[::-1])) == expected[::-1]


def make_samples(lengths: list[int]) -> list[Sample]:
    samples = []
    for number, length in enumerate(lengths):
        ids = [number * 100 + i for i in range(length)]
        samples.append(Sample(ids, [IGNORED, *ids[1:]], f"row {number}"))
    return samples


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The documents of a batch by its positions alone: each begins where they restart."""
    found = []
    for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            assert positions[begin:end].tolist() == list(range(end - begin))
            found.append((ids[begin:end].tolist(), labels[begin:end].tolist()))
    return found


loaders = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 4),
        "packing": st.booleans(),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 5),
    }
)


@quick
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), how=loaders, epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample_once_and_alone(
    lengths: list[int], how: dict[str, Any], epoch: int
) -> None:
    samples = make_samples(lengths)
    loader = Loader(samples, max_length=12, pad_id=-7, **how)
    batches = list(loader.epoch(epoch))
    assert len(batches) == loader.num_batches(epoch) == loader.num_batches(epoch + 1)
    found = [document for batch in batches for document in documents(batch)]
    padding = [document for document in found if document[0][0] == -7]
    assert all(set(ids) == {-7} and set(labels) == {IGNORED} for ids, labels in padding)
    real = [document for document in found if document not in padding]
    assert sorted(real) == sorted((sample.input_ids, sample.labels) for sample in samples)
    assert sum(batch.num_tokens for batch in batches) == sum(lengths)
    assert sum(batch.num_labelled_tokens for batch in batches) == sum(lengths) - len(lengths)
    places = sum(batch.input_ids.numel() for batch in batches)
    assert loader.utilisation(epoch) == pytest.approx(sum(lengths) / places)
    for batch in batches:
        assert batch.input_ids.shape[0] <= how["batch_size"]
        assert batch.input_ids.shape[1] <= 12
        in_order = [id for row in batch.sample_ids for i in row for id in samples[i].input_ids]
        assert in_order == [id for id in batch.input_ids.flatten().tolist() if id != -7]


@quick
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    how=loaders,
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_going_on_equals_never_having_stopped(
    lengths: list[int], how: dict[str, Any], epoch: int, data: st.DataObject
) -> None:
    samples = make_samples(lengths)
    first = Loader(samples, max_length=12, **how)
    list(first.epoch(0))
    whole = list(first.epoch(epoch))
    start = data.draw(st.integers(0, len(whole)))
    rest = list(Loader(samples, max_length=12, **how).epoch(epoch, start))
    assert len(rest) == len(whole) - start
    for ours, theirs in zip(rest, whole[start:], strict=True):
        assert ours.sample_ids == theirs.sample_ids
        for name in ("input_ids", "position_ids", "labels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
