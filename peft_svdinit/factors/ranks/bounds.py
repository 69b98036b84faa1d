"""The smallest rank of each layer, on its own, that reaches an energy or a relative error.

Every layer meets the same bound, whatever it costs; `rank_pattern.recommend_ranks` instead spends
one budget where it captures the most.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..spectrum import HasSpectrum, energy_not_held, share_to_lose, singular_values


class RankChoice(NamedTuple):
    """Ranks by full module name, and the layers in which they do not reach the bound.

    Attributes:
        ranks: 0 for a zero delta; all triplets that may be used for a layer that falls short.
        short: names of the layers whose held triplets (or `max_rank`) do not reach the bound.
    """

    ranks: dict[str, int]
    short: list[str]


def ranks_for_energy(
    spectra: Mapping[str, HasSpectrum], share: float, max_rank: int | None = None
) -> RankChoice:
    """Smallest rank per layer that keeps at least `share` of the layer's ‖delta‖_F².

    A slack of 1e-6 of the energy absorbs float32 rounding, so that share=1 is reached by a layer
    whose triplets are all held; for any other share it is at most 1 % of what may be lost.

    Raises:
        ValueError: if `share` is not in (0, 1], `max_rank` is below 1, there is no layer, or one
            is not finite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}; write 95 % as 0.95")
    lost = share_to_lose(share)
    return _smallest(spectra, lambda norm: lost * norm**2, max_rank)


def ranks_for_error(
    spectra: Mapping[str, HasSpectrum], error: float, max_rank: int | None = None
) -> RankChoice:
    """Smallest rank per layer with ‖delta − truncation‖_F ≤ `error` · ‖delta‖_F.

    Raises:
        ValueError: if `error` is not in (0, 1), `max_rank` is below 1, there is no layer, or one
            is not finite.
    """
    if not 0 < error < 1:
        raise ValueError(f"error must be in (0, 1), got {error}; write 5 % as 0.05")
    return _smallest(spectra, lambda norm: (error * norm) ** 2, max_rank)


def _smallest(
    spectra: Mapping[str, HasSpectrum], allowed: Callable[[float], float], max_rank: int | None
) -> RankChoice:
    """Smallest ranks that lose no more than `allowed` (of the norm) of the energy."""
    if not spectra:
        raise ValueError("spectra must name at least one layer, got none")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    ranks, short = {}, []
    for name, layer in spectra.items():
        squares = [value * value for value in singular_values(name, layer)]
        limit = allowed(layer.norm)
        missing = layer.norm**2 - math.fsum(squares)
        # Rounding may pass for nothing only where it is little beside what may be lost.
        if missing <= 0.01 * limit:
            missing = energy_not_held(squares, layer.norm)
        # Summed from what is lost, as in `analyze_layer`. Exactly rounded sums of squares never
        # grow with the rank, so that halving the ranks finds the first one that is good enough.
        rank = bisect_left(
            range(len(squares)),
            True,
            key=lambda rank: math.fsum([missing, *squares[rank:]]) <= limit,
        )
        usable = rank if max_rank is None else min(rank, max_rank)
        if missing > limit or usable < rank:
            short.append(name)
        ranks[name] = usable
    return RankChoice(ranks, short)
