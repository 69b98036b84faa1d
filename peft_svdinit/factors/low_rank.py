"""A weight delta as low-rank factors beside its exact norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg import Method, energy, frobenius_norm, relative_error, svd_of_product, truncated_svd


@dataclass(frozen=True)
class LowRankFactors:
    """`delta ≈ U @ diag(S) @ Vh`, with the Frobenius norm of the whole delta.

    The norm is that of the delta before truncation, so energy and error stay relative to what
    fine-tuning really did, however few triplets are held.
    """

    U: Float[Tensor, "out rank"]
    S: Float[Tensor, " rank"]
    Vh: Float[Tensor, "rank in"]
    norm: float

    @classmethod
    def from_delta(
        cls,
        delta: Float[Tensor, "out in"],
        rank: int,
        *,
        method: Method = "exact",
        tolerance: float = 1.003,
        generator: torch.Generator | None = None,
    ) -> LowRankFactors:
        """Leading `rank` triplets of a dense delta, at most min(out, in) of them.

        `method` and `tolerance` are those of `truncated_svd`.
        """
        svd = truncated_svd(
            delta,
            min(rank, *delta.shape),
            method=method,
            tolerance=tolerance,
            generator=generator,
        )
        return cls(*svd, norm=svd.norm)

    @classmethod
    def from_product(
        cls,
        lora_B: Float[Tensor, "out inner"],
        lora_A: Float[Tensor, "inner in"],
        scaling: float = 1.0,
    ) -> LowRankFactors:
        """All triplets of `scaling * lora_B @ lora_A`; the product is never formed.

        Raises:
            ValueError: if `scaling` is negative or not finite.
        """
        if not 0 <= scaling < math.inf:
            raise ValueError(f"scaling must be finite and not negative, got {scaling}")
        U, S, Vh = svd_of_product(lora_B, lora_A)
        S = S * scaling
        return cls(U, S, Vh, norm=frobenius_norm(S))

    @property
    def rank(self) -> int:
        """Number of triplets held."""
        return len(self.S)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the delta."""
        return self.U.shape[0], self.Vh.shape[1]

    def truncated(self, rank: int) -> LowRankFactors:
        """The first `rank` triplets; the norm stays.

        Raises:
            ValueError: if `rank` is not in [1, held rank].
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank must be in [1, {self.rank}], the rank held, got {rank}")
        return LowRankFactors(self.U[:, :rank], self.S[:rank], self.Vh[:rank], self.norm)

    def energy(self, rank: int | None = None) -> float:
        """Share of ‖delta‖_F² in the first `rank` triplets (all held ones if None)."""
        return energy(self.S[:rank], self.norm)

    def relative_error(self, rank: int | None = None) -> float:
        """‖delta − truncation‖_F / ‖delta‖_F of the first `rank` triplets."""
        return relative_error(self.S[:rank], self.norm)

    def dense(self) -> Float[Tensor, "out in"]:
        """The held part of the delta as one matrix; for tests and single layers."""
        return (self.U * self.S) @ self.Vh
