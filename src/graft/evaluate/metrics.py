"""The metrics by name: what each needs from a model, and how it is computed from the predictions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graft.config import closest
from graft.errors import ConfigError
from graft.evaluate.loss import perplexity


@dataclass(kw_only=True)
class Prediction:
    """What a model makes of one row; fields stay None where no metric asked for them."""

    where: str
    """File and line of the row."""
    prompt: str | None = None
    reference: str | None = None
    """The answer in the data."""
    prediction: str | None = None
    """What the model wrote."""
    loss: float | None = None
    """Cross-entropy summed over the row's labelled tokens, in nats."""
    num_labelled_tokens: int | None = None
    num_labelled_characters: int | None = None
    choice: str | None = None
    """The likeliest of the choices."""
    choice_scores: dict[str, float] | None = None
    """Log-likelihood of each choice, in nats."""
    choice_tokens: dict[str, int] | None = None
    """Number of tokens of each choice."""

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Need = Literal["loss", "text", "choice"]
"""A pass over the data: losses of the labelled tokens, written answers, or scored choices."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that says how well a model does."""

    name: str
    doc: str
    need: Need
    better: Literal["min", "max"]
    compute: Callable[[Sequence[Prediction]], float]


def register_metric(metric: Metric) -> None:
    """Add a metric, so that `evaluate` knows it by its name.

    Raises:
        ConfigError: The name is taken.
    """
    if metric.name in METRICS:
        raise ConfigError(
            f"the metric {metric.name!r} exists already", where="metrics", fix="choose another name"
        )
    METRICS[metric.name] = metric


def find_metrics(names: Iterable[str]) -> list[Metric]:
    """Look metrics up, each once, in the order given.

    Raises:
        ConfigError: A name is unknown (the closest one is told), or there are none.
    """
    found = []
    for name in dict.fromkeys(names):
        if name not in METRICS:
            near = closest(name, METRICS)
            raise ConfigError(
                f"no metric {name!r}; there are {', '.join(METRICS)}",
                where="metrics",
                fix=f"did you mean {near!r}?" if near else "choose one of these",
            )
        found.append(METRICS[name])
    if not found:
        raise ConfigError("no metric was named", where="metrics", fix=f"choose from {', '.join(METRICS)}")
    return found


def mean_loss(predictions: Sequence[Prediction]) -> float:
    """Nats per labelled token, every token weighing the same."""
    return _total_loss(predictions) / sum(row.num_labelled_tokens or 0 for row in predictions)


def bits_per_character(predictions: Sequence[Prediction]) -> float:
    """Bits per character of the labelled text: comparable between tokenizers; nan where there are none."""
    num_characters = sum(row.num_labelled_characters or 0 for row in predictions)
    return _total_loss(predictions) / math.log(2) / num_characters if num_characters else math.nan


def _total_loss(predictions: Sequence[Prediction]) -> float:
    return math.fsum(row.loss or 0.0 for row in predictions)


def _mean(score: Callable[[Prediction], float]) -> Callable[[Sequence[Prediction]], float]:
    return lambda rows: math.fsum(map(score, rows)) / len(rows)


def likeliest_per_token(row: Prediction) -> str:
    """The choice whose log-likelihood per token is highest."""
    scores, sizes = row.choice_scores or {}, row.choice_tokens or {}
    return max(scores, key=lambda choice: scores[choice] / sizes[choice])


def texts_equal(row: Prediction) -> float:
    """1 where the written text is the reference, white space at both ends aside; else 0."""
    return float((row.prediction or "").strip() == (row.reference or "").strip())


def rouge_l(text: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, between 0 and 1.

    Words are runs of letters and digits, in lower case.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3 (beta = 1).
    """
    ours, theirs = _words(text), _words(reference)
    common = longest_common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table being the bits of an integer.

    Source: Hyyro 2004, Bit-parallel LCS-length computation revisited.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = full = (1 << len(first)) - 1
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches) | (row - matches)
    return len(first) - (row & full).bit_count()


def bleu(predictions: Sequence[Prediction]) -> float:
    """Corpus BLEU of sacrebleu, from 0 to 100.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "the metric bleu needs the package sacrebleu", where="metrics", fix="pip install sacrebleu"
        ) from error
    texts = [row.prediction or "" for row in predictions]
    score = sacrebleu.corpus_bleu(texts, [[row.reference or "" for row in predictions]]).score
    return float(score)


_OURS = (
    Metric(name="loss", doc="nats per labelled token", need="loss", better="min", compute=mean_loss),
    Metric(
        name="perplexity",
        doc="exp(loss)",
        need="loss",
        better="min",
        compute=lambda rows: perplexity(mean_loss(rows)),
    ),
    Metric(
        name="bits_per_character",
        doc="bits per character of the labelled text",
        need="loss",
        better="min",
        compute=bits_per_character,
    ),
    Metric(
        name="exact_match",
        doc="share of rows whose written text is the reference",
        need="text",
        better="max",
        compute=_mean(texts_equal),
    ),
    Metric(
        name="rouge_l",
        doc="ROUGE-L F-measure of the written text",
        need="text",
        better="max",
        compute=_mean(lambda row: rouge_l(row.prediction or "", row.reference or "")),
    ),
    Metric(name="bleu", doc="corpus BLEU (0 to 100)", need="text", better="max", compute=bleu),
    Metric(
        name="accuracy",
        doc="share of rows whose likeliest choice is the reference",
        need="choice",
        better="max",
        compute=_mean(lambda row: float(row.choice == row.reference)),
    ),
    Metric(
        name="accuracy_per_token",
        doc="accuracy, the likelihood of a choice counted per token so that long ones are not put back",
        need="choice",
        better="max",
        compute=_mean(lambda row: float(likeliest_per_token(row) == row.reference)),
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _OURS}
"""Every metric, by name."""
