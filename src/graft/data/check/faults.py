"""The faults that data can have: what is told of each, why it matters and how to mend it, or None."""

from __future__ import annotations

import numpy as np

from graft.data.check.facts import Facts, quantile
from graft.data.config import DataConfig
from graft.data.filters.findings import FINDINGS
from graft.data.formats import CHAT_FORMATS

ROUND = 64
"""A max_length that is advised is a multiple of it."""


TEMPLATED = 0.2
"""From this share of rows with old marks on all of them are taken for rendered before."""

Told = tuple[str, str, str] | None
"""What, why and how to mend it; None where there is nothing to tell."""


def _of(part: int, whole: int, noun: str) -> str:
    return f"{part:,} of {whole:,} {noun} ({_share(part, whole)})"


def _share(part: int, whole: int) -> str:
    """A share as it is read: never 0 % of something that is there."""
    share = 100 * part / whole if whole else 0.0
    return "under 0.1 %" if part and share < 0.1 else f"{share:.1f} %".replace(".0 %", " %")


def _of_samples(part: int, facts: Facts) -> str:
    return f"{part:,} of {facts.num_samples:,} samples ({_share(part, facts.num_samples)})"


def _above(part: int, whole: int, threshold: float) -> bool:
    return part > 0 and part > threshold * whole


def stops(facts: Facts, threshold: float) -> Told:
    """The run stops at a row."""
    if not facts.error:
        return None
    left = f", and {facts.num_rejected - 1:,} more rows give no sample" if facts.num_rejected > 1 else ""
    return (
        f"the run stops at a row: {facts.error}{left}",
        "what is shown here is the file without these rows",
        facts.error_fix or "correct the row, or set data.skip_invalid to leave such rows out",
    )


def templated(facts: Facts, threshold: float) -> Told:
    """Rows that were rendered with a template before; of those looked at."""
    if not _above(facts.num_templated, facts.num_looked_at, threshold):
        return None
    count = _of(facts.num_templated, facts.num_looked_at, "rows")
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


def control_text(facts: Facts, threshold: float) -> Told:
    """Texts that spell a control token; of samples."""
    if not _above(facts.num_control_text, facts.num_samples, threshold) or templated(facts, TEMPLATED):
        return None
    return (
        f"{_of_samples(facts.num_control_text, facts)} spell a control token, which was read as plain text",
        "an end token that stands in the text does not end anything; graft puts one where it belongs",
        "remove the spelling from the rows, unless the text is about it",
    )


def begin_twice(facts: Facts, threshold: float) -> Told:
    """Two begin tokens; of samples."""
    if not _above(facts.num_bos_twice, facts.num_samples, threshold):
        return None
    return (
        f"{_of_samples(facts.num_bos_twice, facts)} begin with two begin tokens",
        "no model was pretrained on that, and answers get worse",
        "take one of them out of the chat template (data.chat_template)",
    )


def no_begin(facts: Facts, threshold: float) -> Told:
    """No begin token where texts have one; of samples."""
    if not _above(facts.num_bos_missing, facts.num_samples, threshold):
        return None
    return (
        f"{_of_samples(facts.num_bos_missing, facts)} begin without the begin token",
        "the tokenizer puts one before texts, so the model has hardly seen a text without it",
        "write {{ bos_token }} at the beginning of the chat template (data.chat_template)",
    )


def no_end(facts: Facts, threshold: float) -> Told:
    """No end token is learned, though nothing was cut; of samples."""
    lost = facts.num_without_end - facts.num_cut_ends
    if facts.kind == "class" or not _above(lost, facts.num_samples, threshold):
        return None
    return (
        f"in {_of_samples(lost, facts)} no end token is learned, though nothing was cut away",
        "a model that never learns to stop writes on and on",
        "let the template's {% generation %} mark reach over the token that closes the answer",
    )


def little_learned(facts: Facts, threshold: float) -> Told:
    """A share of learned tokens below the threshold."""
    if facts.kind == "class" or not facts.num_tokens or facts.labelled_share >= threshold:
        return None
    return (
        f"only {_share(facts.num_labelled, facts.num_tokens)} of the tokens are learned",
        "nearly all the time of the run goes into reading prompts",
        "shorten what is the same in all prompts, or check that the right column is the answer",
    )


def all_learned(facts: Facts, threshold: float) -> Told:
    """A share of learned tokens from the threshold on, of rows that have questions."""
    chat = facts.format in CHAT_FORMATS or facts.format in ("prompt_completion", "preference")
    learnable = facts.num_tokens - facts.num_samples  # nothing stands before a sample's first token
    if not chat or facts.kind == "class" or not learnable or facts.num_labelled < threshold * learnable:
        return None
    return (
        f"{_share(facts.num_labelled, facts.num_tokens)} of the tokens are learned, the questions too",
        "the model then learns to write questions, at the cost of its answers",
        "set data.loss_on to auto",
    )


