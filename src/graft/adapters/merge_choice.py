"""Which candidate of a merge is written, and when none may be."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from graft.adapters.candidates import Form
from graft.adapters.likeness import Likeness
from graft.adapters.merge_report import MIN_EFFECT, MIN_SURVIVAL, Candidate
from graft.config import did_you_mean
from graft.errors import AdapterError

CHOICES = ("auto", "dense", "dequantized", "quantized", "requantized")

AS_TRAINED = "as trained"
"""What "auto" means for an adapter that was trained to be stored quantized."""

_FORMS = {
    "auto": ("dense", "dequantized"),
    "dense": ("dense",),
    "dequantized": ("dequantized",),
    "quantized": ("quantized",),
    "requantized": ("requantized", "requantized_dense"),
    AS_TRAINED: ("requantized",),
}
"""The candidates that each choice allows."""


def check_choice(into: Any, from_quantized: bool, quantization: object) -> str:
    """The choice, where it is one.

    Raises:
        AdapterError: There is no such choice, or two arguments contradict each other.
    """
    if into not in CHOICES:
        raise AdapterError(
            f"{reprlib.repr(into)} is no way to write a merged model",
            where="into",
            fix=did_you_mean(str(into), CHOICES),
        )
    if from_quantized and into not in ("auto", "dequantized"):
        raise AdapterError(
            f"from_quantized asks for the decoded weights, into for {into!r}",
            where="into",
            fix="leave one of them out",
        )
    if quantization is not None and (from_quantized or into in ("dense", "dequantized", "quantized")):
        raise AdapterError(
            "a quantization cannot act: dense weights, or the codes of the base, were asked for",
            where="quantization",
            fix='into="requantized" (--into requantized), or leave it out',
        )
    return "dequantized" if from_quantized else str(into)


def refuse_without_effect(effect: Likeness, live: Tensor, where: str, *, allowed: bool) -> None:
    """Refuse an adapter that moves no logit.

    Raises:
        AdapterError: It does not, and that is not allowed.
    """
    least = MIN_EFFECT * float(live.abs().max())
    if effect.gap > least or allowed:
        return
    raise AdapterError(
        f"the adapter changes nothing: the largest move of a logit is {effect.gap:.2g}, "
        f"rounding in float32 alone moves them by {least:.2g}",
        where=where,
        fix="train it further; allow_no_op=True (--allow-no-op) writes it all the same",
    )


def choose(
    forms: Sequence[Form], candidates: Sequence[Candidate], into: str, effect: Likeness, *, allowed: bool
) -> tuple[Form, str]:
    """The candidate with the smallest divergence of those that are allowed and keep the update.

    Where the base's own codes take the update without a rounding, that is the one without being asked.

    Returns:
        Its form, and why this one.

    Raises:
        AdapterError: The update is lost in each of them, and that is not allowed.
    """
    measured = dict(zip((form.name for form in forms), candidates, strict=True))
    into = "quantized" if into == "auto" and "quantized" in measured else into
    asked = [item for item in candidates if item.name in _FORMS[into]]
    assert asked, into
    left = [item for item in asked if allowed or not item.is_no_op]
    if not left:
        _refuse_lost(asked, measured, effect)
    best = min(left, key=lambda item: item.kl)
    form = next(form for form in forms if form.name == best.name)
    if form.exact:
        return form, "the update moves the shifts of the blocks alone: nothing is rounded"
    if into == AS_TRAINED:
        return form, "what it was trained to be stored as"
    if len(asked) == 1:
        return form, "asked for" if into != "auto" else "the only one that stays dense"
    others = ", ".join(f"{item.name} {item.kl:.2g}" for item in asked if item is not best)
    return form, f"KL {best.kl:.2g} nats a token from the live model; {others}"


def _refuse_lost(asked: Sequence[Candidate], measured: dict[str, Candidate], effect: Likeness) -> NoReturn:
    told = "; ".join(
        f"{item.name} in {item.stored_as}: {item.survival:.1%} of the update survives rounding, "
        f"KL {item.kl:.2g} from the live model"
        for item in asked
    )
    others = [item for item in measured.values() if not item.is_no_op]
    best = min(others, key=lambda item: item.kl, default=None)
    fix = "dtype float32 (--dtype float32)"
    if best is not None:
        fix = f"--into {best.name.removesuffix('_dense')} ({best.survival:.0%} survives, KL {best.kl:.2g})"
    raise AdapterError(
        f"the merged model would be the base: {told}; the adapter itself moves the base by {effect.kl:.2g}",
        where=f"survival under {MIN_SURVIVAL:.0%}",
        fix=f"{fix}, or serve the adapter unmerged; allow_no_op=True (--allow-no-op) writes it all the same",
    )
