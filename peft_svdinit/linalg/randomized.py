"""Randomised range finding, Halko, Martinsson and Tropp (arXiv:0909.4061)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .orthonormal import orthonormal_basis
from .rayleigh_ritz import triplets_of_space
from .sketch import sketch
from .triplets import TruncatedSVD, balanced, check_rank


def randomized_svd(
    matrix: Float[Tensor, "rows cols"],
    rank: int,
    *,
    oversampling: int = 8,
    passes: int = 4,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """Near-optimal rank-`rank` approximation from `passes` products with one block of vectors.

    Algorithms 4.4 and 5.1 of the paper, half steps included: products with A and Aᵀ alternate,
    orthonormalised in between, and the matrix is projected on the last block. The last block's
    triplets are exact within it; the random block itself spans nothing of `matrix`, and a
    factorisation that returns it, or scales A Ω by singular values again, is wrong by several
    times the optimum.

    Args:
        matrix: any finite matrix; not modified.
        rank: number of triplets kept, from 1 to `min(rows, cols)`.
        oversampling: extra columns of the block, 5 to 10 in the paper's bounds.
        passes: products, at least 2; 2 (q + 1) are q power iterations.
        generator: randomness of the first block; a fresh one with seed 0 if not given.

    Raises:
        ValueError: if an argument is out of range.

    `krylov_svd` comes closer to the optimum for the same passes where they are more than three.
    """
    check_rank(rank, matrix.shape)
    if oversampling < 0 or passes < 2:
        raise ValueError(
            f"oversampling must not be negative and passes at least 2, got {oversampling} and "
            f"{passes}"
        )
    wide, norm, exponent = balanced(matrix)
    block = sketch(wide, min(rank + oversampling, *wide.shape), generator)
    image = wide @ block
    of_range = False
    for left in range(passes - 1, 0, -1):
        # Between products columns need only be kept apart; the last block is a basis.
        block, of_range = orthonormal_basis(image, rounds=2 if left == 1 else 1), not of_range
        image = (block.mT @ wide).mT if of_range else wide @ block
    return triplets_of_space(block, image, of_range, rank, norm).scaled(exponent)
