"""Exact match for `evaluate`: the share of texts, or of their final numbers, that are right."""

from __future__ import annotations

import math
import re
from statistics import NormalDist
from typing import Any

import datasets
import evaluate

_MARKER = re.compile(r"the answer is\b|####", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.)])[-\u2212])?[$€£]?"
    r"(?P<value>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)"
    r"(?:/(?P<divisor>[0-9]+))?"
)
_Z = NormalDist().inv_cdf(0.975)

_DESCRIPTION = "The share of predictions that equal their reference, with a 95 % interval."
_INPUTS = """
Args:
    predictions: texts.
    references: the texts that they should be.
    answers: "text" compares them after stripping; "numeric" compares the numbers they end in, see
        `final_number`. By default the name of the configuration, evaluate.load(path, "numeric"),
        and without one "text".

Returns:
    exact_match: the share, from 0 to 1.
    exact_match_interval: [low, high], the Wilson score interval of 95 % over the examples.
    examples: how many there are.
"""


def final_number(text: str) -> float | None:
    """The number that an answer ends in, as GSM8K and MetaMath are scored.

    It is the first one after the last "The answer is" or "####" or, in a text without either, the
    last one of all. 1,000 is 1000, $5 and 5 % are 5, 3/4 is 0.75.

    Returns:
        None without such a number.
    """
    markers = list(_MARKER.finditer(text))
    numbers = list(_NUMBER.finditer(text, markers[-1].end() if markers else 0))
    if not numbers:
        return None
    found = numbers[0 if markers else -1]
    divisor = float(found["divisor"] or 1)
    value = float(found["value"].replace(",", "")) / divisor if divisor else None
    return -value if found["minus"] and value is not None else value


def matches(predictions: list[str], references: list[str], answers: str = "text") -> list[bool]:
    """Whether each prediction is right; a prediction without a number is wrong.

    Raises:
        ValueError: for other `answers`, lists that differ in length, or a reference without a
            number.
    """
    if answers not in ("text", "numeric"):
        raise ValueError(f'answers must be "text" or "numeric", got {answers!r}')
    if len(predictions) != len(references):
        raise ValueError(
            "predictions and references must be of one length, got "
            f"{len(predictions)} and {len(references)}"
        )
    if answers == "text":
        pairs = zip(predictions, references, strict=True)
        return [one.strip() == other.strip() for one, other in pairs]
    wanted = [final_number(text) for text in references]
    if None in wanted:
        place = wanted.index(None)
        raise ValueError(
            f"references must have a number for numeric answers, and number {place} has none: "
            f'{references[place]!r}; use answers="text"'
        )
    return [final_number(text) == number for text, number in zip(predictions, wanted, strict=True)]


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927), which stays in [0, 1] for few examples."""
    share, square = right / count, _Z**2 / count
    middle = share + square / 2
    reach = _Z * math.sqrt((share * (1 - share) + square / 4) / count)
    low, high = (middle - reach) / (1 + square), (middle + reach) / (1 + square)
    return (max(low, 0.0) if right else 0.0), (min(high, 1.0) if right < count else 1.0)


class ExactMatch(evaluate.Metric):
    """The metric of this file; `matches` says which of the predictions are right."""

    matches = staticmethod(matches)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], answers: str | None = None
    ) -> dict[str, Any]:
        if answers is None:
            answers = "text" if self.config_name == "default" else str(self.config_name)
        if not len(predictions):
            raise ValueError("predictions must not be empty: exact match of nothing is not defined")
        right = sum(matches(predictions, references, answers))
        return {
            "exact_match": right / len(predictions),
            "exact_match_interval": list(wilson_interval(right, len(predictions))),
            "examples": len(predictions),
        }
