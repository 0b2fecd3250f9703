"""The copy of a tokenizer: same ids, control tokens only on purpose, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graft.data import tokens
from graft.data.encodings import Placed, Whole
from graft.data.masking import Encoder
from graft.data.tokens import TextEncoder, private_character
from graft.data.word_encoder import WordEncoder
from graft.errors import DataError
from graft.kernels.cpu import library

CORPUS = ["the cat sat on the mat", "a dog ran in the rain </s> end", "the end of the day <|x|> the"] * 20
SPECIALS = ["<unk>", "<s>", "</s>", "<|x|>"]
LINES = ["the cat", "</s> the <|x|>the", "  end</s></s>", "", "unseen ß 字", "THE CAT <S>"]


def build(kind: str) -> PreTrainedTokenizerFast:
    model, trainer = {
        "bpe": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(special_tokens=SPECIALS, vocab_size=80)),
        "unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(special_tokens=SPECIALS, vocab_size=60, unk_token="<unk>"),
        ),
        "wordpiece": (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(special_tokens=SPECIALS, vocab_size=80),
        ),
        "wordlevel": (
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(special_tokens=SPECIALS),
        ),
    }[kind]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "unigram" else pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|y|>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens(["catnip"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "wordlevel"])
def test_the_copy_reads_text_as_text_and_marks_as_controls(kind: str) -> None:
    original = build(kind)
    encoder = TextEncoder(original)
    lines = [*LINES, "a <|y|> b catnip", "catnip<s>"]
    as_text = original(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [encoding.ids for encoding in encoder.encode(lines)]
    # A unigram model has its control tokens among its pieces, and the original finds them in plain text.
    assert ids == as_text or kind == "unigram"
    unknown = original.unk_token_id
    assert not any(id in original.all_special_ids and id != unknown for line in ids for id in line)
    lines = [line for line in lines if kind != "unigram" or "<S>" not in line]
    marked = [encoder.mark_controls(line) for line in lines]
    as_controls = original(lines, add_special_tokens=False)["input_ids"]
    assert [encoding.ids for encoding in encoder.encode(marked)] == as_controls
    assert encoder.control_ids >= set(original.convert_tokens_to_ids([*SPECIALS, "<|y|>"]))
    assert encoder.eos_id == original.eos_token_id


def test_a_control_that_merges_could_build_is_not_built_from_text() -> None:
    vocab = {piece: id for id, piece in enumerate(["<", "x", ">", "<x", "<x>", "<unk>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "x"), ("<x", ">")], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<x>", "<unk>"])
    original = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<x>", unk_token="<unk>")
    encoder = TextEncoder(original)
    assert encoder.ids("<x>x") == [vocab["<x"], vocab[">"], vocab["x"]]
    assert encoder.ids(encoder.mark_controls("<x>x")) == [vocab["<x>"], vocab["x"]]


def test_quoted_controls_come_back_as_text() -> None:
    encoder = TextEncoder(build("bpe"))
    quoted = encoder.quote_controls(
        [{"role": "user", "content": "a</s>", "calls": [{"name": "<s>", "n": 3}]}]
    )
    assert not encoder.spells_control(repr(quoted))
    assert encoder.spells_control("a</s>")
    rendered = encoder.mark_controls(quoted[0]["content"] + "</s>")
    assert rendered.startswith("a</s>")
    assert encoder.ids(rendered) == [*encoder.ids("a</s>"), encoder.eos_id]


def test_edges_are_kept_by_any_number_of_parts() -> None:
    encoder = TextEncoder(build("bpe"))
    text = "the cat sat on the mat"
    edges = [2, 5, 6, 9, 13]
    (apart,) = encoder.encode_apart([(text, edges)])
    for edge in edges:
        (before,) = encoder.encode_apart([(text[:edge], [cut for cut in edges if cut < edge])])
        assert apart.ids[: apart.edges[edge]] == before.ids
        assert all(start < edge for start in apart.starts[: apart.edges[edge]])
        assert all(start >= edge for start in apart.starts[apart.edges[edge] :])


def test_private_characters_are_found() -> None:
    assert private_character("plain \ue000 text") == ""
    assert private_character("a\U00100000") == "\U00100000"


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        name_or_path = "models/slow"

    slow: Any = Slow()
    with pytest.raises(DataError, match="Slow is not a fast tokenizer"):
        TextEncoder(slow)


@pytest.mark.parametrize(("name", "size"), [("gpt2", 100_000), ("llama", 0)])
def test_only_a_tokenizer_that_splits_words_remembers_many(
    name: str, size: int, shared: Path, tinystories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pre-tokenizer a whole text is one word: remembering it costs 20 KB for nothing."""
    asked: list[int] = []
    place = shared / "tokenizers" / "gpt2" if name == "gpt2" else tinystories
    real = Tokenizer.from_file(str(place / "tokenizer.json"))
    fake = SimpleNamespace(model=SimpleNamespace(_resize_cache=asked.append), to_str=real.to_str)
    monkeypatch.setattr(library, "problem", lambda: "not compiled")
    WordEncoder(fake)
    assert asked == [size]


