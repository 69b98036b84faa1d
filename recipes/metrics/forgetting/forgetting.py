"""Forgetting for `evaluate`: by how much training raised a model's loss on general text."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import stdtrit

_DESCRIPTION = "Increase of the mean loss per token, paired over examples, with a 95 % interval."
_INPUTS = """
Args:
    before: of each example, the summed loss of its tokens in nats before training (of the base).
    after: the same, after training (of the base with its adapter).
    tokens: of each example, how many tokens these sums are over.

Returns:
    forgetting: nats per token, (sum(after) - sum(before)) / sum(tokens); below 0 the loss fell.
    forgetting_interval: [low, high], 95 % over the examples, see `increase`; None of a single one.
    examples, tokens: how many there are; an example of no tokens is none.
"""


def increase(before: Any, after: Any, tokens: Any) -> tuple[float, tuple[float, float] | None]:
    """Of the mean loss per token, with its 95 % interval; the examples are pairs.

    As PEFT's method comparison (MetaMathQA) defines it, the loss after minus the base's; its own
    figures are of logits that are compared with the tokens of their own places, losses here are of
    the next token. The interval is the ratio estimator's of the differences: each example's
    residual from the common increase, by Cochran, Sampling Techniques (1977), section 6.4. What is
    hard about an example is hard before and after, and cancels.

    Args:
        before, after: (examples,) summed losses in nats.
        tokens: (examples,) their counts.
    """
    counted = np.asarray(tokens) > 0
    before, after = (np.asarray(losses, float)[counted] for losses in (before, after))
    shares = np.asarray(tokens, float)[counted] / np.sum(tokens, dtype=float)
    differences = (after - before) / np.sum(tokens, dtype=float)
    figure, pairs = float(differences.sum()), len(differences)
    if pairs == 1:
        return figure, None
    residuals = differences - figure * shares
    deviation = np.sqrt(pairs / (pairs - 1) * residuals @ residuals)
    reach = float(stdtrit(pairs - 1, 0.975) * deviation)
    return figure, (figure - reach, figure + reach)


class Forgetting(evaluate.Metric):
    """The metric of this file."""

    def _info(self) -> evaluate.MetricInfo:
        loss, count = datasets.Value("float64"), datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"before": loss, "after": loss, "tokens": count}),
        )

    def _compute(
        self, before: list[float], after: list[float], tokens: list[int]
    ) -> dict[str, Any]:
        for name, losses in {"before": before, "after": after}.items():
            if len(losses) == 0:
                raise ValueError(f"{name} must hold the loss of at least one example, got none")
            wrong = [place for place, loss in enumerate(losses) if not np.isfinite(loss)]
            if wrong:
                raise ValueError(f"{name} must be finite, example {wrong[0]} is {losses[wrong[0]]}")
            for place, (loss, count) in enumerate(zip(losses, tokens, strict=True)):
                if loss and not count:
                    raise ValueError(f"{name} of no tokens must be 0, example {place} is {loss}")
        if min(tokens) < 0 or max(tokens) == 0:
            raise ValueError(
                f"tokens must be at least 0 and not all 0, they are {min(tokens)} to {max(tokens)}"
            )
        figure, interval = increase(before, after, tokens)
        return {
            "forgetting": figure,
            "forgetting_interval": None if interval is None else list(interval),
            "examples": sum(count > 0 for count in tokens),
            "tokens": int(sum(tokens)),
        }
