"""Means over seeds, paired differences with their t interval, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FEWEST_SEEDS_FOR_A_TEST = 3
SIGNIFICANCE = 0.05

Outcome = Literal["lower", "higher", "unclear", "untested"]


@dataclass(frozen=True)
class Spread:
    """A mean over `n` seeds; `std` is the sample standard deviation, None for one seed."""

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `method - reference` over common seeds; below 0 the method's loss is lower.

    `interval` is the 95 % t interval of the mean, `p` the paired t-test's two-sided p-value and
    `p_holm` the same after Holm's correction over `tests` methods. All are None without a test:
    for fewer than three pairs, or where every pair differs by the same amount (`constant`), which
    leaves no spread to test against.
    """

    n: int
    mean: float | None
    std: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    tests: int = 0
    constant: bool = False

    @property
    def outcome(self) -> Outcome:
        """A direction only if the interval excludes 0 and the corrected p is below 0.05."""
        if self.mean is None or self.interval is None or self.p_holm is None:
            return "untested"
        low, high = self.interval
        if low <= 0 <= high or self.p_holm >= SIGNIFICANCE:
            return "unclear"
        return "lower" if high < 0 else "higher"


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation of `values`; None if there are none."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return Spread(len(values), mean, statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(method: Sequence[float], reference: Sequence[float]) -> PairedDifference:
    """Paired t-test of `method - reference`, one pair of finite values for each seed.

    Raises:
        ValueError: if the lengths differ or a value is not finite.
        ImportError: if a test is due and scipy is missing.
    """
    if len(method) != len(reference):
        raise ValueError(
            "method and reference must hold one value for each common seed, "
            f"got {len(method)} and {len(reference)} values"
        )
    if not all(math.isfinite(value) for value in (*method, *reference)):
        raise ValueError(
            f"method and reference must be finite, got {list(method)} and {list(reference)}; "
            "leave diverged runs out"
        )
    differences = [ours - theirs for ours, theirs in zip(method, reference, strict=True)]
    summary = spread(differences)
    if summary is None:
        return PairedDifference(0, None)
    n, mean, std = summary.n, summary.mean, summary.std
    if std is None or n < FEWEST_SEEDS_FOR_A_TEST:
        return PairedDifference(n, mean, std)
    # Subtraction leaves a few units in the last place of the larger operand: no spread of seeds.
    rounding = 8 * 2.0**-52 * max(abs(value) for value in (*method, *reference))
    if std <= rounding:
        return PairedDifference(n, mean, std, constant=True)

    try:
        from scipy.stats import t as student_t
    except ImportError as error:
        raise ImportError(
            "the paired test needs scipy; install it with `pip install peft-svdinit[report]`"
        ) from error
    deviation = std / math.sqrt(n)
    half_width = float(student_t.ppf(1 - SIGNIFICANCE / 2, n - 1)) * deviation
    p = 2 * float(student_t.sf(abs(mean) / deviation, n - 1))
    return PairedDifference(n, mean, std, (mean - half_width, mean + half_width), p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (Holm, 1979); None stands for "not tested" and stays None."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for position, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - position) * p))
        adjusted[index] = largest
    return adjusted
