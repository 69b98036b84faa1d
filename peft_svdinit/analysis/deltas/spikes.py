"""Singular values that no random delta would show: directions that fine-tuning meant.

A delta is read as a few strong directions on top of a random part, whose level is not known. It is
estimated by taking out what stands above it: the energy that remains, spread over the dimensions
that remain, gives the noise level, its largest singular value the next threshold, until nothing
more stands out. A direction of strength θ is visible at all only if θ > noise * (out * in)^¼, and
then shows a singular value above θ (Benaych-Georges and Nadakuditi, arXiv:1103.2221, theorems 2.8
and 2.9 and section 3.1), from which `signal` is computed back. In a fine-tune stored in bfloat16
the rounding of the weights alone is such a random part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...factors import HasSpectrum, energy_not_held, singular_values
from .random_spectrum import RandomAdapter, RandomDelta, random_reference


@dataclass(frozen=True)
class Spikes:
    """The singular values of one layer above `edge`.

    Attributes:
        values: descending; the layer's first singular values.
        signals: for each the strength θ without its share of the noise, at most the value.
        edge: what the largest singular value of the random part exceeds once in a thousand.
        noise: standard deviation of the random part's entries; 0 if nothing remains.
        energy: share of ‖delta‖_F² in the spikes, in [0, 1].
        reference: what the random part is compared with, "delta" (independent entries) or
            "adapter" (a random product of the layer's rank).
        complete: False if every held singular value stands out and there are more: the count is
            then a lower bound, and the noise level an upper one.
    """

    values: tuple[float, ...]
    signals: tuple[float, ...]
    edge: float
    noise: float
    energy: float
    reference: str
    complete: bool

    @property
    def count(self) -> int:
        return len(self.values)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the values are the layer's first singular values and not repeated."""
        return {
            "count": self.count,
            "complete": self.complete,
            "energy": self.energy,
            "edge": self.edge,
            "noise": self.noise,
            "reference": self.reference,
            "signals": [float(f"{value:.6g}") for value in self.signals],
        }


def find_spikes(name: str, layer: HasSpectrum) -> Spikes:
    """The singular values of a layer that stand above its own random part.

    Raises:
        ValueError: naming the layer, if a value is not finite.
    """
    values = singular_values(name, layer)
    squares = [value * value for value in values]
    missing = energy_not_held(squares, layer.norm)
    reference = random_reference(name, layer)
    most = reference.inner if isinstance(reference, RandomAdapter) else len(values)

    count = 0
    while True:
        rest = missing + math.fsum(squares[count:])
        edge, noise = _edge_and_noise(reference, rest, count)
        # A relative 1e-6 is float32 rounding: equal singular values do not stand out.
        above = sum(value > edge * (1 + 1e-6) for value in values[:most])
        if above <= count or rest <= 0:
            break
        count = above
    signals = [_signal(value, noise, layer.shape) for value in values[:count]]
    return Spikes(
        values=tuple(values[:count]),
        signals=tuple(signals) if isinstance(reference, RandomDelta) else tuple(values[:count]),
        edge=edge,
        noise=noise,
        energy=min(1.0, math.fsum(squares[:count]) / layer.norm**2) if layer.norm else 0.0,
        reference="adapter" if isinstance(reference, RandomAdapter) else "delta",
        complete=not (0 < count == len(values) and missing > 0),
    )


def _edge_and_noise(
    reference: RandomDelta | RandomAdapter, rest: float, count: int
) -> tuple[float, float]:
    """Largest singular value to expect of the random part, and the deviation of its entries."""
    out_features, in_features = (size - count for size in reference.shape)
    if rest <= 0 or min(out_features, in_features) < 1:
        return 0.0, 0.0
    noise = math.sqrt(rest / (out_features * in_features))
    if isinstance(reference, RandomDelta):
        return RandomDelta((out_features, in_features)).largest(noise), noise
    # That of all `inner` directions is a little too high for fewer of them: no spike too many.
    return reference.largest(rest / max(1, reference.inner - count)), noise


def _signal(value: float, noise: float, shape: tuple[int, int]) -> float:
    """θ of section 3.1 of arXiv:1103.2221, from value² = (θ² + noise² m)(θ² + noise² n) / θ²."""
    rows, cols = (noise * noise * size for size in shape)
    half = (value * value - rows - cols) / 2
    return math.sqrt(max(0.0, half + math.sqrt(max(0.0, half * half - rows * cols))))
