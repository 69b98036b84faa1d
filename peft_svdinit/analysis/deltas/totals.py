"""What a truncation keeps and loses of all layers together."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...factors import HasSpectrum
from ...models import module_types
from .layers import LayerAnalysis, analyze_layer


@dataclass(frozen=True)
class Analysis:
    """All layers at one rank; the totals weigh each layer by its energy or its parameters."""

    rank: int
    layers: tuple[LayerAnalysis, ...]

    @cached_property
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

    def by_type(self, layers: Iterable[LayerAnalysis]) -> dict[str, list[LayerAnalysis]]:
        """Some of the layers by their kind of module."""
        groups: dict[str, list[LayerAnalysis]] = defaultdict(list)
        for layer in layers:
            groups[self.module_types[layer.name]].append(layer)
        return groups

    @property
    def knows_base(self) -> bool:
        """Whether any layer can be compared with its base weight."""
        return any(layer.relative_norm is not None for layer in self.layers)

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
