"""The smallest rank of each layer, on its own, that loses no more than it may.

Every layer meets the same bound, whatever it costs; `budget.recommend_ranks` instead spends one
budget where it captures the most.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping

from ..spectrum import HasSpectrum, energy_not_held, singular_values


def smallest_ranks(
    spectra: Mapping[str, HasSpectrum], allowed: Callable[[float], float], max_rank: int | None
) -> tuple[dict[str, int], list[str]]:
    """Smallest ranks that lose no more than `allowed` (of the norm) of the energy.

    Returns:
        Ranks by full module name, 0 for a zero delta, and the names of the layers whose held
        triplets (or `max_rank`) do not reach the bound, which get all that they may use.

    Raises:
        ValueError: if a layer is not finite.
    """
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
    return ranks, short
