"""What a user says about ranks, and the ranks that follow from the spectra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...linalg import SMALLEST_ERROR
from ..spectrum import HasSpectrum
from .bounds import ranks_for_energy, ranks_for_error
from .budget import recommend_ranks


@dataclass(frozen=True)
class RankRule:
    """One of: a rank for all layers, a bound that each meets on its own, or a total budget.

    Attributes:
        rank: the same for all layers, smaller ones excepted.
        energy: the smallest rank of each layer that keeps this share of its ‖delta‖_F².
        error: the smallest rank of each layer whose relative Frobenius error is no larger.
        max_parameters: of the whole adapter, spent where they keep the most energy.
        max_rank: upper bound of every layer, with any but `rank`.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    max_parameters: int | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        given = [self.rank, self.energy, self.error, self.max_parameters]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "give exactly one of rank, energy, error and max_parameters, got "
                f"rank={self.rank}, energy={self.energy}, error={self.error}, "
                f"max_parameters={self.max_parameters}"
            )
        for name in ("rank", "max_parameters", "max_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}; write 95 % as 0.95")
        if self.error is not None and not SMALLEST_ERROR <= self.error < 1:
            raise ValueError(
                f"error must be in [{SMALLEST_ERROR}, 1), got {self.error}; write 5 % as 0.05. "
                "Float32 singular values tell no smaller one from rounding"
            )
        if self.energy is not None and 1 - SMALLEST_ERROR**2 < self.energy < 1:
            raise ValueError(
                f"energy must be at most {1 - SMALLEST_ERROR**2:.6f}, or 1 for all triplets, got "
                f"{self.energy}; float32 singular values tell no larger one from rounding"
            )
        if self.rank is not None and self.max_rank is not None:
            raise ValueError("max_rank bounds the ranks of other rules; leave it out with rank")

    @property
    def most(self) -> int | None:
        """No layer gets more than this, whatever its spectrum; None if there is no bound."""
        return self.rank or self.max_rank

    def choose(
        self, spectra: Mapping[str, HasSpectrum], *, uniform: bool = False
    ) -> tuple[dict[str, int], list[str]]:
        """Rank of each layer, 0 for a zero delta, and the layers that fall short of a bound.

        Args:
            uniform: whether all layers will be padded to the largest of the ranks, so that a
                budget pays for one rank of all of them.

        Raises:
            ValueError: if the budget is below one triplet for every layer that changed.
        """
        short: list[str] = []
        if self.max_parameters is not None and uniform:
            price = sum(sum(layer.shape) for layer in spectra.values())
            rank = min(self.max_parameters // price, self.max_rank or self.max_parameters)
            if not rank:
                raise ValueError(
                    f"max_parameters must be at least {price:,} to give all {len(spectra)} layers "
                    f"rank 1, got {self.max_parameters:,}"
                )
            ranks = {name: min(rank, *layer.shape) for name, layer in spectra.items()}
        elif self.energy is not None:
            ranks, short = ranks_for_energy(spectra, self.energy, self.max_rank)
        elif self.error is not None:
            ranks, short = ranks_for_error(spectra, self.error, self.max_rank)
        elif self.rank is not None:
            ranks = {name: min(self.rank, *layer.shape) for name, layer in spectra.items()}
        else:
            changed = {name: layer for name, layer in spectra.items() if layer.norm}
            ranks = recommend_ranks(
                changed, max_parameters=self.max_parameters, max_rank=self.max_rank
            ).ranks
        return {name: ranks[name] if spectra[name].norm else 0 for name in spectra}, short
