"""graft's own byte-pair encoding against the tokenizers it stands for: the same ids, the same places."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split

from graft.data.encodings import Placed, Whole
from graft.data.vocabulary import PATTERNS, Pattern, vocabulary_of
from graft.data.word_encoder import MAX_CHARACTERS, WordEncoder
from graft.kernels.cpu import library

CONTROLS = ["\U000f0000", "\U000f0001"]
TEXT_OF = {kind: text for text, kind in PATTERNS.items()}
LLAMA3, QWEN2 = TEXT_OF[Pattern.LLAMA3], TEXT_OF[Pattern.QWEN2]
TOOL = AddedToken("<tool>", normalized=False)
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = ByteLevel(add_prefix_space=False)
DIGITS = Digits(individual_digits=True)
SPACES = normalizers.Replace(" ", "▁")

pytestmark = pytest.mark.skipif(bool(library.problem()), reason=library.problem() or "compiled")


def split(pattern: str) -> Split:
    return Split(Regex(pattern), "isolated")


@cache
def gpt2(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "tokenizers" / "gpt2" / "tokenizer.json").read_text())["model"]


@cache
def llama3(shared: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    folder = shared / "tokenizers" / "llama3.2"
    lines = [
        line for line in (folder / "vocab.bpe").read_text().splitlines() if not line.startswith("#version")
    ]
    merges = [tuple(line.split(" ")) for line in lines if line]
    return json.loads((folder / "encoder.json").read_text()), merges  # type: ignore[return-value]


@cache
def pieces(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A SentencePiece vocabulary: a piece is merged from any two others that make it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(str(path))
    vocab = {model.id_to_piece(id): id for id in range(model.get_piece_size())}
    merges = []
    for piece in vocab:
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(a, b) for a, b in halves if a in vocab and b in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return vocab, merges


def cut_short(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_truncation(3)
    return tokenizer


def by_bytes(shared: Path, splits: Any, normalizer: Any = None, *, plain: Any = ()) -> Tokenizer:
    model = gpt2(shared)
    made = Tokenizer(models.BPE(model["vocab"], [tuple(merge.split(" ")) for merge in model["merges"]]))
    made.pre_tokenizer = splits
    if normalizer:
        made.normalizer = normalizer
    made.add_special_tokens([AddedToken(char, normalized=False, special=True) for char in CONTROLS])
    if plain:
        made.add_tokens(plain if isinstance(plain, list) else [plain])
    return made


def of_llama3(shared: Path) -> Tokenizer:
    made = Tokenizer(models.BPE(*llama3(shared), ignore_merges=True))
    made.pre_tokenizer = Sequence([split(LLAMA3), BYTES])
    made.add_special_tokens([AddedToken(char, normalized=False, special=True) for char in CONTROLS])
    return made


def by_pieces(
    shared: Path, name: str, normalizer: Any = None, splits: Any = None, plain: Any = None, **model: Any
) -> Tokenizer:
    vocab, merges = pieces(shared / "tokenizers" / name)
    given = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **model}
    made = Tokenizer(models.BPE(vocab, merges, **given))
    if normalizer:
        made.normalizer = normalizer
    if splits:
        made.pre_tokenizer = splits
    made.add_special_tokens([AddedToken(char, normalized=False, special=True) for char in CONTROLS])
    if plain:
        made.add_tokens([plain])
    return made


FRONTED = normalizers.Sequence([normalizers.Prepend("▁"), SPACES])
MODEL, MISTRAL = "llama2/tokenizer.model", "mistral/tokenizer.model.v1"
CASES: dict[str, Callable[[Path], Tokenizer]] = {
    "gpt2": lambda shared: by_bytes(shared, GPT2),
    "gpt2, digits alone": lambda shared: by_bytes(shared, Sequence([DIGITS, GPT2])),
    "gpt2, with an added token": lambda shared: by_bytes(
        shared, GPT2, plain=[TOOL, AddedToken("<tool>>", normalized=False)]
    ),
    "llama 3's pattern": lambda shared: by_bytes(shared, Sequence([split(LLAMA3), BYTES])),
    "llama 3": of_llama3,
    "qwen 2's pattern": lambda shared: by_bytes(shared, Sequence([split(QWEN2), BYTES]), normalizers.NFC()),
    "qwen 2's, digits alone": lambda shared: by_bytes(shared, Sequence([DIGITS, split(QWEN2), BYTES])),
    "qwen 2's, with an added token": lambda shared: by_bytes(
        shared, Sequence([split(QWEN2), BYTES]), normalizers.NFC(), plain=TOOL
    ),
    "llama 2, with an added token": lambda shared: by_pieces(shared, MODEL, FRONTED, plain=TOOL),
    "llama 2": lambda shared: by_pieces(shared, MODEL, FRONTED),
    "llama 2, no mark": lambda shared: by_pieces(shared, MODEL, SPACES),
    "llama 2, some unknown": lambda shared: by_pieces(shared, MODEL, FRONTED, byte_fallback=False),
    "llama 2, first": lambda shared: by_pieces(shared, MODEL, None, Metaspace("▁", "first", split=False)),
    "llama 2, never": lambda shared: by_pieces(shared, MODEL, None, Metaspace("▁", "never", split=False)),
    "mistral, always": lambda shared: by_pieces(shared, MISTRAL, None, Metaspace("▁", "always", split=False)),
}


@cache
def made(name: str, shared: Path) -> Tokenizer:
    return CASES[name](shared)


OTHERS: dict[str, Callable[[Path], Tokenizer]] = {
    "a space in front": lambda shared: by_bytes(shared, ByteLevel(add_prefix_space=True)),
    "another pattern": lambda shared: by_bytes(shared, Sequence([split(r"\p{L}+|\s+|."), BYTES])),
    "a pattern that removes": lambda shared: by_bytes(
        shared, Sequence([Split(Regex(LLAMA3), "removed", invert=True), BYTES])
    ),
    "digits after the pattern": lambda shared: by_bytes(shared, Sequence([split(LLAMA3), DIGITS, BYTES])),
    "another normal form": lambda shared: by_bytes(shared, GPT2, normalizers.NFKC()),
    "splits at marks": lambda shared: by_pieces(shared, MODEL, None, Metaspace("▁", "first", split=True)),
    "something else is replaced": lambda shared: by_pieces(
        shared, MODEL, normalizers.Sequence([normalizers.Replace("``", '"'), SPACES])
    ),
    "merges passed over": lambda shared: by_pieces(shared, MODEL, FRONTED, ignore_merges=True),
    "a normal form of added tokens": lambda shared: by_bytes(
        shared, GPT2, normalizers.NFC(), plain=AddedToken("<é>", normalized=True)
    ),
    "added tokens in two passes": lambda shared: by_bytes(
        shared, GPT2, plain=[AddedToken("<a>", normalized=True), AddedToken("<a><b>", normalized=False)]
    ),
    "nothing splits": lambda shared: by_bytes(shared, Sequence([])),
    "something around texts": lambda shared: cut_short(by_bytes(shared, GPT2)),
    "tokens at random": lambda shared: by_pieces(shared, MODEL, FRONTED, dropout=0.1),
}

ODD = [
    "'s", "'S", "'RE", "'re", "'ll", "'lL", "'ſa", "''", "123", "1", "45678", "²", "½", "Ⅷ", "٣", "!?", "...",
    "(", "_", "é", "e\u0301", "ß", "ſ", "İ", "日本語", "한국", "ᄀ\u1161\u11a8", "\u09c7\u09be", "😀",
    "👩\u200d👩\u200d👧", "\u200b", "\u0301", "नमस्ते", "\x1c", "\0", "▁", "<0x0A>", "<tool>", "<tool>>", "the",
    "Hello", "world", "x" * 70,
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [*ODD, *CONTROLS, " ", " ", "  ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\x85", "\u3000"]
        ),
        st.text(st.characters(max_codepoint=0x2FFFF, exclude_categories=("Cs",)), max_size=3),
        st.text("abcdefg hij'.,12\n", max_size=12),
    ),
    max_size=16,
).map("".join)


def compare(tokenizer: Tokenizer, encoder: WordEncoder, texts: list[str]) -> int:
    found = encoder.encode(texts)
    expected = tokenizer.encode_batch(texts, add_special_tokens=False)
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        starts = [start for start, _ in theirs.offsets]
        assert (ours.ids, list(ours.starts)) == (theirs.ids, starts), repr(text)
        for place in (0, 1, len(text) // 3, len(text) // 2, len(text), len(text) + 1):
            assert ours.before(place) == sum(start < place for start in starts)
    return sum(isinstance(ours, Placed) for ours in found)


@pytest.mark.parametrize("name", CASES)
def test_any_text_becomes_what_the_tokenizer_makes_of_it(name: str, shared: Path) -> None:
    tokenizer = made(name, shared)
    encoder = WordEncoder(tokenizer)

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXTS, max_size=8))
    def holds(texts: list[str]) -> None:
        compare(tokenizer, encoder, texts)

    holds()
    compare(tokenizer, encoder, [f"a{odd}b {odd}" for odd in ODD])
    assert (
        compare(
            tokenizer, encoder, ["Hello world's  end. 12 times, I'LLsay 'Sa", " a\U000f0000 b\U000f0001c"]
        )
        == 2
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama 2, some unknown"])
def test_real_texts_are_read_by_graft_itself(name: str, shared: Path) -> None:
    tokenizer = made(name, shared)
    encoder = WordEncoder(tokenizer)
    book = (shared / "datasets" / "books" / "alices-adventures-in-wonderland.txt").read_text()
    sums = (shared / "datasets" / "gsm8k" / "test.jsonl").read_text()[:40_000]
    texts = [text for each in (book, sums) for text in each.split("\n\n")]
    assert compare(tokenizer, encoder, texts) >= 0.99 * len(texts)
    assert compare(tokenizer, encoder, texts[::-1]) >= 0.99 * len(texts)


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_read_themselves(name: str, shared: Path) -> None:
    tokenizer = OTHERS[name](shared)
    assert vocabulary_of(json.loads(tokenizer.to_str())) is None
    (found,) = WordEncoder(tokenizer).encode(["Hello world"])
    assert isinstance(found, Whole)


def test_merges_across_spaces_are_the_tokenizers_own_affair(tinystories: Path) -> None:
    """The vocabulary of this model has "the▁": a space belongs to what stands before it."""
    tokenizer = Tokenizer.from_file(str(tinystories / "tokenizer.json"))
    assert vocabulary_of(json.loads(tokenizer.to_str())) is None


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_their_surroundings_are_the_tokenizers_own_affair(
    flag: str, shared: Path
) -> None:
    tokenizer = by_bytes(shared, GPT2)
    tokenizer.add_tokens([AddedToken("<tool>", **{flag: True})])
    assert vocabulary_of(json.loads(tokenizer.to_str())) is None


def test_more_words_than_are_remembered(shared: Path) -> None:
    """Words are forgotten and met again: 200,000 of them, thrice."""
    tokenizer = by_bytes(shared, GPT2)
    encoder = WordEncoder(tokenizer)
    texts = [
        " ".join(f"w{number:x}q" for number in range(begin, begin + 500)) for begin in range(0, 200_000, 500)
    ]
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for _ in range(3):
        assert [found.ids for found in encoder.encode(texts)] == expected


def test_long_texts_and_long_words_are_left_to_the_tokenizer(shared: Path) -> None:
    tokenizer = by_bytes(shared, GPT2)
    encoder = WordEncoder(tokenizer)
    texts = ["a b", "x" * 600, "word " * (MAX_CHARACTERS // 5 + 1), "x" * 500]
    found = encoder.encode(texts)
    assert [type(each) for each in found] == [Placed, Whole, Whole, Placed]
    expected = tokenizer.encode_batch(texts, add_special_tokens=False)
    assert [each.ids for each in found] == [each.ids for each in expected]


def by_hand(merges: list[tuple[str, str]], pieces: list[str], **model: Any) -> Tokenizer:
    """A vocabulary of bytes, a few letters and what the merges make."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", *pieces]
    vocab = {name: id for id, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, **model))
    made.normalizer = SPACES
    return made


