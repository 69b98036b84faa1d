"""What a truncation to rank r keeps of each layer's delta, and what it loses.

Energy is always measured against the exact ‖delta‖_F² that the factors carry, never inside the
triplets that happen to be held: a sketch of rank 8 holds all of its own energy and may hold a
tenth of the delta's. The two errors of the best rank-r approximation differ by norm
(Eckart-Young-Mirsky): in the Frobenius norm it is sqrt(Σ_{i>r} σ_i²), in the spectral norm σ_{r+1}.
Descriptions that call σ_{r+1} the Frobenius error are wrong for every delta of rank above r + 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...factors import HasSpectrum, energy_not_held, singular_values
from ...linalg import rank_for_energy, stable_rank
from ...models import module_types
from .random_spectrum import random_reference
from .spikes import Spikes, find_spikes

ENERGY_SHARES = (0.90, 0.95, 0.99)


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
            "name": self.name,
            "shape": list(self.shape),
            "held": self.held,
            "norm": self.norm,
            "base_norm": self.base_norm,
            "relative_norm": self.relative_norm,
            "energy_ratio": self.energy_ratio,
            "random_energy": self.random_energy,
            "reconstruction_error": self.reconstruction_error,
            "absolute_error": self.absolute_error,
            "spectral_error": self.spectral_error,
            "stable_rank": self.stable_rank,
            "rank_for_energy": dict(self.rank_for_energy),
            "parameters": self.parameters,
            "spikes": self.spikes.as_dict(),
            "singular_values": [float(f"{value:.9g}") for value in self.singular_values],
        }


@dataclass(frozen=True)
class Analysis:
    """All layers at one rank; the totals weigh each layer by its energy or its parameters."""

    rank: int
    layers: tuple[LayerAnalysis, ...]

    @property
    def norm(self) -> float:
        """‖all deltas together‖_F."""
        return math.hypot(*(layer.norm for layer in self.layers))

    @property
    def energy_ratio(self) -> float:
        """Share of Σ‖delta‖_F² kept, in [0, 1]; 1 if nothing changed at all."""
        return 1.0 - self.reconstruction_error**2

    @property
    def reconstruction_error(self) -> float:
        """Frobenius error of all layers together, relative to `norm`."""
        lost = math.hypot(*(layer.absolute_error for layer in self.layers))
        return lost / self.norm if self.norm else 0.0

    @property
    def parameters(self) -> int:
        """Of a LoRA of this rank on every layer."""
        return sum(layer.parameters for layer in self.layers)

    @cached_property
    def changed(self) -> tuple[LayerAnalysis, ...]:
        """The layers whose delta is not zero."""
        return tuple(layer for layer in self.layers if layer.norm > 0)

    @property
    def zero_layers(self) -> list[str]:
        """Names of the layers that fine-tuning left as they were."""
        return [layer.name for layer in self.layers if layer.norm == 0]

    @cached_property
    def module_types(self) -> dict[str, str]:
        """Each layer's kind of module, such as `q_proj`, by its name."""
        return module_types(layer.name for layer in self.layers)

    @property
    def error_summary(self) -> dict[str, float]:
        """Median, mean, max and min of the relative error over the layers that changed."""
        errors = [layer.reconstruction_error for layer in self.changed] or [0.0]
        return {
            "median": statistics.median(errors),
            "mean": statistics.fmean(errors),
            "max": max(errors),
            "min": min(errors),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: totals first, then the layers."""
        return {
            "rank": self.rank,
            "totals": {
                "layers": len(self.layers),
                "norm": self.norm,
                "energy_ratio": self.energy_ratio,
                "reconstruction_error": self.reconstruction_error,
                "layer_errors": self.error_summary,
                "parameters": self.parameters,
                "zero_layers": self.zero_layers,
            },
            "layers": [
                {"module_type": self.module_types[layer.name], **layer.as_dict()}
                for layer in self.layers
            ],
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


def analyze(
    factors: Mapping[str, HasSpectrum],
    rank: int,
    *,
    base_norms: Mapping[str, float] | None = None,
) -> Analysis:
    """Analysis of every layer at one rank, in the mapping's order.

    Args:
        factors: of the deltas, or `Spectrum`s, by full module name.
        rank: as in `analyze_layer`.
        base_norms: ‖weight‖_F before fine-tuning, of each layer, if the base model is at hand.

    Raises:
        ValueError: if there is no layer, `base_norms` lacks one, or as `analyze_layer` does.
    """
    if not factors:
        raise ValueError("factors must name at least one layer, got none")
    lacking = [name for name in factors if base_norms is not None and name not in base_norms]
    if lacking:
        raise ValueError(f"base_norms must name every layer; it lacks {', '.join(lacking[:5])}")
    norms = base_norms or {}
    layers = (
        analyze_layer(name, layer, rank, base_norm=norms.get(name))
        for name, layer in factors.items()
    )
    return Analysis(rank=rank, layers=tuple(layers))
