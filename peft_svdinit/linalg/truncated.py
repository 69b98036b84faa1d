"""The best or nearly best approximation of a matrix, by the method that suits it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .adaptive import adaptive_svd
from .gram import gram_subspace_svd, gram_svd
from .krylov import default_block, krylov_svd
from .randomized import randomized_svd
from .triplets import TruncatedSVD, balanced, check_rank

Method = Literal["auto", "exact", "gram", "gram_subspace", "randomized", "krylov"]

# Full factorisations of a matrix this small cost no more than the products of a Krylov space.
_SMALL = 48


def truncated_svd(
    matrix: Float[Tensor, "rows cols"],
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    method: Method = "auto",
    tolerance: float = 1.01,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """Leading singular triplets of `matrix`: of a given rank, or as many as an error needs.

    Works in float32 or wider and returns that dtype; half precision is widened. Each column of `U`
    has its largest-magnitude entry positive, so equal inputs give equal factors, unless singular
    values are tied: bit by bit on one machine with one number of threads. With another, products
    and factorisations add up in another order, and the last digits may differ. The result's `norm`
    certifies its error whatever the method.

    Args:
        matrix: any finite matrix; not modified.
        rank: number of triplets kept, from 1 to `min(rows, cols)`; with `energy` or `error` the
            most that are kept.
        energy: share of ‖matrix‖_F² to hold, in (0, 1]; see `adaptive_svd`.
        error: or ‖matrix − U S Vh‖_F / ‖matrix‖_F to stay within; 0, or at least 1e-3 unless the
            matrix is float64.
        method: "exact" and "gram" are the optimum in both norms (Eckart-Young: the Frobenius error
            is √Σ_{i>rank} σ_i², the spectral error σ_{rank+1}); "gram_subspace", "randomized" and
            "krylov" come near it; "auto" takes the cheapest that comes within `tolerance`.
        tolerance: Frobenius error over the optimal one that "auto" and "krylov" aim at, at least
            1, which is exact. Not a bound: it holds on the spectra of fine-tuning deltas, gradients
            and polynomial decay, where it was measured.
        generator: randomness of the methods that have any; one with seed 0 if not given.

    Raises:
        ValueError: if an argument is out of range or unknown, or an entry is NaN or infinite.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not tolerance >= 1:
        raise ValueError(f"tolerance must be at least 1, got {tolerance}")
    if rank is not None:
        check_rank(rank, matrix.shape)
    if energy is not None or error is not None:
        if method != "auto":
            raise ValueError(f'energy and error need method="auto", got {method!r}')
        return adaptive_svd(matrix, energy=energy, error=error, max_rank=rank, generator=generator)
    if rank is None:
        raise ValueError("give a rank, or an energy or error to reach")
    if method == "auto":
        method = cheapest_method(matrix.shape, rank, tolerance)
    if method == "exact":
        wide, norm, exponent = balanced(matrix)
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        whole = TruncatedSVD(U, S, Vh, norm, optimal=True)
        return whole.truncated(rank).with_canonical_signs().scaled(exponent)
    if method == "gram":
        return gram_svd(matrix, rank)
    if method == "gram_subspace":
        return gram_subspace_svd(matrix, rank, generator=generator)
    if method == "randomized":
        return randomized_svd(matrix, rank, generator=generator)
    return krylov_svd(matrix, rank, passes=krylov_passes(tolerance), generator=generator)


def krylov_passes(tolerance: float) -> int:
    """Products after which `krylov_svd` is within `tolerance` of the optimal error, as measured.

    On gradients and AdamW deltas at ranks 16 to 64 and on σ_j = 1/j: four come within 1.04, six
    within 1.005, seven within 1.002.
    """
    if tolerance >= 1.05:
        return 4
    return 6 if tolerance >= 1.01 else 7


def krylov_multiplications(shape: torch.Size | tuple[int, ...], rank: int, tolerance: float) -> int:
    """What `krylov_svd` costs within `tolerance`: its products, and keeping blocks orthonormal."""
    larger, smaller = max(shape), min(shape)
    block, passes = min(default_block(rank), smaller), krylov_passes(tolerance)
    width = min(block * (passes // 2), smaller)
    return passes * larger * smaller * block + 2 * (larger + smaller) * width**2


def cheapest_method(shape: torch.Size | tuple[int, ...], rank: int, tolerance: float) -> Method:
    """The method that needs least time for this shape, by multiplications and measured rates."""
    larger, smaller = max(shape), min(shape)
    if smaller <= _SMALL:
        return "exact"
    if tolerance < 1.002:
        return "gram"
    # Float64 at half the rate; eigenvectors of n x n cost about 25 n³ of its multiplications.
    costs: dict[Method, int] = {"gram": 2 * larger * smaller**2 + 25 * smaller**3}
    if rank <= smaller // 4:
        costs["gram_subspace"] = 2 * larger * smaller**2 + 15 * smaller**2 * (rank + 8)
    if default_block(rank) * (krylov_passes(tolerance) // 2) <= smaller // 2:
        costs["krylov"] = krylov_multiplications(shape, rank, tolerance)
    return min(costs, key=lambda method: costs[method])