@pytest.mark.parametrize("pair", [("a", "<0x0A>"), ("<0x0A>", "<0x0A>"), ("▁", "<0x0A>")])
def test_merges_of_bytes_are_the_tokenizers_own_affair(pair: tuple[str, str]) -> None:
    tokenizer = by_hand([pair], ["".join(pair)])
    assert compare(tokenizer, WordEncoder(tokenizer), ["a\nb", "a \n\n"]) == 0


def test_a_vocabulary_that_lacks_a_byte_knows_only_its_characters() -> None:
    whole = json.loads(by_hand([("a", "b")], ["ab"]).to_str())
    del whole["model"]["vocab"]["<0x0A>"]
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    assert compare(tokenizer, WordEncoder(tokenizer), ["ab c", "a\nb", "\n\n"]) == 1


def test_ids_that_no_kernel_can_hold_are_the_tokenizers_own_affair() -> None:
    whole = json.loads(by_hand([("a", "b")], ["ab"]).to_str())
    whole["model"]["vocab"]["ab"] = 1 << 31
    assert vocabulary_of(whole) is None


def test_a_field_of_a_model_that_nobody_knows_is_respected() -> None:
    whole = json.loads(by_hand([("a", "b")], ["ab"]).to_str())
    assert vocabulary_of(whole) is not None
    whole["model"]["merges_backwards"] = True
    assert vocabulary_of(whole) is None


def test_a_character_that_stands_for_an_added_token_is_none_itself(shared: Path) -> None:
    tokenizer = by_bytes(shared, GPT2, plain=TOOL)
    encoder = WordEncoder(tokenizer)
    assert compare(tokenizer, encoder, ["a\U000f0002b", "a<tool>b", "<tool> é<tool><tool> b"]) == 2


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN2])
def test_a_long_s_is_an_s_where_case_does_not_count(pattern: str) -> None:
    """As the end of a contraction it is not merged with what follows; its two bytes are "Å" and "¿"."""
    names = [*ByteLevel.alphabet(), "Å¿", "Å¿a"]
    vocab = {name: id for id, name in enumerate(sorted(names))}
    tokenizer = Tokenizer(models.BPE(vocab, [("Å", "¿"), ("Å¿", "a")]))
    tokenizer.pre_tokenizer = Sequence([split(pattern), BYTES])
    encoder = WordEncoder(tokenizer)
    assert compare(tokenizer, encoder, ["x'ſa", "xſa", "it's"]) == 1
    assert tokenizer.encode("x'ſa").tokens[-1] == "a"
