"""What a user says about ranks, and the ranks that follow from the spectra."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...linalg import SMALLEST_ERROR
from ..spectrum import HasSpectrum, share_to_lose
from .bounds import smallest_ranks
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
        uniform: one rank for all layers, the largest that any would get, or that `max_parameters`
            pays for; smaller ones are to be padded by zeros.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    max_parameters: int | None = None
    max_rank: int | None = None
    uniform: bool = False

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

    def priced(self, shapes: Collection[tuple[int, int]]) -> RankRule:
        """A budget of uniform ranks as the rank that it pays for; any other rule as it is.

        Args:
            shapes: (out, in) of every layer.

        Raises:
            ValueError: if the budget is below one triplet for every layer.
        """
        if self.max_parameters is None or not self.uniform:
            return self
        price = sum(map(sum, shapes))
        rank = self.max_parameters // price
        if not rank:
            raise ValueError(
                f"max_parameters must be at least {price:,} to give all {len(shapes)} layers "
                f"rank 1, got {self.max_parameters:,}"
            )
        return RankRule(rank=min(rank, self.max_rank or rank), uniform=True)

    def choose(
        self, spectra: Mapping[str, HasSpectrum], *, least: int = 0
    ) -> tuple[dict[str, int], list[str]]:
        """Rank of each layer, and the layers that fall short of a bound.

        Args:
            least: rank of a zero delta: 1 where a layer cannot be left out, and costs something.

        Raises:
            ValueError: if the budget is below one triplet for every layer that cannot be left out.
        """
        rule = self.priced([layer.shape for layer in spectra.values()])
        short: list[str] = []
        if rule.rank is not None:
            ranks = {name: min(rule.rank, *layer.shape) for name, layer in spectra.items()}
        elif rule.energy is not None:
            # A slack of 1e-6 of the energy, so that a layer whose triplets are all held reaches 1.
            lost = share_to_lose(rule.energy)
            ranks, short = smallest_ranks(spectra, lambda norm: lost * norm**2, rule.max_rank)
        elif rule.error is not None:
            error = rule.error
            ranks, short = smallest_ranks(spectra, lambda norm: (error * norm) ** 2, rule.max_rank)
        else:
            paid = {name: layer for name, layer in spectra.items() if least or layer.norm}
            ranks = recommend_ranks(
                paid, max_parameters=rule.max_parameters, max_rank=rule.max_rank
            ).ranks
        return {name: ranks[name] if spectra[name].norm else least for name in spectra}, short
