"""Perplexity for `evaluate`, from the losses that a model gave: no model is loaded here."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy
from scipy.special import stdtrit

_DESCRIPTION = "Mean loss per token and perplexity, with 95 % intervals over examples."
_INPUTS = """
Args:
    nll: of each example, the negative log likelihood of its tokens, summed, in nats.
    tokens: of each example, how many tokens that sum is over.

Returns:
    loss: nats per token over all examples, sum(nll) / sum(tokens).
    loss_interval: [low, high], 95 % over the examples, see `mean_loss`; None of a single one.
    perplexity, perplexity_interval: exp of these.
    examples, tokens: how many there are; an example of no tokens is none.
"""


def mean_loss(nll: Any, tokens: Any) -> tuple[float, tuple[float, float] | None]:
    """Nats per token and their 95 % interval, with examples as the units that were drawn.

    Examples differ in length, so this is a ratio of two sums: its standard error is that of the
    ratio estimator (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.4), from the residuals
    nll - loss * tokens, with Student's t for as many examples. Tokens of one example depend on each
    other, and an interval over tokens would be too narrow.

    Args:
        nll: (examples,) summed losses in nats.
        tokens: (examples,) their counts.
    """
    nll, tokens = numpy.asarray(nll, float), numpy.asarray(tokens, float)
    nll, tokens = nll[tokens > 0], tokens[tokens > 0]
    count, total = len(nll), tokens.sum()
    loss = nll.sum() / total
    if count < 2:
        return float(loss), None
    residuals = nll - loss * tokens
    error = math.sqrt(count / (count - 1) * (residuals**2).sum()) / total
    reach = stdtrit(count - 1, 0.975) * error
    return float(loss), (float(loss - reach), float(loss + reach))


class Perplexity(evaluate.Metric):
    """The metric of this file."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(kinds),
        )

    def _compute(self, nll: list[float], tokens: list[int]) -> dict[str, Any]:
        if not len(nll):
            raise ValueError("nll must not be empty: perplexity of nothing is not defined")
        if not numpy.isfinite(nll).all():
            place = int(numpy.argmin(numpy.isfinite(nll)))
            raise ValueError(f"nll must be finite, number {place} is {nll[place]}")
        if min(tokens) < 0 or not sum(tokens):
            raise ValueError(
                f"tokens must be at least 0 and not all of them 0, the least is {min(tokens)}"
            )
        for place, (one, count) in enumerate(zip(nll, tokens, strict=True)):
            if one and not count:
                raise ValueError(f"nll of no tokens must be 0, number {place} is {one}")
        loss, interval = mean_loss(nll, tokens)
        return {
            "loss": loss,
            "loss_interval": interval and list(interval),
            "perplexity": _exp(loss),
            "perplexity_interval": interval and [_exp(end) for end in interval],
            "examples": sum(count > 0 for count in tokens),
            "tokens": int(sum(tokens)),
        }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
