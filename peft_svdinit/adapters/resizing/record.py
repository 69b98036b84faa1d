"""What resizing did, layer by layer and in total."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...factors import RankTarget


@dataclass(frozen=True)
class ResizedLayer:
    """What resizing did to one layer.

    Attributes:
        shape: (out, in) as a matrix.
        rank_before: the largest rank that its stored form can express.
        rank: triplets kept, without padding.
        norm: exact ‖delta‖_F.
        energy: share of ‖delta‖_F² kept.
        truncation_error: ‖delta − truncation‖_F / ‖delta‖_F.
        rounding_error: ‖truncation − what is stored‖_F / ‖delta‖_F; 0 in float32.
        relative_error: both together.
    """

    name: str
    shape: tuple[int, int]
    rank_before: int
    rank: int
    norm: float
    energy: float
    truncation_error: float
    rounding_error: float
    relative_error: float


@dataclass(frozen=True)
class Resized:
    """A resized adapter and its errors; `as_dict` is the report.

    Attributes:
        output: the folder or file written.
        layers: by natural order of names.
        parameters_before, parameters: stored values of the factors, before and after.
        only_in_some: layer names to the adapters that have them, where not all do.
    """

    output: Path
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    target: RankTarget
    dtypes: dict[str, int]
    layers: tuple[ResizedLayer, ...]
    parameters_before: int
    parameters: int
    only_in_some: dict[str, list[str]]

    @property
    def energy(self) -> float:
        """Share of Σ‖delta‖_F² kept by the truncation."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        kept = math.fsum(layer.energy * layer.norm**2 for layer in self.layers)
        return kept / total if total else 1.0

    @property
    def relative_error(self) -> float:
        """√(Σ‖delta − stored‖_F² / Σ‖delta‖_F²)."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        lost = math.fsum((layer.relative_error * layer.norm) ** 2 for layer in self.layers)
        return math.sqrt(lost / total) if total else 0.0

    @property
    def zero_layers(self) -> list[str]:
        """Layers whose delta is zero; they stay, with zeros."""
        return [layer.name for layer in self.layers if layer.norm == 0]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        ranks = [layer.rank for layer in self.layers]
        return {
            "adapters": list(self.adapters),
            "weights": list(self.weights),
            "target": asdict(self.target),
            "dtypes": dict(self.dtypes),
            "totals": {
                "layers": len(self.layers),
                "rank_min": min(ranks),
                "rank_mean": sum(ranks) / len(ranks),
                "rank_max": max(ranks),
                "parameters_before": self.parameters_before,
                "parameters": self.parameters,
                "energy": self.energy,
                "relative_error": self.relative_error,
            },
            "zero_layers": self.zero_layers,
            "only_in_some": dict(self.only_in_some),
            "layers": [dict(vars(layer)) for layer in self.layers],
        }
