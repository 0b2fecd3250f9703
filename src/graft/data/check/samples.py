"""Samples token by token, as a model sees them: ids, pieces of text, what is learned, controls, ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.masking import Encoder
from graft.data.samples import IGNORED, Kind, Sample

PLAIN, LEARNED, CONTROL, END = 0, 1, 2, 4
"""Flags of a token, to be added: learned, a control token, the end of something learned."""

_CONTEXT = 8
"""Tokens before one that are decoded with it, so that its spaces are kept."""
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Shown:
    """A sample as it is shown, perhaps without its middle.

    Attributes:
        index: Its place among the samples.
        where: The row it came from.
        ids: Token ids.
        pieces: The text of each token; "" for all but the last token of a character that several make.
        flags: Of each token: `LEARNED` + `CONTROL` + `END`.
        num_tokens: Tokens of the whole sample, and `num_labelled` of them learned.
        gap: After so many tokens some are left out; -1 where nothing is.
        note: What to know besides: its class, whether it is the chosen answer.
    """

    index: int
    where: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    flags: tuple[int, ...]
    num_tokens: int
    num_labelled: int
    gap: int = -1
    note: str = ""


def show(
    index: int,
    sample: Sample,
    encoder: Encoder,
    *,
    kind: Kind = "text",
    labels: Sequence[str] = (),
    most: int = 1500,
) -> Shown:
    """A sample token by token.

    Args:
        index: Its place among the samples.
        sample: The sample.
        encoder: Knows the tokenizer.
        kind: What the sample is.
        labels: The classes by number.
        most: Most tokens to show; of more the middle is left out, two thirds before it and a third after.

    Cost: two decodings of a few tokens for each token.
    """
    ids, learned = sample.input_ids, [label != IGNORED for label in sample.labels]
    flags = _flags(ids, learned, encoder)
    head = len(ids) if len(ids) <= most else most * 2 // 3
    tail = len(ids) if len(ids) <= most else len(ids) - (most - head)
    pieces = [*_pieces(ids[:head], encoder.tokenizer), *_pieces(ids[tail:], encoder.tokenizer)]
    return Shown(
        index=index,
        where=sample.where,
        ids=(*ids[:head], *ids[tail:]),
        pieces=tuple(pieces),
        flags=(*flags[:head], *flags[tail:]),
        num_tokens=len(ids),
        num_labelled=sum(learned),
        gap=head if tail > head and head < len(ids) else -1,
        note=_note(index, sample, kind, labels),
    )


def _note(index: int, sample: Sample, kind: Kind, labels: Sequence[str]) -> str:
    own = ("rejected answer" if index % 2 else "chosen answer") if kind == "pair" else ""
    if kind == "class":
        own = f"class: {labels[sample.labels[-1]]}"
    return "; ".join([*([own] if own else []), *sample.remarks])


def _flags(ids: Sequence[int], learned: Sequence[bool], encoder: Encoder) -> list[int]:
    controls = encoder.text.control_ids | {encoder.text.eos_id}
    following = [*learned[1:], False]
    return [
        LEARNED * own + CONTROL * (id in controls) + END * (own and not after and id in controls)
        for id, own, after in zip(ids, learned, following, strict=True)
    ]


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token after those before it; a character of several tokens stands at its last."""
    pieces: list[str] = []
    start = 0  # where the last whole character ended
    known: dict[tuple[int, ...], str] = {}

    def decode(begin: int, end: int) -> str:
        window = tuple(ids[begin:end])
        if window not in known:
            known[window] = tokenizer.decode(
                list(window), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return known[window]

    for place in range(len(ids)):
        begin = max(0, start - _CONTEXT)
        before, text = decode(begin, start), decode(begin, place + 1)
        unfinished = text.endswith(_UNFINISHED) and place + 1 < len(ids) and place - start < 4
        if unfinished:
            pieces.append("")
            continue
        pieces.append(text[len(before) :] if text.startswith(before) else decode(start, place + 1))
        start = place + 1
    return pieces