def truncated(facts: Facts, threshold: float) -> Told:
    """Answers cut at max_length; of rows."""
    if facts.kind == "class" or not _above(facts.num_truncated, facts.num_used, threshold):
        return None
    count = _of(facts.num_truncated, facts.num_used, "rows")
    return (
        f"{count} are cut at max_length {facts.max_length:,}",
        f"the end of their answers is missing, the end token with it{_no_stop(facts)}"
        if facts.on_overlong == "truncate"
        else "what their prompts or conversations begin with is missing",
        _longer(facts),
    )


def _no_stop(facts: Facts) -> str:
    if not facts.num_cut_ends:
        return ""
    return f": none is learned in {_share(facts.num_cut_ends, facts.num_samples)} of the samples"


def _longer(facts: Facts) -> str:
    wanted = needed_length(facts)
    rounded = -(-wanted // ROUND) * ROUND
    drop = "; or set data.on_overlong to drop" if facts.on_overlong != "drop" else ""
    if facts.context is not None and wanted > facts.context:
        return (
            f"shorten the rows: 99 % of them need {wanted:,} tokens, the model sees {facts.context:,}{drop}"
        )
    rounded = rounded if facts.context is None else min(rounded, facts.context)
    return f"data.max_length {rounded} would keep 99 % of the rows whole{drop}"


def needed_length(facts: Facts, share: float = 0.99) -> int:
    """The max_length at which so large a share of the rows would be whole.

    Where not all rows that are too long were measured, those that were stand for all.
    """
    if not facts.needed:
        return facts.length_at(share)
    size = 2 if facts.kind == "pair" else 1
    beyond = max(min(facts.num_truncated + facts.num_dropped, facts.num_rows), 1)
    total = facts.num_samples // size + facts.num_dropped
    rank = share * total - (total - beyond)
    if rank <= 0:
        return facts.length_at(share)
    return quantile(np.bincount(facts.needed), min(rank / beyond, 1.0))


def class_cut(facts: Facts, threshold: float) -> Told:
    """Texts with a class cut at max_length; of rows."""
    if facts.kind != "class" or not _above(facts.num_truncated, facts.num_used, threshold):
        return None
    count = _of(facts.num_truncated, facts.num_used, "texts")
    return f"{count} are cut at max_length {facts.max_length:,}", "their ends are not seen", _longer(facts)


def dropped(facts: Facts, threshold: float) -> Told:
    """Rows left out for their length; of rows."""
    if not _above(facts.num_dropped, facts.num_rows, threshold):
        return None
    count = _of(facts.num_dropped, facts.num_rows, "rows")
    return (
        f"{count} are left out because of max_length {facts.max_length:,}",
        "long rows are often the ones that teach most",
        _longer(facts),
    )


def rejected(facts: Facts, threshold: float) -> Told:
    """Rows left out for anything else; of rows."""
    count = facts.num_rejected - facts.num_dropped
    if facts.error or not _above(count, facts.num_rows, threshold):
        return None
    first = next((p for p in facts.places.get("rejected", ()) if "max_length" not in p.told), None)
    named = f"; the first: {first.where}: {first.told}" if first else ""
    return (
        f"{count:,} of {facts.num_rows:,} rows ({_share(count, facts.num_rows)}) give no sample{named}",
        "what they hold is not learned",
        "correct them, or remove them from the file",
    )


def overlap(facts: Facts, threshold: float) -> Told:
    """Evaluation samples that are in the training data."""
    if not _above(facts.num_overlap, facts.num_units, threshold):
        return None
    return (
        f"{_of(facts.num_overlap, facts.num_units, 'samples')} are also in the training data",
        "the evaluation then measures memory, and looks better than the model is",
        "set data.overlap to drop: they are then left out of the training data",
    )


def duplicates(facts: Facts, threshold: float) -> Told:
    """Samples equal to an earlier one."""
    if not _above(facts.num_duplicates, facts.num_units, threshold):
        return None
    return (
        f"{_of(facts.num_duplicates, facts.num_units, 'samples')} are equal to an earlier one",
        "what is there twice is learned by heart sooner than the rest",
        "set data.deduplicate to exact: they are then left out",
    )


def near(facts: Facts, threshold: float) -> Told:
    """Samples nearly equal to an earlier one."""
    if not facts.num_near or not _above(facts.num_near, facts.num_units, threshold):
        return None
    return (
        f"{_of(facts.num_near, facts.num_units, 'samples')} are nearly equal to an earlier one",
        "what is there many times is learned by heart sooner than the rest",
        "set data.deduplicate to near: they are then left out",
    )


def odd(facts: Facts, threshold: float) -> Told:
    """Rows of which cleaning tells; of rows."""
    found = [(name, count) for name, count in facts.odd if _above(count, facts.num_rows, threshold)]
    if not found:
        return None
    told = "; ".join(f"{_of(count, facts.num_rows, 'rows')}: {FINDINGS[name]}" for name, count in found)
    names = ", ".join(name for name, _ in found if name != "other_script")
    return told, "the model learns to write like that", f"look at them; data.drop [{names}] leaves them out"


def unknown(facts: Facts, threshold: float) -> Told:
    """Characters or tokens that the tokenizer does not know; of tokens."""
    if not facts.unknown and not _above(facts.num_unknown, facts.num_tokens, threshold):
        return None
    shown = f": {facts.unknown}" if facts.unknown else ""
    tokens = f"; {facts.num_unknown:,} tokens ({_share(facts.num_unknown, facts.num_tokens)}) stand for such"
    return (
        f"the tokenizer does not know all characters{shown}{tokens if facts.num_unknown else ''}",
        "the model can neither read nor write them",
        "take a model whose tokenizer knows them, or write the rows without them",
    )


def short_answers(facts: Facts, threshold: float) -> Told:
    """A median of learned tokens, the end among them, up to the threshold."""
    median = facts.labelled_at(0.5)
    if facts.kind != "text" or facts.format == "text" or not facts.num_samples or median > threshold:
        return None
    return (
        f"half of the answers have {max(median - 1, 0)} tokens or fewer before the end token",
        "answers that short are mostly labels; or the wrong column is taken for the answer",
        "check the samples; for labels --task classification learns faster",
    )


def plain_rows(facts: Facts, threshold: float) -> Told:
    """Plain rows for a model with a chat template."""
    if not facts.has_template or facts.format not in ("prompt_completion", "preference"):
        return None
    return (
        "the tokenizer has a chat template, the rows are plain prompts and completions",
        "a chat model knows prompts only in its template, and unlearns to chat without it",
        'give rows of "messages" (or "instruction" and "output"), unless it is meant to complete plain text',
    )


def no_template(facts: Facts, threshold: float) -> Told:
    """Rows written with headings for want of a template."""
    if facts.has_template or facts.format not in ("alpaca", "sharegpt"):
        return None
    return (
        "there is no chat template: rows are written with '### Instruction:' and '### Response:'",
        "the model must be asked in the same words later",
        "set data.chat_template to a .jinja file for another way",
    )


def unused(facts: Facts, threshold: float) -> Told:
    """More unused columns than the threshold."""
    if len(facts.unused) <= threshold:
        return None
    return (
        f"columns that are not used: {', '.join(facts.unused)}",
        "what they hold is not learned",
        "fine if that is meant; otherwise write it into the prompt, or set data.format",
    )


def padding(facts: Facts, threshold: float) -> Told:
    """A share of used token places below the threshold, without packing."""
    if facts.packed is None or facts.packed.packing or facts.packed.utilisation >= threshold:
        return None
    return (
        f"{_share(round(1e6 * (1 - facts.packed.utilisation)), 10**6)} of the token places are padding",
        "memory and time go into nothing",
        "set data.packing to true",
    )


def far_too_long(facts: Facts, threshold: float) -> Told:
    """A max_length so many times the longest sample."""
    if not facts.longest or facts.max_length < threshold * facts.longest:
        return None
    rows = facts.packed.num_rows if facts.packed is not None else 0
    return (
        f"max_length is {facts.max_length:,}, the longest sample has {facts.longest:,} tokens",
        f"with packing a row holds many samples, so that there are few steps ({rows:,} rows in an epoch)"
        if facts.packed is not None and facts.packed.packing
        else "memory is planned for rows that never come",
        f"data.max_length {max(-(-facts.longest // ROUND) * ROUND, ROUND)} is enough",
    )


def context(facts: Facts, threshold: float) -> Told:
    """A max_length that the model's context cut."""
    # Who left the setting alone has nothing to change.
    if facts.asked_max_length <= facts.max_length or facts.asked_max_length == DataConfig.max_length:
        return None
    return (
        f"max_length is {facts.max_length:,}, the model's context, instead of {facts.asked_max_length:,}",
        "beyond its context the model has no positions, or untrained ones",
        f"set data.max_length to {facts.max_length}",
    )


def rare_class(facts: Facts, threshold: float) -> Told:
    """A class with so many times the samples of another."""
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


def length_bias(facts: Facts, threshold: float) -> Told:
    """Chosen and rejected answers whose median lengths differ by such a factor."""
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
