"""What merging did, layer by layer and in total, and how the adapters interfere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...factors import LayerInterference
from ..record import CombinedAdapter, KeptLayer, finite
from .methods import MergeMethod
from .pairs import Pair, pair_lines


@dataclass(frozen=True)
class MergedLayer(KeptLayer):
    """What merging did to one layer, whose delta is the exact weighted sum.

    The error is measured on what is stored: the truncation error has that of rounding in it.

    Attributes:
        ranks: of the adapters that have the layer, by the adapter's index.
        pairs: interference of two adapters by their indices.
    """

    ranks: Mapping[int, int]
    pairs: Mapping[tuple[int, int], LayerInterference]

    @property
    def error(self) -> float:
        return self.truncation_error

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "ranks": {str(index): rank for index, rank in self.ranks.items()},
            "rank": self.rank,
            "norm": self.norm,
            "difference": self.error,
            "relative_error": finite(self.relative_error),
            "pairs": [
                {"adapters": list(indices)} | interference.as_dict()
                for indices, interference in self.pairs.items()
            ],
        }


@dataclass(frozen=True)
class Merged(CombinedAdapter[MergedLayer]):
    """A merged adapter; those with weight 0 are left out of the sum.

    Attributes:
        norms: of the adapters, ‖delta‖_F over all layers, before the weight.
        left_out: adapters with weight 0.
    """

    norms: tuple[float, ...]
    left_out: tuple[str, ...]
    method: MergeMethod
    pairs: tuple[Pair, ...]

    @property
    def shares_A(self) -> bool:
        """Whether all adapters have the same A wherever two of them meet."""
        pairs = [pair for layer in self.layers for pair in layer.pairs.values()]
        return bool(pairs) and all(pair.shares_A for pair in pairs)

    def in_words(self) -> str:
        return (
            f"Method {self.method.name}: {self.sizes()} in {len(self.adapters)} adapters; relative "
            f"error {self.relative_error:.2e} against the exact weighted sum."
        )

    def remarks(self) -> list[str]:
        found = super().remarks()
        if self.left_out:
            found.append(f"Left out, for their weight is 0: {', '.join(self.left_out)}.")
        if self.shares_A and self.method.name != "shared":
            found.append("The adapters share A: method shared is exact at the rank of one adapter.")
        return found

    def tables(self) -> list[str]:
        return [*super().tables(), *pair_lines(self.pairs)]

    def as_dict(self) -> dict[str, Any]:
        found = super().as_dict()
        found["totals"]["shares_A"] = self.shares_A
        return found | {
            "norms": list(self.norms),
            "left_out": list(self.left_out),
            "method": asdict(self.method),
            "pairs": [pair.as_dict() for pair in self.pairs],
        }
