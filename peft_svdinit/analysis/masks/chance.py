"""What a random mask would be like: the yardstick of all that is said about masks.

It keeps k of N entries, drawn without replacement and all alike, so that what a group of n entries
gets of them is hypergeometric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """How the kept entries of one matrix are spread over its rows, or its columns.

    Attributes:
        lines: number of rows (columns).
        used: those with at least one kept entry.
        random_used: expected of a random mask that keeps as many entries.
        half: share of the lines, fullest first, that hold half of the kept entries.
        random_half: the same, expected of a random mask.
    """

    lines: int
    used: int
    random_used: float
    half: float
    random_half: float

    @classmethod
    def of(cls, counts: Int[Tensor, " lines"], length: int) -> Spread:
        """Of the number of kept entries in each line of `length` entries."""
        found = counts.to(torch.int64)
        kept, lines = int(found.sum()), len(found)
        chances = _counts_by_chance(length, lines * length, kept)
        by_count = torch.bincount(found, minlength=length + 1).tolist()
        return cls(
            lines=lines,
            used=lines - by_count[0],
            random_used=lines * (1 - chances[0]),
            half=_share_with_half(by_count, lines),
            random_half=_share_with_half([lines * chance for chance in chances], lines),
        )

    @classmethod
    def pooled(cls, spreads: Sequence[Spread]) -> Spread:
        """Of several matrices: sums, and means weighted by the number of lines."""
        lines = sum(spread.lines for spread in spreads)
        return cls(
            lines=lines,
            used=sum(spread.used for spread in spreads),
            random_used=math.fsum(spread.random_used for spread in spreads),
            half=math.fsum(spread.lines * spread.half for spread in spreads) / lines,
            random_half=math.fsum(spread.lines * spread.random_half for spread in spreads) / lines,
        )


def random_deviation(size: int, total: int, kept: int) -> float:
    """Standard deviation of how many of `kept` of `total` entries fall into a group of `size`."""
    if total < 2:
        return 0.0
    share = kept / total
    return math.sqrt(size * share * (1 - share) * (total - size) / (total - 1))


def energy_of_noise(density: float) -> float:
    """Share of the squares of normal variables that the `density` largest magnitudes hold."""
    if not 0 < density < 1:
        return density
    bound = torch.special.erfinv(torch.tensor(1 - density, dtype=torch.float64)).item()
    # E[x²; |x| > √2 b] = P(|x| > √2 b) + 2 b exp(-b²) / √π.
    return density + 2 * bound * math.exp(-(bound**2)) / math.sqrt(math.pi)


def _counts_by_chance(length: int, total: int, kept: int) -> list[float]:
    """Probability of 0 to `length` kept entries in a line of a random mask."""
    counts = torch.arange(length + 1, dtype=torch.float64)
    elsewhere = kept - counts
    possible = (elsewhere >= 0) & (elsewhere <= total - length)
    chances = (
        _log_choose(length, counts)
        + _log_choose(total - length, elsewhere.clamp(0, total - length))
        - _log_choose(total, torch.tensor(float(kept)))
    ).exp()
    return torch.where(possible, chances, 0.0).tolist()


def _log_choose(n: int, k: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return math.lgamma(n + 1) - torch.lgamma(k.double() + 1) - torch.lgamma(n - k.double() + 1)


def _share_with_half(lines_by_count: list[float], lines: int) -> float:
    """Share of the lines, fullest first, in which half of all kept entries are."""
    wanted = math.fsum(count * many for count, many in enumerate(lines_by_count)) / 2
    if not wanted:
        return 0.0
    taken = 0.0
    for count in range(len(lines_by_count) - 1, 0, -1):
        many = lines_by_count[count]
        if count * many >= wanted:
            return (taken + wanted / count) / lines
        taken += many
        wanted -= count * many
    return taken / lines
