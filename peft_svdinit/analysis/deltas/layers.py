"""What a truncation to rank r keeps of each layer's delta, and what it loses.

Energy is always measured against the exact ‖delta‖_F² that the factors carry, never inside the
triplets that happen to be held: a sketch of rank 8 holds all of its own energy and may hold a
tenth of the delta's. The two errors of the best rank-r approximation differ by norm
(Eckart-Young-Mirsky): in the Frobenius norm it is sqrt(Σ_{i>r} σ_i²), in the spectral norm σ_{r+1}.
Descriptions that call σ_{r+1} the Frobenius error are wrong for every delta of rank above r + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...factors import HasSpectrum, energy_not_held, singular_values
from ...linalg import rank_for_energy, stable_rank
from .random_spectrum import random_reference
from .spikes import Spikes, find_spikes

ENERGY_SHARES = (0.90, 0.95, 0.99)
# What is written as it is, in this order.
_WRITTEN = (
    *("name", "shape", "held", "norm", "base_norm", "relative_norm", "energy_ratio"),
    *("random_energy", "reconstruction_error", "absolute_error", "spectral_error"),
    *("stable_rank", "rank_for_energy", "parameters"),
)


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer's delta (out x in) cut to `rank`.

    Attributes:
        shape: (out, in).
        norm: exact ‖delta‖_F.
        singular_values: all that are held, descending.
        energy_ratio: share of ‖delta‖_F² in the first `rank` triplets, in [0, 1].
        reconstruction_error: ‖delta - truncation‖_F / ‖delta‖_F = sqrt(1 - energy_ratio).
        absolute_error: ‖delta - truncation‖_F.
        spectral_error: ‖delta - truncation‖_2 = σ_{rank+1}; None if that triplet is not held.
        stable_rank: ‖delta‖_F² / σ_1²; 0 for a zero delta.
        rank_for_energy: triplets that hold 90, 95 and 99 % of the energy, keyed "0.90", "0.95",
            "0.99"; None if the held ones do not.
        parameters: of a LoRA of this rank on this layer, rank * (out + in).
        random_energy: what `energy_ratio` would be if the delta were random, see
            `random_spectrum.random_reference`.
        spikes: the singular values above what the delta's random part shows.
        base_norm: ‖weight‖_F before fine-tuning; None if the base model is not at hand.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    singular_values: list[float]
    energy_ratio: float
    reconstruction_error: float
    absolute_error: float
    spectral_error: float | None
    stable_rank: float
    rank_for_energy: dict[str, int | None]
    parameters: int
    random_energy: float
    spikes: Spikes
    base_norm: float | None = None

    @property
    def held(self) -> int:
        """Number of triplets held."""
        return len(self.singular_values)

    @property
    def relative_norm(self) -> float | None:
        """‖delta‖_F / ‖weight‖_F; None if the base model is not at hand or its weight is zero."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def concentration(self) -> float:
        """Energy of the first `rank` triplets over that of a random delta; 1 for a zero delta."""
        return self.energy_ratio / self.random_energy if self.norm else 1.0

    def truncation_error(self, rank: int) -> float:
        """‖delta - truncation‖_F at another rank, or at the triplets held if these are fewer."""
        squares = [value * value for value in self.singular_values]
        return math.sqrt(energy_not_held(squares, self.norm) + math.fsum(squares[rank:]))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; nine digits give each float32 singular value back exactly."""
        return {
            **{key: getattr(self, key) for key in _WRITTEN},
            "spikes": self.spikes.as_dict(),
            "singular_values": [float(f"{value:.9g}") for value in self.singular_values],
        }


def analyze_layer(
    name: str, factors: HasSpectrum, rank: int, *, base_norm: float | None = None
) -> LayerAnalysis:
    """Numbers of one layer at `rank`; the dense delta is not formed.

    Args:
        name: the layer's full module name.
        factors: of its delta, or a `Spectrum` without the singular vectors.
        rank: may exceed the triplets held only where these are the whole delta, which is then
            kept exactly.
        base_norm: ‖weight‖_F of the layer before fine-tuning, if known.

    Raises:
        ValueError: if `rank` is below 1 or above what is held, or a value is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    values = singular_values(name, factors)
    squares = [value * value for value in values]
    missing = energy_not_held(squares, factors.norm)
    if rank > len(values) and missing > 0:
        raise ValueError(
            f"{name}: rank must be at most {len(values)}, the triplets held of a delta that has "
            f"more, got {rank}; choose a smaller rank or extract again with a higher one"
        )

    # Summed from what is lost: 1 - kept/total would drown small errors in float32 rounding.
    lost = min(missing + math.fsum(squares[rank:]), factors.norm**2)
    error = math.sqrt(lost) / factors.norm if factors.norm else 0.0
    if rank < len(values):
        spectral_error = values[rank]
    else:
        spectral_error = None if missing > 0 else 0.0
    out_features, in_features = factors.shape
    return LayerAnalysis(
        name=name,
        shape=(out_features, in_features),
        rank=rank,
        norm=factors.norm,
        singular_values=values,
        energy_ratio=1.0 - error**2,
        reconstruction_error=error,
        absolute_error=math.sqrt(lost),
        spectral_error=spectral_error,
        stable_rank=stable_rank(factors.S, factors.norm),
        rank_for_energy={
            f"{share:.2f}": rank_for_energy(factors.S, factors.norm, share)
            for share in ENERGY_SHARES
        },
        parameters=rank * (out_features + in_features),
        random_energy=random_reference(name, factors).energy(rank),
        spikes=find_spikes(name, factors),
        base_norm=base_norm,
    )
