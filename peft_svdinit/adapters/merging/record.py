"""What merging did, layer by layer and in total, and how the adapters interfere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...factors import LayerInterference, PairInterference
from .methods import MergeMethod


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one layer.

    Attributes:
        shape: (out, in).
        ranks: of the adapters that have the layer, by the adapter's index.
        rank: of the merged layer.
        norm: ‖Σ w s B A‖_F of the exact weighted sum.
        difference: ‖stored − exact sum‖_F, rounding included.
        pairs: interference of two adapters by their indices.
    """

    name: str
    shape: tuple[int, int]
    ranks: Mapping[int, int]
    rank: int
    norm: float
    difference: float
    pairs: Mapping[tuple[int, int], LayerInterference]

    @property
    def relative_error(self) -> float | None:
        """difference / norm; None if the exact sum is zero and what is stored is not."""
        return _relative(self.difference, self.norm)


@dataclass(frozen=True)
class Pair:
    """Two of the merged adapters, by their index."""

    first: int
    second: int
    interference: PairInterference


@dataclass(frozen=True)
class Merged:
    """A merged adapter; `as_dict` is the report.

    Attributes:
        output: the folder written.
        adapters, weights, norms: of the sum, those with weight 0 left out; norms are ‖delta‖_F
            over all layers, before the weight.
        left_out: adapters with weight 0.
        layers: by natural order of names.
        parameters_before, parameters: stored values of the factors, before and after.
        only_in_some: layer names to the adapters that have them, where not all do.
    """

    output: Path
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    norms: tuple[float, ...]
    left_out: tuple[str, ...]
    method: MergeMethod
    dtypes: dict[str, int]
    layers: tuple[MergedLayer, ...]
    pairs: tuple[Pair, ...]
    parameters_before: int
    parameters: int
    only_in_some: dict[str, list[str]]

    @property
    def relative_error(self) -> float | None:
        """√(Σ‖stored − exact‖_F² / Σ‖exact‖_F²); None as of a layer."""
        return _relative(
            math.hypot(*(layer.difference for layer in self.layers)),
            math.hypot(*(layer.norm for layer in self.layers)),
        )

    @property
    def shares_A(self) -> bool:
        """Whether all adapters have the same A wherever two of them meet."""
        pairs = [pair for layer in self.layers for pair in layer.pairs.values()]
        return bool(pairs) and all(pair.shares_A for pair in pairs)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        ranks = [layer.rank for layer in self.layers]
        return {
            "adapters": list(self.adapters),
            "weights": list(self.weights),
            "norms": list(self.norms),
            "left_out": list(self.left_out),
            "method": asdict(self.method),
            "dtypes": dict(self.dtypes),
            "totals": {
                "layers": len(self.layers),
                "rank_min": min(ranks),
                "rank_mean": sum(ranks) / len(ranks),
                "rank_max": max(ranks),
                "parameters_before": self.parameters_before,
                "parameters": self.parameters,
                "relative_error": self.relative_error,
                "shares_A": self.shares_A,
            },
            "pairs": [
                {"adapters": [pair.first, pair.second]} | pair.interference.as_dict()
                for pair in self.pairs
            ],
            "only_in_some": dict(self.only_in_some),
            "layers": [_layer_as_dict(layer) for layer in self.layers],
        }


def _layer_as_dict(layer: MergedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "ranks": {str(index): rank for index, rank in layer.ranks.items()},
        "rank": layer.rank,
        "norm": layer.norm,
        "difference": layer.difference,
        "relative_error": layer.relative_error,
        "pairs": [
            {"adapters": list(indices)} | interference.as_dict()
            for indices, interference in layer.pairs.items()
        ],
    }


def _relative(difference: float, norm: float) -> float | None:
    if norm:
        return difference / norm
    return None if difference else 0.0
