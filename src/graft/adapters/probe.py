"""The texts over which a merged model is compared with the live one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from graft.adapters.side_file import SideFile
from graft.data.config import DataConfig
from graft.data.formats import CHAT_FORMATS
from graft.data.loader import Batch, collate
from graft.data.masking import Encoder
from graft.data.prepare import prepare
from graft.data.samples import IGNORED, Sample
from graft.errors import AdapterError, DataError, ModelError

MAX_LOGITS_BYTES = 256 * 2**20
"""What the logits of one model over the probe may take, in fp32; longer probes are cut."""

MAX_POSITIONS = 4096
"""Most next tokens that are compared."""

MAX_TOKENS = 8192
"""Most tokens that a model reads at once, padding among them."""

PROMPT_TOKENS = 64
"""Most tokens of one of the prompts that come with graft."""

ROW_TOKENS = 1024
"""Most tokens of a row of data."""

RANDOM_SHAPE = (2, 32)
"""Rows and tokens, where there is no text."""


@dataclass(frozen=True)
class Probe:
    """Rows of tokens, and the next tokens of which the distributions are compared."""

    batch: Batch
    kind: str
    """data: rows of a file; prompts: texts that come with graft; random: random tokens, for want of a
    tokenizer."""
    source: str
    """The file; "" where there is none."""
    notes: tuple[str, ...] = ()
    """What the user should know."""

    @property
    def positions(self) -> Tensor:
        """Which tokens (rows, tokens) are followed by one that is compared, bool."""
        after: Tensor = self.batch.labels[:, 1:] != IGNORED
        return torch.nn.functional.pad(after, (0, 1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "kind": self.kind,
            "source": self.source,
            "num_rows": len(self.batch.input_ids),
            "num_positions": self.batch.num_labelled_tokens,
        }


def make_probe(
    config: Any, tokenizer: Any, side: SideFile | None, data: str | None, tokens: Sequence[int] = ()
) -> Probe:
    """Choose and encode the texts.

    Args:
        config: transformers' config of the model.
        tokenizer: Its tokenizer, with the chat template that the adapter was taught with; or None.
        side: What graft knows of the adapter: one that was trained on chats gets the prompts as chats.
        data: A file of held-out rows, of the kinds that `graft train` reads; None for graft's own prompts.
        tokens: Those of which rows of the embedding were trained: only they show that change, so some of
            them are among the texts.

    Raises:
        DataError: A row cannot be used, or no row has a token to predict.
        StorageError: The file cannot be read.
        AdapterError: There is a file and no tokenizer.
        ModelError: The tokenizer has tokens that the model lacks.
    """
    text = config.get_text_config()
    context = int(getattr(text, "max_position_embeddings", None) or ROW_TOKENS)
    room = max(2, min(MAX_POSITIONS, MAX_LOGITS_BYTES // (4 * text.vocab_size)))
    if data is not None:
        if tokenizer is None:
            raise AdapterError(
                "the base has no tokenizer, so no text can be compared", where=data, fix="leave the data out"
            )
        found = _of_file(data, tokenizer, side, min(context, ROW_TOKENS), room, tokens)
        return _known(found, text.vocab_size)
    first = _of_tokens(tokens, min(context, PROMPT_TOKENS))
    if tokenizer is None:
        ids = torch.randint(0, text.vocab_size, RANDOM_SHAPE, generator=torch.Generator().manual_seed(0))
        return _probe([*first, *(_all_of(row) for row in ids.tolist())], room, "random", "")
    chat = bool(getattr(tokenizer, "chat_template", None))
    chat = chat and side is not None and side.facts.get("format") in CHAT_FORMATS
    encoder = Encoder(tokenizer)
    rows = [
        encoder.prompt([{"role": "user", "content": prompt}] if chat else prompt)[
            : min(context, PROMPT_TOKENS)
        ]
        for prompt in own_prompts()
    ]
    found = _probe([*first, *(_all_of(row) for row in rows if len(row) > 1)], room, "prompts", "")
    return _known(found, text.vocab_size)


def _known(probe: Probe, vocab_size: int) -> Probe:
    """The same probe, whose tokens the model has.

    Raises:
        ModelError: It lacks one.
    """
    highest = int(probe.batch.input_ids.max())
    if highest >= vocab_size:
        raise ModelError(
            f"the tokenizer gives token {highest}, and the embedding has {vocab_size:,} rows: they do not "
            "belong together",
            where="tokenizer of the base",
            fix="use the tokenizer that the model was made with",
        )
    return probe


def own_prompts() -> list[str]:
    """The prompts that come with graft; indented lines and answers go on with the one before."""
    text = (resources.files("graft") / "builtin" / "prompts.txt").read_text(encoding="utf-8")
    prompts: list[str] = []
    for line in text.splitlines():
        if line.startswith((" ", "Support:")):
            prompts[-1] += f"\n{line}"
        else:
            prompts.append(line)
    return prompts


def _of_tokens(tokens: Sequence[int], most: int) -> list[Sample]:
    """A row of some tokens, the first of them once more at its end: what comes after each one is compared."""
    return [_all_of([*tokens[: most - 1], tokens[0]])] if tokens else []


def _of_file(
    path: str, tokenizer: Any, side: SideFile | None, max_length: int, room: int, tokens: Sequence[int]
) -> Probe:
    found = prepare(path, tokenizer, DataConfig(max_length=max_length, packing=False), "eval")
    trained_on = side.facts.get("data") if side is not None else None
    notes: tuple[str, ...] = ()
    if trained_on is not None and found.digest == trained_on:
        notes = (f"{path} holds the rows that the adapter was trained on; held-out ones tell more",)
    probe = _probe(found.samples, room, "data", path, notes)
    if tokens and not bool(torch.isin(probe.batch.input_ids, torch.tensor(tokens)).any()):
        told = f"no row of {path} has a token whose row was trained: a row of those is compared too"
        own = _of_tokens(tokens, min(max_length, PROMPT_TOKENS))
        probe = _probe([*own, *found.samples], room, "data", path, (*notes, told))
    return probe


def _all_of(ids: list[int]) -> Sample:
    return Sample(ids, [IGNORED, *ids[1:]])


def _probe(
    samples: Sequence[Sample], room: int, kind: str, source: str, notes: tuple[str, ...] = ()
) -> Probe:
    """As many samples as there is room for; at least one, cut to it.

    Raises:
        DataError: None of them has a token to predict.
    """
    kept: list[Sample] = []
    longest = 0
    for sample in samples:
        learned = [place for place, label in enumerate(sample.labels) if place and label != IGNORED]
        if room and learned:
            end = learned[min(room, len(learned)) - 1] + 1
            longest = max(longest, end)
            if kept and longest * (len(kept) + 1) > MAX_TOKENS:
                break
            kept.append(Sample(sample.input_ids[:end], sample.labels[:end], sample.where))
            room -= min(room, len(learned))
    if not kept:
        raise DataError("no row has a token to predict", where=source, fix="give rows with answers or texts")
    return Probe(collate(kept, [[place] for place in range(len(kept))], 0), kind, source, notes)
