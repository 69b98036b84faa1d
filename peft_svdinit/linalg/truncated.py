"""The best or nearly best approximation of a given rank, by the method asked for."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .randomized import randomized_svd
from .triplets import TruncatedSVD, check_rank, widened

Method = Literal["exact", "randomized"]


def truncated_svd(
    matrix: Float[Tensor, "rows cols"],
    rank: int,
    *,
    method: Method = "exact",
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """Rank-`rank` approximation of `matrix`, as singular triplets.

    Works in float32 or wider and returns that dtype. Each column of `U` has its largest-magnitude
    entry positive, so equal inputs give equal factors, unless singular values are tied.

    Args:
        matrix: any finite matrix; not modified.
        rank: number of triplets kept, from 1 to `min(rows, cols)`.
        method: "exact" is the optimum in both norms (Eckart-Young: the Frobenius error is
            √Σ_{i>rank} σ_i², the spectral error σ_{rank+1}) for one full SVD,
            O(rows * cols * min(rows, cols)). "randomized" comes within about 1 % of it for
            O(rows * cols * rank), see `randomized_svd`.
        generator: randomness of "randomized".

    Raises:
        ValueError: if `rank` is out of range or `method` unknown.
    """
    if method == "randomized":
        return randomized_svd(matrix, rank, generator=generator)
    if method != "exact":
        raise ValueError(f'method must be "exact" or "randomized", got {method!r}')
    check_rank(rank, matrix.shape)
    U, S, Vh = torch.linalg.svd(widened(matrix), full_matrices=False)
    return TruncatedSVD(U, S, Vh).truncated(rank).with_canonical_signs()
