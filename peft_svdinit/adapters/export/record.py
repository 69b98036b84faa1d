"""What a written adapter keeps of the deltas, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportedLayer:
    """What the adapter keeps of one delta.

    Attributes:
        rank: triplets kept; 0 where the delta is zero or none was asked for.
        norm: ‖delta‖_F.
        truncation_error: ‖delta − B A‖_F before rounding to the adapter's dtype.
        rounding_error: ‖B A − B̂ Â‖_F, of the float32 factors to the stored ones.
    """

    rank: int
    norm: float
    truncation_error: float
    rounding_error: float

    @property
    def error(self) -> float:
        """‖delta − B̂ Â‖_F: what rounding changes lies, to first order, across what was cut off."""
        return math.hypot(self.truncation_error, self.rounding_error)


@dataclass(frozen=True)
class ExportedAdapter:
    """A written adapter, and layer by layer what it keeps.

    Attributes:
        folder: where it is.
        rank: `r` of its configuration; layers of another rank are in `rank_pattern`.
        layers: by module name, of all factors given.
        omitted: the modules that the adapter leaves alone.
    """

    folder: Path
    rank: int
    layers: dict[str, ExportedLayer]
    omitted: tuple[str, ...]

    @property
    def errors(self) -> dict[str, float]:
        """‖delta − adapter‖_F by module name, as `verify_adapter` wants it."""
        return {name: layer.error for name, layer in self.layers.items()}

    @property
    def energy(self) -> float:
        """Share of Σ‖delta‖_F² that the ranks keep, all layers together."""
        lost = math.fsum(layer.truncation_error**2 for layer in self.layers.values())
        return 1 - lost / self._squared_norm

    @property
    def relative_rounding_error(self) -> float:
        """√(Σ rounding error²) / √(Σ‖delta‖_F²), all layers together."""
        rounding = math.fsum(layer.rounding_error**2 for layer in self.layers.values())
        return math.sqrt(rounding / self._squared_norm)

    @property
    def _squared_norm(self) -> float:
        return math.fsum(layer.norm**2 for layer in self.layers.values())
