"""What share of a model's delta a rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..low_rank import LowRankFactors
from ..spectrum import ENERGY_RESOLUTION


@dataclass(frozen=True)
class Held:
    """Shares of the energy, Σ σ² of the triplets kept over ‖delta‖_F² of the whole delta.

    Attributes:
        rank: triplets kept of every layer.
        energy: of all layers together.
        worst_layer, worst_energy: the layer of which the least is kept.
    """

    rank: int
    energy: float
    worst_layer: str
    worst_energy: float

    @classmethod
    def of(cls, factors: Mapping[str, LowRankFactors], rank: int) -> Held:
        """Of the leading `rank` triplets of each layer."""
        total = math.fsum(layer.norm**2 for layer in factors.values())
        shares = {name: layer.energy(rank) for name, layer in factors.items()}
        kept = math.fsum(shares[name] * layer.norm**2 for name, layer in factors.items())
        worst = min(shares, key=lambda name: shares[name])
        return cls(rank, kept / total if total else 1.0, worst, shares[worst])

    def __str__(self) -> str:
        if self.worst_energy >= 1 - ENERGY_RESOLUTION:
            return f"at rank {self.rank} holds all of its energy"
        return (
            f"at rank {self.rank} holds {_percent(self.energy)} of its energy; worst layer "
            f"{self.worst_layer} {_percent(self.worst_energy)}"
        )


def _percent(share: float) -> str:
    # Rounded down: what is not whole never reads as 100 %.
    return f"{math.floor(1000 * share) / 10:.1f} %"
