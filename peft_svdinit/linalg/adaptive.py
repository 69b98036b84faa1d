"""As many triplets as an error asks for, found block by block."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .gram import gram_svd
from .krylov import KrylovSpace
from .rayleigh_ritz import triplets_of_space
from .spectrum import SMALLEST_ERROR, rank_for_energy
from .triplets import TruncatedSVD, balanced

_BLOCK = 32
# Beyond this share of the smaller side the Gram matrix's eigenvectors, all of them, are cheaper.
_LARGEST_SHARE = 0.25


def adaptive_svd(
    matrix: Float[Tensor, "rows cols"],
    *,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int | None = None,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """The fewest leading triplets found that hold a share of ‖matrix‖_F², or meet an error.

    A Krylov space grows until the energy that it captures, measured against the exact norm of the
    matrix and never inside the space, reaches the target; one further step lets the last triplets
    converge; then the excess is cut. The target is certified; the number of triplets is that of
    the optimum or up to a few per cent more. Flat spectra go through `gram_svd`, whose number is
    the least.

    Args:
        matrix: any finite matrix; not modified.
        energy: share of ‖matrix‖_F² to hold, in (0, 1]; 1 is all triplets. Below float64 the
            largest other share is 1 − 1e-6.
        error: or ‖matrix − U S Vh‖_F / ‖matrix‖_F to stay within, in [0, 1); 0 is all triplets.
            Below float64 the least other error is 1e-3.
        max_rank: most triplets returned; the result's `energy` then says what they hold.
        generator: randomness of the Krylov space.

    Raises:
        ValueError: if not exactly one target is given, one is out of range, or an entry is NaN or
            infinite.
    """
    share = energy_target(energy, error, matrix.dtype)
    smaller = min(matrix.shape)
    most = smaller if max_rank is None else min(max_rank, smaller)
    if most < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    wide, norm, exponent = balanced(matrix)
    # Whole blocks that hold the cap, and the one by which they converge.
    widest = min(int(_LARGEST_SHARE * smaller), (math.ceil(most / _BLOCK) + 1) * _BLOCK)
    space = KrylovSpace(wide, min(_BLOCK, smaller), generator)
    reached = False
    while norm and space.width + _BLOCK <= widest:
        space.multiply()
        space.multiply()
        if reached:
            found = triplets_of_space(*space.last(), most, norm)
            return _cut(found, share, most).scaled(exponent)
        reached = space.captured >= share * norm**2 or space.width >= most
    return _cut(gram_svd(wide, most), share, most).scaled(exponent)


def energy_target(energy: float | None, error: float | None, dtype: torch.dtype) -> float:
    """The share of energy that either wish means: error² = 1 − energy.

    Raises:
        ValueError: if not exactly one is given, or it is out of range, or finer than the singular
            values of a matrix of this dtype can tell.
    """
    if (energy is None) == (error is None):
        raise ValueError(f"give either energy or error, got {energy} and {error}")
    coarse = dtype != torch.float64
    if error is not None:
        if not 0 <= error < 1:
            raise ValueError(f"error must be in [0, 1), got {error}")
        if 0 < error < SMALLEST_ERROR and coarse:
            raise ValueError(
                f"error={error} is below the resolution of float32 singular values; give at least "
                f"{SMALLEST_ERROR}, 0 for all triplets, or a float64 matrix"
            )
        return 1 - error**2
    assert energy is not None
    if not 0 < energy <= 1 or math.isnan(energy):
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if 1 - SMALLEST_ERROR**2 < energy < 1 and coarse:
        raise ValueError(
            f"energy={energy} is beyond the resolution of float32 singular values; give at most "
            f"{1 - SMALLEST_ERROR**2}, 1 for all triplets, or a float64 matrix"
        )
    return energy


def _cut(svd: TruncatedSVD, share: float, most: int) -> TruncatedSVD:
    needed = rank_for_energy(svd.S, svd.norm, share)
    return svd.truncated(max(1, most if needed is None else min(needed, most, len(svd.S))))
