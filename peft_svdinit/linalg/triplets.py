"""Singular triplets, what they are certified to hold, and the convention for their signs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .scaling import times_power_of_two
from .spectrum import energy, frobenius_norm, norm_times_power_of_two, relative_error

# Norms within which neither squares nor reciprocals of float32 come near the ends of its range.
_SMALLEST_NORM, _LARGEST_NORM = 1e-15, 1e15


@dataclass(frozen=True)
class TruncatedSVD:
    """`matrix ≈ U @ diag(S) @ Vh`, with the exact Frobenius norm of the whole matrix.

    Unpacks as `U, S, Vh`: orthonormal columns of `U` and rows of `Vh`, `S` descending. Every method
    here projects the matrix, so that ‖matrix − U S Vh‖_F² = norm² − Σ S² holds exactly: the norm
    certifies the error of the triplets at hand, whichever method found them. Float32 rounding of
    `S` limits the relative error that can be told from zero to about 3e-4.

    Attributes:
        norm: ‖matrix‖_F, summed in float64.
        optimal: whether no other triplets of this number capture more, which makes the ratio of
            captured over optimal energy 1; randomised methods do not know it of their own.
    """

    U: Float[Tensor, "rows rank"]
    S: Float[Tensor, " rank"]
    Vh: Float[Tensor, "rank cols"]
    norm: float
    optimal: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.Vh))

    @property
    def energy(self) -> float:
        """Share of ‖matrix‖_F² captured; 1 for a zero matrix."""
        return energy(self.S, self.norm)

    @property
    def relative_error(self) -> float:
        """‖matrix − U S Vh‖_F / ‖matrix‖_F."""
        return relative_error(self.S, self.norm)

    def truncated(self, rank: int) -> TruncatedSVD:
        """The first `rank` triplets."""
        return TruncatedSVD(
            self.U[:, :rank], self.S[:rank], self.Vh[:rank], self.norm, self.optimal
        )

    def scaled(self, exponent: int) -> TruncatedSVD:
        """The triplets of the matrix times 2**exponent.

        Raises:
            ValueError: if its singular values or norm are beyond the range of their dtype.
        """
        if not exponent:
            return self
        S = times_power_of_two(self.S, exponent)
        norm = norm_times_power_of_two(self.norm, exponent)
        if not torch.isfinite(S).all():
            raise ValueError(
                f"the matrix has singular values beyond the range of {S.dtype}, its norm is "
                f"{norm:.3g}; scale it down or pass it in float64"
            )
        return TruncatedSVD(self.U, S, self.Vh, norm, self.optimal)

    def with_canonical_signs(self) -> TruncatedSVD:
        """Flip pairs of vectors: the largest-magnitude entry of each column of `U` is positive."""
        flipped = self.U.amax(dim=0, keepdim=True) + self.U.amin(dim=0, keepdim=True) < 0
        signs = torch.where(flipped, -1.0, 1.0).to(self.U.dtype)
        return TruncatedSVD(self.U * signs, self.S, self.Vh * signs.mT, self.norm, self.optimal)


def widened(matrix: Tensor) -> Tensor:
    """`matrix` in float32 or wider, the precision of all factorisations here."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def balanced(matrix: Tensor) -> tuple[Tensor, float, int]:
    """(M, ‖M‖_F, e): `matrix` = M * 2**e, in float32 or wider, with e = 0 for all usual scales.

    Of a matrix so small or large that squares or reciprocals of singular values would leave the
    range of its dtype, e brings the norm near 1.

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    wide = widened(matrix)
    norm = frobenius_norm(wide)
    if norm == 0 or _SMALLEST_NORM <= norm <= _LARGEST_NORM:
        return wide, norm, 0
    _, exponent = math.frexp(norm)
    return times_power_of_two(wide, -exponent), norm_times_power_of_two(norm, -exponent), exponent


def check_rank(rank: int, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ValueError unless a matrix of this shape has `rank` triplets."""
    largest = min(shape)
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank must be in [1, {largest}] for a matrix of shape {tuple(shape)}, got {rank}"
        )
