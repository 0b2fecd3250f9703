"""What should be mended in a data set before it is trained on: one rule for each fault, over the facts of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graft.data.check_facts import Facts, quantile
from graft.data.formats import CHAT_FORMATS

LEVELS = ("stop", "alarm", "advice", "note")
"""From what no run gets past to what is good to know."""

ROUND = 64
"""A max_length that is advised is a multiple of it."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about a split.

    Attributes:
        rule: Its name.
        level: Of `LEVELS`.
        split: "training" or "evaluation".
        what: What was found, with its number.
        why: Why it matters.
        fix: The setting or the command.
        places: The kind of places of `Facts` that show it, or "".
    """

    rule: str
    level: str
    split: str
    what: str
    why: str
    fix: str
    places: str = ""


Told = tuple[str, str, str] | None
"""What, why and how to mend it; None where there is nothing to tell."""


@dataclass(frozen=True)
class Rule:
    """A fault that data can have.

    Attributes:
        name: What it is called in JSON.
        level: How bad it is.
        threshold: From where on it is told; what it counts is the rule's own.
        test: Tells of it, given the facts and the threshold.
        places: The kind of places that show it.
    """

    name: str
    level: str
    threshold: float
    test: Callable[[Facts, float], Told]
    places: str = ""


def find(splits: Sequence[Facts]) -> list[Finding]:
    """Everything that is to be told of the splits, the worst first."""
    found = [finding for facts in splits for finding in _of(facts)]
    names = [rule.name for rule in RULES]
    return sorted(found, key=lambda item: (LEVELS.index(item.level), names.index(item.rule)))


def _of(facts: Facts) -> Iterator[Finding]:
    for rule in RULES:
        if told := rule.test(facts, rule.threshold):
            yield Finding(rule.name, rule.level, facts.split, *told, places=rule.places)


def _share(part: int, whole: int) -> str:
    """A share as it is read: never 0 % of something that is there."""
    share = 100 * part / whole if whole else 0.0
    return "under 0.1 %" if part and share < 0.1 else f"{share:.1f} %".replace(".0 %", " %")


def _of_samples(part: int, facts: Facts) -> str:
    return f"{part:,} of {facts.num_samples:,} samples ({_share(part, facts.num_samples)})"


def _above(part: int, whole: int, threshold: float) -> bool:
    return part > 0 and part > threshold * whole


def _stops(facts: Facts, threshold: float) -> Told:
    if not facts.error:
        return None
    return (
        f"the run stops at a row: {facts.error}",
        "what is shown here is the file without such rows",
        "correct the row, or set data.skip_invalid to leave such rows out",
    )


def _templated(facts: Facts, threshold: float) -> Told:
    if not _above(facts.num_templated, facts.num_looked_at, threshold):
        return None
    count = f"{facts.num_templated:,} of {facts.num_looked_at:,} rows ({_share(facts.num_templated, facts.num_looked_at)})"
    if facts.format in CHAT_FORMATS:
        return (
            f"{count} hold the marks of a chat template in their messages: they were rendered before",
            "the template is put around it a second time, and the old marks are read as plain text",
            "give the messages as they were before a template was applied",
        )
    return (
        f"{count} hold the marks of a chat template in their text, which is read as plain text",
        "the model would not see its control tokens but their spelling, piece by piece",
        'give rows of "messages", so that the template writes the marks',
    )


def _control_text(facts: Facts, threshold: float) -> Told:
    if not _above(facts.num_control_text, facts.num_samples, threshold) or _templated(facts, 0.2):
        return None
    return (
        f"{_of_samples(facts.num_control_text, facts)} spell a control token, which was read as plain text",
        "an end token that stands in the text does not end anything; graft puts one where it belongs",
        "remove the spelling from the rows, unless the text is about it",
    )


def _begin_twice(facts: Facts, threshold: float) -> Told:
    if not _above(facts.num_bos_twice, facts.num_samples, threshold):
        return None
    return (
        f"{_of_samples(facts.num_bos_twice, facts)} begin with two begin tokens",
        "no model was pretrained on that, and answers get worse",
        "take one of them out of the chat template (data.chat_template)",
    )


def _no_begin(facts: Facts, threshold: float) -> Told:
    if not _above(facts.num_bos_missing, facts.num_samples, threshold):
        return None
    return (
        f"{_of_samples(facts.num_bos_missing, facts)} begin without the begin token",
        "the tokenizer puts one before texts, so the model has hardly seen a text without it",
        "write {{ bos_token }} at the beginning of the chat template (data.chat_template)",
    )


def _no_end(facts: Facts, threshold: float) -> Told:
    lost = facts.num_without_end - facts.num_cut_ends
    if facts.kind == "class" or not _above(lost, facts.num_samples, threshold):
        return None
    return (
        f"in {_of_samples(lost, facts)} no end token is learned, though nothing was cut away",
        "a model that never learns to stop writes on and on",
        "let the template's {% generation %} mark reach over the token that closes the answer",
    )


def _little_learned(facts: Facts, threshold: float) -> Told:
    if facts.kind == "class" or not facts.num_tokens or facts.labelled_share >= threshold:
        return None
    return (
        f"only {_share(facts.num_labelled, facts.num_tokens)} of the tokens are learned",
        "nearly all the time of the run goes into reading prompts",
        "shorten what is the same in all prompts, or check that the right column is the answer",
    )


def _all_learned(facts: Facts, threshold: float) -> Told:
    chat = facts.format in CHAT_FORMATS or facts.format in ("prompt_completion", "preference")
    if not chat or facts.labelled_share < threshold:
        return None
    return (
        f"{_share(facts.num_labelled, facts.num_tokens)} of the tokens are learned, the questions too",
        "the model then learns to write questions, at the cost of its answers",
        "set data.loss_on to auto",
    )


def _truncated(facts: Facts, threshold: float) -> Told:
    if facts.kind == "class" or not _above(facts.num_truncated, facts.num_used, threshold):
        return None
    count = f"{facts.num_truncated:,} of {facts.num_used:,} rows ({_share(facts.num_truncated, facts.num_used)})"
    return (
        f"{count} are cut at max_length {facts.max_length:,}",
        f"the end of their answers is missing, the end token with it{_no_stop(facts)}",
        _longer(facts),
    )


def _no_stop(facts: Facts) -> str:
    if not facts.num_cut_ends:
        return ""
    return f": none is learned in {_share(facts.num_cut_ends, facts.num_samples)} of the samples"


def _longer(facts: Facts) -> str:
    wanted = needed_length(facts)
    rounded = -(-wanted // ROUND) * ROUND
    if facts.context is not None and wanted > facts.context:
        return f"shorten the rows: 99 % of them need {wanted:,} tokens, the model sees {facts.context:,}; or set data.on_overlong to drop"
    if facts.context is not None:
        rounded = min(rounded, facts.context)
    return f"data.max_length {rounded:,} would keep 99 % of the rows whole; or set data.on_overlong to drop"


def needed_length(facts: Facts, share: float = 0.99) -> int:
    """The max_length at which so large a share of the samples would not be cut.

    Where not all truncated rows were measured, those that were stand for all.
    """
    if not facts.needed:
        return facts.length_at(share)
    total = int(facts.lengths.sum())
    halves = facts.num_truncated if facts.kind != "pair" else len(facts.needed)
    beyond = max(min(halves, total), 1)
    rank = share * total - (total - beyond)
    if rank <= 0:
        return facts.length_at(share)
    counts = np.bincount(facts.needed)
    return quantile(counts, min(rank / beyond, 1.0))


def _class_cut(facts: Facts, threshold: float) -> Told:
    if facts.kind != "class" or not _above(facts.num_truncated, facts.num_used, threshold):
        return None
    count = f"{facts.num_truncated:,} of {facts.num_used:,} texts ({_share(facts.num_truncated, facts.num_used)})"
    return f"{count} are cut at max_length {facts.max_length:,}", "their ends are not seen", _longer(facts)


def _dropped(facts: Facts, threshold: float) -> Told:
    if not _above(facts.num_dropped, facts.num_rows, threshold):
        return None
    return (
        f"{facts.num_dropped:,} of {facts.num_rows:,} rows ({_share(facts.num_dropped, facts.num_rows)}) are left out "
        f"because of max_length {facts.max_length:,}",
        "long rows are often the ones that teach most",
        "raise data.max_length",
    )


def _rejected(facts: Facts, threshold: float) -> Told:
    count = facts.num_rejected - facts.num_dropped
    if not _above(count, facts.num_rows, threshold):
        return None
    first = next((p for p in facts.places.get("rejected", ()) if "max_length" not in p.told), None)
    named = f"; the first: {first.where}: {first.told}" if first else ""
    return (
        f"{count:,} of {facts.num_rows:,} rows ({_share(count, facts.num_rows)}) give no sample{named}",
        "what they hold is not learned",
        "correct them, or remove them from the file",
    )


def _overlap(facts: Facts, threshold: float) -> Told:
    if not _above(facts.num_overlap, facts.num_units, threshold):
        return None
    return (
        f"{facts.num_overlap:,} of {facts.num_units:,} samples ({_share(facts.num_overlap, facts.num_units)}) are also in "
        "the training data",
        "the evaluation then measures memory, and looks better than the model is",
        "remove them from one of the files, or hold out a share with data.eval_fraction",
    )


def _duplicates(facts: Facts, threshold: float) -> Told:
    if not _above(facts.num_duplicates, facts.num_units, threshold):
        return None
    return (
        f"{facts.num_duplicates:,} of {facts.num_units:,} samples ({_share(facts.num_duplicates, facts.num_units)}) are "
        "equal to an earlier one",
        "what is there twice is learned by heart sooner than the rest",
        "remove them from the file",
    )


def _near(facts: Facts, threshold: float) -> Told:
    if not facts.num_near or not _above(facts.num_near, facts.num_units, threshold):
        return None
    return (
        f"{facts.num_near:,} of {facts.num_units:,} samples ({_share(facts.num_near, facts.num_units)}) are nearly equal "
        "to an earlier one",
        "what is there many times is learned by heart sooner than the rest",
        "remove them from the file",
    )


def _unknown(facts: Facts, threshold: float) -> Told:
    if not facts.unknown and not _above(facts.num_unknown, facts.num_tokens, threshold):
        return None
    tokens = f"{facts.num_unknown:,} tokens ({_share(facts.num_unknown, facts.num_tokens)}) are the unknown one"
    shown = f": {facts.unknown}" if facts.unknown else ""
    return (
        f"{tokens if facts.num_unknown else 'characters are lost'}; the tokenizer does not know all characters{shown}",
        "the model can neither read nor write them",
        "take a model whose tokenizer knows them, or write the rows without them",
    )


def _short_answers(facts: Facts, threshold: float) -> Told:
    median = facts.labelled_at(0.5)
    if facts.kind != "text" or facts.format == "text" or not facts.num_samples or median > threshold:
        return None
    return (
        f"half of the answers have {max(median - 1, 0)} tokens or fewer before the end token",
        "answers that short are mostly labels; or the wrong column is taken for the answer",
        "check the samples; for labels --task classification learns faster",
    )


def _plain_rows(facts: Facts, threshold: float) -> Told:
    if not facts.has_template or facts.format not in ("prompt_completion", "preference"):
        return None
    return (
        "the tokenizer has a chat template, the rows are plain prompts and completions",
        "a chat model knows prompts only in its template, and unlearns to chat without it",
        'give rows of "messages" (or "instruction" and "output"), unless the model is meant to complete plain text',
    )


def _no_template(facts: Facts, threshold: float) -> Told:
    if facts.has_template or facts.format not in ("alpaca", "sharegpt"):
        return None
    return (
        "there is no chat template: rows are written with '### Instruction:' and '### Response:'",
        "the model must be asked in the same words later",
        "set data.chat_template to a .jinja file for another way",
    )


def _unused(facts: Facts, threshold: float) -> Told:
    if len(facts.unused) <= threshold:
        return None
    return (
        f"columns that are not used: {', '.join(facts.unused)}",
        "what they hold is not learned",
        "fine if that is meant; otherwise write it into the prompt, or set data.format",
    )


def _padding(facts: Facts, threshold: float) -> Told:
    if facts.packed is None or facts.packed.packing or facts.packed.utilisation >= threshold:
        return None
    return (
        f"{_share(round(1e6 * (1 - facts.packed.utilisation)), 10**6)} of the token places are padding",
        "memory and time go into nothing",
        "set data.packing to true",
    )


def _far_too_long(facts: Facts, threshold: float) -> Told:
    if not facts.longest or facts.max_length < threshold * facts.longest:
        return None
    rows = facts.packed.num_rows if facts.packed is not None else 0
    return (
        f"max_length is {facts.max_length:,}, the longest sample has {facts.longest:,} tokens",
        f"with packing a row holds many samples, so that there are few steps ({rows:,} rows in an epoch)"
        if facts.packed is not None and facts.packed.packing
        else "memory is planned for rows that never come",
        f"data.max_length {max(-(-facts.longest // ROUND) * ROUND, ROUND):,} is enough",
    )


def _context(facts: Facts, threshold: float) -> Told:
    if facts.asked_max_length <= facts.max_length:
        return None
    return (
        f"max_length is {facts.max_length:,}, the model's context, instead of {facts.asked_max_length:,}",
        "beyond its context the model has no positions, or untrained ones",
        f"set data.max_length to {facts.max_length:,}",
    )


def _rare_class(facts: Facts, threshold: float) -> Told:
    if not facts.classes or facts.split != "training":
        return None
    most, least = (pick(facts.classes, key=lambda item: item[1]) for pick in (max, min))
    if most[1] <= threshold * max(least[1], 1):
        return None
    return (
        f"the class {most[0]!r:.60} has {most[1]:,} samples, {least[0]!r:.60} has {least[1]:,}",
        "rare classes are hardly learned, and accuracy hides it",
        "add rows of the rare classes",
    )


def _length_bias(facts: Facts, threshold: float) -> Told:
    if facts.preferred is None or not min(facts.preferred):
        return None
    chosen, rejected = facts.preferred
    if max(chosen / rejected, rejected / chosen) < threshold:
        return None
    return (
        f"chosen answers have {chosen:,} tokens in the middle, rejected ones {rejected:,}",
        "the easiest thing to learn from that is to write " + ("more" if chosen > rejected else "less"),
        "add pairs of like lengths, or watch the length of answers",
    )


RULES: tuple[Rule, ...] = (
    Rule("stops", "stop", 0, _stops, "rejected"),
    Rule("templated", "alarm", 0.2, _templated, "control text"),
    Rule("begin_twice", "alarm", 0, _begin_twice, "begin token twice"),
    Rule("no_end", "alarm", 0.01, _no_end, "no end"),
    Rule("overlap", "alarm", 0, _overlap, "overlap"),
    Rule("little_learned", "alarm", 0.01, _little_learned),
    Rule("truncated", "alarm", 0.05, _truncated, "truncated"),
    Rule("class_cut", "advice", 0.05, _class_cut, "truncated"),
    Rule("unknown", "advice", 0, _unknown, "unknown"),
    Rule("no_begin", "advice", 0.01, _no_begin, "no begin token"),
    Rule("rejected", "advice", 0, _rejected, "rejected"),
    Rule("dropped", "advice", 0.01, _dropped, "rejected"),
    Rule("duplicates", "advice", 0.01, _duplicates, "duplicate"),
    Rule("near_duplicates", "advice", 0.05, _near, "near duplicate"),
    Rule("all_learned", "advice", 0.99, _all_learned),
    Rule("plain_rows", "advice", 0, _plain_rows),
    Rule("short_answers", "advice", 3, _short_answers),
    Rule("length_bias", "advice", 1.5, _length_bias),
    Rule("padding", "advice", 0.6, _padding),
    Rule("rare_class", "note", 20, _rare_class),
    Rule("control_text", "note", 0, _control_text, "control text"),
    Rule("no_template", "note", 0, _no_template),
    Rule("unused", "note", 0, _unused),
    Rule("far_too_long", "note", 8, _far_too_long),
    Rule("context", "note", 0, _context),
)
"""Every rule, the weightier first among those of a level; the third column is its threshold."""
