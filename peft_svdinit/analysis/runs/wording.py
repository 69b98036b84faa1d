"""Numbers as they are read: few digits, true signs, and `n/a` for what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .seed_statistics import PairedDifference, Spread

NOT_KNOWN = "n/a"


def significant(value: float | None, digits: int) -> str:
    """`value` rounded to `digits` significant digits, with a true minus sign."""
    if value is None:
        return NOT_KNOWN
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-4 <= abs(value) < 10**6:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:#.{digits}g}"
        text = f"{float(text):.0f}" if "e" in text else text.rstrip(".")
    return text.replace("-", "\u2212")


def loss(value: float | None) -> str:
    return significant(value, 4)


def signed(value: float | None) -> str:
    """A difference with its sign, to three significant digits."""
    text = significant(value, 3)
    return f"+{text}" if value is not None and value > 0 else text


def p_value(value: float | None) -> str:
    return significant(value, 2)


def mean_and_std(spread: Spread | None) -> str:
    """`0.8981 ± 0.012`; a single seed has no spread to state."""
    if spread is None:
        return NOT_KNOWN
    mean = loss(spread.mean)
    return mean if spread.std is None else f"{mean} \u00b1 {significant(spread.std, 2)}"


def count(value: float | None) -> str:
    """A number of steps or tokens; a mean over seeds is rounded to a whole one."""
    return NOT_KNOWN if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    if value is None:
        return NOT_KNOWN
    return significant(value, 3) if value < 1000 else f"{value:,.0f}"


def rate(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:g}"


def share(value: float, decimals: int = 0) -> str:
    return f"{100 * value:.{decimals}f}\u00a0%"


def interval(result: PairedDifference) -> str:
    if result.interval is None:
        return NOT_KNOWN
    low, high = result.interval
    return f"{signed(low)} to {signed(high)}"


def named(label: str) -> str:
    """A label inside a sentence; quoted where its own commas would read as the sentence's."""
    return f"\u201c{label}\u201d" if "," in label or ";" in label else label


def listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)


def seeds(number: int) -> str:
    return {0: "No common seeds", 1: "One seed"}.get(number, f"{number} seeds")
