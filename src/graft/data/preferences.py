"""Preferences: rows with a prompt and two answers, one chosen and one rejected, as pairs of samples.

A prompt is a text, a list of messages, or an instruction; the answers are texts, messages or lists of
messages, in role/content or from/value. Only the answers are learned from.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.columns import check_used
from graft.data.config import DataConfig
from graft.data.conversations import FLAGS, continued, history_of, read_alpaca
from graft.data.examples import Conversation, Message, column_text, plain_pair
from graft.data.filters.cleaning import Cleaning
from graft.data.filters.content import DIGEST_BYTES, Content, content_of
from graft.data.formats import PROMPTS, Example, Pair
from graft.data.masking import Encoder
from graft.data.prepare import Dataset, count_samples, make_encoder
from graft.data.quarantine import Quarantine
from graft.data.reading import LeftOut, read_file, refuse_all
from graft.data.report import num_rows, show_sample
from graft.data.samples import TRUNCATED, Rejected, Sample
from graft.data.sources import Row, Source
from graft.errors import DataError

PLAIN, CHAT = "preference", "preference_chat"
"""What a report calls rows of texts, and rows that the chat template renders."""

ANSWERS = ("chosen", "rejected")
_HISTORIES = ("conversations", "conversation", "messages", "prompt")
KNOWN = {*ANSWERS, *_HISTORIES, *PROMPTS, "instruction", "system", "history", "tools"}
"""Columns that have a part in a preference."""


@dataclass(frozen=True)
class Preference:
    """Two examples with one prompt; the first has the better answer."""

    chosen: Example
    rejected: Example
    where: str


def read_preference(row: Row, *, chat: bool) -> Preference:
    """Read one row.

    Args:
        row: With "chosen" and "rejected", and a prompt: "prompt" (or "question", "query", "input") as text
            or messages, "conversations", "messages", or "instruction" and perhaps "input". Without any, both
            answers are whole conversations and what they begin with in common is the prompt.
        chat: Whether the tokenizer has a chat template; without one from/value and instruction rows are
            written with headings, as for supervised data.

    Raises:
        DataError: A part is missing or malformed, or the answers have no prompt.
    """
    value = row.value
    if not isinstance(value, dict) or not all(name in value for name in ANSWERS):
        there = ", ".join(map(repr, value)) if isinstance(value, dict) else "one text"
        raise DataError(
            f"a preference needs the columns 'chosen' and 'rejected'; the row has {there or 'none'}",
            where=row.where,
            fix="name them so, or leave out training.loss: dpo",
        )
    chosen, rejected = (_example(row, name, chat=chat) for name in ANSWERS)
    return Preference(chosen, rejected, row.where)


def _example(row: Row, name: str, *, chat: bool) -> Example:
    value = row.value
    assert isinstance(value, dict)
    answer = value[name]
    if isinstance(answer, str) and "instruction" in value:
        conversation = read_alpaca(Row({**value, "output": answer}, row.where))
        conversation = Conversation(
            conversation.messages, row.where, conversation.tools, len(conversation.messages) - 1
        )
        return conversation if chat else plain_pair(conversation)
    history = next((value[key] for key in _HISTORIES if isinstance(value.get(key), list)), None)
    prompt = next((key for key in PROMPTS if isinstance(value.get(key), str)), None)
    if history is None and prompt is not None and isinstance(answer, str):
        return Pair(column_text(row, prompt), answer, row.where)
    if history is None and prompt is not None:
        history = [{"role": "user", "content": value[prompt]}]
    turns = _turns(answer, name, row)
    if history is None:
        history, turns = _apart(turns, row, name)
    return _conversation(history_of(history, row), turns, [*history, *turns], row, chat=chat)


def _conversation(
    history: list[Message], turns: list[Any], raws: list[Any], row: Row, *, chat: bool
) -> Example:
    _check_flags(turns, row)
    made = continued(history, history_of(turns, row), row)
    from_value = any(isinstance(raw, dict) and "from" in raw for raw in raws)
    return plain_pair(made) if from_value and not chat else made


def _check_flags(turns: list[Any], row: Row) -> None:
    """Refuse an answer of which a part is not to be learned: an answer is compared as a whole.

    Raises:
        DataError: It has such a part.
    """
    for turn in turns:
        name = next((name for name in FLAGS if isinstance(turn, dict) and turn.get(name) == 0), "")
        if name:
            raise DataError(
                f"an answer has a message with {name!r}: {turn[name]!r}, and answers are compared as a whole",
                where=row.where,
                fix=f"leave {name!r} out, or put the message into the prompt",
            )


def _turns(answer: Any, name: str, row: Row) -> list[Any]:
    """An answer as messages.

    Raises:
        DataError: It is none, or does not end with the assistant.
    """
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    turns = [answer] if isinstance(answer, dict) else answer
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"column {name!r} must hold a text, a message or messages, not {answer!r:.60}",
            where=row.where,
            fix=f'"{name}": "..." or [{{"role": "assistant", "content": "..."}}]',
        )
    if not str(history_of(turns[-1:], row)[0]["role"]).startswith("assistant"):
        raise DataError(
            f"column {name!r} does not end with an answer of the assistant", where=row.where, fix="end it so"
        )
    return turns


def _apart(turns: list[Any], row: Row, name: str) -> tuple[list[Any], list[Any]]:
    """Whole conversations: the messages that both begin with are the prompt.

    Raises:
        DataError: They have none in common, or are texts without a prompt.
    """
    assert isinstance(row.value, dict)
    other = row.value[next(key for key in ANSWERS if key != name)]
    common = 0
    if isinstance(other, list):
        most = min(len(turns), len(other)) - 1
        common = next((i for i in range(most) if turns[i] != other[i]), most)
    if not common:
        raise DataError(
            "the row has no prompt, and its answers begin with no message in common",
            where=row.where,
            fix="give the prompt in a column 'prompt', as text or messages",
        )
    return turns[:common], turns[common:]


def prepare_pairs(
    source: Source,
    tokenizer: Any,
    config: DataConfig,
    split: str = "train",
    quarantine: Quarantine | None = None,
    cleaning: Cleaning | None = None,
) -> Dataset:
    """Read a source of preferences and encode it.

    Args:
        source: A file, a directory, a data set of the hub, or rows from Python.
        tokenizer: A fast tokenizer of transformers, or an `Encoder`.
        config: `max_length` holds for each answer with its prompt; `on_overlong` truncates both at the
            right, drops the pair, or is an error.
        split: "train" or "eval".
        quarantine: Receives each row that is left out under skip_invalid.
        cleaning: As of `prepare`.

    Returns:
        Samples in twos: chosen, rejected, chosen, ...

    Raises:
        ConfigError: A setting has nothing to act on.
        DataError: A row is wrong (unless skip_invalid), or no pair can be learned from; names file and line.
        StorageError: The file cannot be read.
    """
    config.refuse_turns("of a pair the two answers are learned", cuts=("truncate_left", "split"))
    config.refuse_cache()
    encoder = tokenizer if isinstance(tokenizer, Encoder) else make_encoder(tokenizer, config)
    rows, reading = read_file(source, config, split, encoder, quarantine)
    report, left_out = reading.report, reading.left_out
    cleaning = cleaning or Cleaning(config)
    read = list(cleaning.pass_on(split)(_preferences(rows, encoder, left_out), _content, report))
    preferences = [preference for preference, _ in read]
    chats = any(isinstance(each.chosen, Conversation) for each in preferences)
    report.format = CHAT if chats else PLAIN
    report.reason = "the columns 'chosen' and 'rejected' are there"
    samples = _samples(read, encoder, config, left_out)
    if not samples:
        refuse_all(report)
    count_samples(samples, encoder, report, size=2)
    assert isinstance(rows[0].value, dict)
    unused = [name for name in rows[0].value if name not in KNOWN]
    check_used(config.columns, unused, "preferences", report.path)
    if unused:
        report.notes.append(f"columns that are not used: {', '.join(unused)}")
    if report.num_duplicates:
        report.notes.append(f"{report.num_duplicates} pairs are equal to an earlier one")
    if report.rejected:
        left, first = num_rows(report.num_rejected), ": ".join(report.rejected[0])
        report.notes.append(f"{left} left out, the first: {first}")
    report.preview = [show_sample(sample, encoder.tokenizer) for sample in samples[:2]]
    return Dataset(samples, report, reading.digest)


def _content(read: tuple[Preference, Row]) -> Content:
    preference, _ = read
    chosen, rejected = content_of(preference.chosen), content_of(preference.rejected)
    digest = hashlib.blake2b(chosen.digest + rejected.digest, digest_size=DIGEST_BYTES).digest()
    answers = f"{chosen.answer}\n{rejected.answer}"
    # Two rankings of one prompt are two comparisons, no contradiction.
    return Content(preference.where, digest, None, chosen.prompt, answers)


def _preferences(
    rows: Sequence[Row], encoder: Encoder, left_out: LeftOut
) -> Iterator[tuple[Preference, Row]]:
    for row in rows:
        try:
            yield read_preference(row, chat=encoder.has_template), row
        except DataError as error:
            left_out.add(error, row)


def _samples(
    read: Sequence[tuple[Preference, Row]], encoder: Encoder, config: DataConfig, left_out: LeftOut
) -> list[Sample]:
    report = left_out.report
    examples = [example for each, _ in read for example in (each.chosen, each.rejected)]
    found = list(encoder.encode(examples, config.max_length, config.on_overlong))
    samples: list[Sample] = []
    remarks: Counter[str] = Counter()
    for index in range(0, len(found), 2):
        halves = [half if isinstance(half, Rejected) else half[0] for half in found[index : index + 2]]
        row = read[index // 2][1]
        bad = next((half for half in halves if isinstance(half, Rejected)), None)
        if isinstance(bad, Rejected):
            reason = f"{ANSWERS[halves.index(bad)]}: {bad.reason}"
            error = DataError(reason, where=bad.where, fix=bad.fix)
            if bad.overlong and config.on_overlong == "error":
                raise error
            left_out.add(error, row, invalid=bad.invalid, overlong=bad.overlong)
            continue
        pair = [half for half in halves if isinstance(half, Sample)]
        if pair[0].input_ids == pair[1].input_ids:
            cut = any(TRUNCATED in half.remarks for half in pair)
            after = f" after the cut at max_length {config.max_length:,}" if cut else ""
            same = DataError(f"nothing to prefer: both answers are the same{after}", where=row.where)
            left_out.add(same, row, invalid=False)
            continue
        report.num_used += 1
        remarks.update({remark for half in pair for remark in half.remarks})
        samples += pair
    report.num_truncated = remarks[TRUNCATED]
    report.notes += [f"{num_rows(count)} {remark}" for remark, count in remarks.items()]
    return samples