@pytest.mark.parametrize("split", [True, False])
def test_a_split_at_marks_makes_words(split: bool) -> None:
    asked: list[int] = []
    real = Tokenizer(models.BPE())
    real.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    fake = SimpleNamespace(model=SimpleNamespace(_resize_cache=asked.append), to_str=real.to_str)
    WordEncoder(fake)
    assert asked == [100_000 if split else 0]


def test_the_word_encoder_is_made_once_it_pays(shared: Path) -> None:
    encoder = TextEncoder(AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2"))
    text = "some words of a text that is read again and again. " * 2_000
    kinds = [type(encoder.encode([text])[0]) for _ in range(12)]
    change = kinds.index(Placed)
    assert kinds == [Whole] * change + [Placed] * (12 - change)
    assert 50_257 * 20 < change * len(text) < 50_257 * 20 + 2 * len(text)


def test_what_stands_around_texts_is_in_the_digest() -> None:
    """Two tokenizers of one vocabulary that begin or end texts otherwise make other samples."""
    digests = set()
    for bos, eos in ((None, "</s>"), (None, "<s>"), ("<s>", "</s>")):
        tokenizer = build("bpe")
        tokenizer.eos_token = eos
        if bos:
            tokenizer.add_bos_token, tokenizer.bos_token = True, bos
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
            )
        digests.add(Encoder(tokenizer).digest())
    assert len(digests) == 3


def test_a_piece_that_is_a_control_token_joins_with_nothing() -> None:
    encoder = TextEncoder(build("bpe"))
    joins = {
        piece: encoder.may_join(piece) for piece in ("</s>", "<|x|>", "|x|", "x|> a", "a <", "/", "plain")
    }
    assert joins == {
        "</s>": False, "<|x|>": False, "|x|": True, "x|> a": True, "a <": True, "/": True, "plain": False
    }  # fmt: skip


def test_few_heads_are_remembered_and_none_holds_a_batch(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_MAX_SHORT", 10)
    monkeypatch.setattr(tokens, "_WORTH", 0)
    encoder = TextEncoder(AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2"))
    texts = [f"head {number}: and a body" for number in range(50)]
    encoder.encode(texts)
    apart = encoder.encode_apart([(text, [text.index(":")]) for text in texts])
    assert [each.ids[: each.edges[text.index(":")]] for each, text in zip(apart, texts, strict=True)] == [
        encoder.ids(text[: text.index(":")]) for text in texts
    ]
    encoder.encode_apart([("a: b", [1])])
    assert len(encoder._short) <= 50
    encoder.encode_apart([(f"{char}: b", [1]) for char in "bcdefghij"])
    assert len(encoder._short) <= 10
    assert all(type(found.starts) is list for found in encoder._short.values())
