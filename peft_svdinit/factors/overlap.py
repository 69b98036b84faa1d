"""What two subspaces, or two masks, have in common, beside what chance would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class SpaceOverlap:
    """Principal angles between two subspaces.

    Attributes:
        largest: cosine of the smallest angle.
        mean_squared: mean of the squared cosines over the dimensions of the smaller space.
        random_mean_squared: its expectation for random subspaces of these dimensions.
    """

    largest: float
    mean_squared: float
    random_mean_squared: float

    @classmethod
    def of(
        cls, left: Float[Tensor, "dim many"], right: Float[Tensor, "dim other"]
    ) -> SpaceOverlap | None:
        """Of two sets of orthonormal columns; None if one is empty."""
        smaller, larger = sorted((left.shape[1], right.shape[1]))
        if not smaller:
            return None
        cosines = torch.linalg.svdvals(left.mT @ right).clamp(max=1.0)
        return cls(float(cosines[0]), float(cosines.square().mean()), larger / left.shape[0])


@dataclass(frozen=True)
class SupportOverlap:
    """Which entries two masks have in common.

    Attributes:
        both, either: number of entries in both masks, and in at least one.
        by_chance: expectation of `both` if each mask's entries were placed at random.
        total: entries of the two masks together.
    """

    both: int
    either: int
    by_chance: float
    total: int

    @classmethod
    def of(cls, left: Bool[Tensor, "..."], right: Bool[Tensor, "..."]) -> SupportOverlap:
        if left.shape != right.shape:
            raise ValueError(
                f"masks must have one shape to be compared, got {tuple(left.shape)} and "
                f"{tuple(right.shape)}"
            )
        first, second = int(left.sum()), int(right.sum())
        chance = first * second / left.numel() if left.numel() else 0.0
        return cls(int((left & right).sum()), int((left | right).sum()), chance, first + second)

    @classmethod
    def together(cls, layers: Sequence[SupportOverlap]) -> SupportOverlap:
        """Of all layers."""
        return cls(
            sum(layer.both for layer in layers),
            sum(layer.either for layer in layers),
            math.fsum(layer.by_chance for layer in layers),
            sum(layer.total for layer in layers),
        )

    @property
    def jaccard(self) -> float:
        """Entries in both over entries in either, in [0, 1]; 0 of two empty masks."""
        return self.both / self.either if self.either else 0.0

    @property
    def random_jaccard(self) -> float:
        """The same of masks placed at random, to the first order."""
        return self.by_chance / (self.total - self.by_chance) if self.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        shares = {"jaccard": self.jaccard, "random_jaccard": self.random_jaccard}
        return {"both": self.both, "either": self.either} | shares
