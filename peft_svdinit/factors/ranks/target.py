"""How the ranks of a resized adapter are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from ..spectrum import HasSpectrum
from .rule import RankRule


@dataclass(frozen=True)
class RankTarget(RankRule):
    """A `RankRule` for adapters, whose layers only shrink: one with fewer triplets keeps those.

    Attributes:
        uniform: one rank for all layers, the largest that any would get (the largest that
            `max_parameters` pays for); layers with fewer triplets are padded by zeros.
    """

    uniform: bool = False

    def rank_of(self, name: str, layer: HasSpectrum) -> int:
        """Of a layer on its own, at least 1: the loaders know no rank 0.

        Not for `max_parameters`, which weighs the layers against each other.
        """
        if self.rank is not None:
            return min(self.rank, len(layer.S))
        return max(1, self.choose({name: layer})[0][name])
